# SPDX-License-Identifier: Apache-2.0
"""What to draft: the shape of the trees, as a pure function of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PolicyName = Literal["plain", "chain", "static"]
POLICIES: tuple[PolicyName, ...] = ("plain", "chain", "static")


@dataclass(frozen=True)
class TreeShape:
    """Bounds of a draft tree.

    ``num_nodes`` draft nodes are verified, drafted over at most ``max_depth`` head passes with ``top_k`` children
    a node and the ``top_k`` best nodes of a level expanded further (EAGLE-2's beam).
    """

    num_nodes: int
    max_depth: int
    top_k: int


def tree_shape(
    policy: PolicyName, num_speculative_tokens: int, max_depth: int, top_k: int
) -> TreeShape | None:
    """The shape that a policy drafts, None where it does not speculate.

    ``plain`` never drafts, ``chain`` drafts one path of ``min(num_speculative_tokens, max_depth)`` tokens, and
    ``static`` is EAGLE-2's tree of fixed size.
    """
    match policy:
        case "plain":
            return None
        case "chain":
            length = min(num_speculative_tokens, max_depth)
            return TreeShape(num_nodes=length, max_depth=length, top_k=1)
        case "static":
            return TreeShape(num_nodes=num_speculative_tokens, max_depth=max_depth, top_k=top_k)
