# SPDX-License-Identifier: Apache-2.0
"""What the draft says about its own uncertainty: top-K entropies, per node and along paths (HeteroSpec 3.1).

Every function is vectorised over requests and nodes; logarithms are natural.
"""

from __future__ import annotations

import math

import numpy as np

from heterospec_vllm.arrays import Floats, Ints
from heterospec_vllm.compiled import compiled
from heterospec_vllm.config import MetaPathReading


@compiled("f8(f4[:])")
def row_entropy(log_probs):
    """Entropy in nats of a node's renormalised top-k, at most ``ln(top_k)``; 0 where nothing is finite."""
    top = -np.inf
    for value in log_probs:
        if np.isfinite(value) and value > top:
            top = value
    if top == -np.inf:
        return 0.0
    total = weighted = 0.0
    for value in log_probs:
        shifted = value - top
        weight = math.exp(shifted)
        total += weight
        if weight > 0.0:
            weighted += weight * shifted
    return max(math.log(total) - weighted / total, 0.0)


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
