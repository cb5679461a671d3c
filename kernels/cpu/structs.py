# SPDX-License-Identifier: Apache-2.0
"""How Python packs what the C entries take: for each struct of csrc/ its fields, by its name there.

q is int64_t, Q an address, d a double; nothing lies between them. C++ asserts the sizes when it is compiled
(`static_assert`), `library` asks for them when it has loaded a library.
"""

import struct

STRUCTS = {
    name: struct.Struct("=" + fields)
    for name, fields in {
        # attend.hpp: together the arguments of tree attention
        "LayerArguments": "2q2Q8qd",
        "RequestArguments": "3q7Q4q",
        "RowArguments": "2Q4q",
        # head_layer.hpp: these two, then those of attention
        "HeadWeights": "5qd10Q",
        "HeadInputs": "q8Q",
        # gather_rows.hpp: then one RowSource a matrix
        "GatherArguments": "2q2Q",
        "RowSource": "Q2q",
        "ArgmaxArguments": "4q3Q",  # argmax.hpp
        "CompactArguments": "9q3Q",  # kv_compact.hpp
        "PackedLinearArguments": "5q4Q",  # packed_linear_arguments.hpp
        "AuxFusionArguments": "5qd4Q",  # aux_fusion.hpp
        "TopArguments": "5q7Qq",  # top_tokens.hpp
        "WalkArguments": "6q14Qq",  # walk.hpp
        "RowRules": "q3d2q3Q2qQq3Qq2QqQ",  # row_rules.hpp
    }.items()
}
