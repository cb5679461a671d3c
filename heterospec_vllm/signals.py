# SPDX-License-Identifier: Apache-2.0
"""What the draft says about its own uncertainty: top-K entropies, per node and along paths (HeteroSpec 3.1).

Every function is vectorised over requests and nodes; logarithms are natural.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from heterospec_vllm import level_loops
from heterospec_vllm.tree import Floats, Ints

# Which node ends the meta-path: "A" the deepest one of highest path probability, "B" the deepest one whose own
# (local) probability is highest, as the paper's formula is printed.
MetaPathReading = Literal["A", "B"]


def top_k_entropy(
    log_probs: Floats,  # [..., top_k] the likeliest next tokens of a node, descending or not
) -> Floats:
    """[...] entropy in nats of the top-K probabilities renormalised to sum to 1, at most ``ln(top_k)``.

    A row without a finite entry (an absent node) has entropy 0.
    """
    rows = np.reshape(log_probs, (-1, log_probs.shape[-1])).astype(np.float32)
    return level_loops.entropies(rows).reshape(log_probs.shape[:-1])


def meta_path_end(
    depths: Ints,  # [pool_size] depth of each pool column
    log_probs: Floats,  # [num_reqs, pool_size] cumulative, -inf where there is no node
    local_log_probs: Floats,  # [num_reqs, pool_size] of the node given its parent
    reading: MetaPathReading = "A",
) -> Ints:
    """[num_reqs] the pool column in which the meta-path of each request ends."""
    present = np.isfinite(log_probs)
    deepest = np.where(present, depths, 0).max(axis=1, keepdims=True)
    key = log_probs if reading == "A" else local_log_probs
    return np.where(present & (depths == deepest), key, -np.inf).argmax(axis=1)
