# SPDX-License-Identifier: Apache-2.0
"""Trees and entropies by hand, for tests of what is made of them."""

import numpy as np

from heterospec_vllm.arrays import NO_ROW, Floats, Ints
from heterospec_vllm.draft.signals import row_entropy
from heterospec_vllm.tree.trees import DraftTrees


def from_parents(
    tokens: Ints,  # [num_reqs, max_nodes]
    node_parents: Ints,  # [num_reqs, max_nodes] parent row of each node
    node_ranks: Ints,  # [num_reqs, max_nodes]
    num_nodes: Ints,  # [num_reqs]
    *,
    log_probs: Floats
    | None = None,  # [num_reqs, max_nodes], likewise the others; zeros if not given
    survivals: Floats | None = None,
    strata: Ints | None = None,
) -> DraftTrees:
    """Add the root row and derive the depths; the node order is taken as it is."""
    num_reqs = tokens.shape[0]
    root = np.full((num_reqs, 1), NO_ROW)
    parents = np.concatenate([root, node_parents], axis=1)
    ranks = np.concatenate([root + 1, node_ranks], axis=1)
    depths = np.zeros_like(parents)
    above = parents
    while (above >= 0).any():
        depths += above >= 0
        above = np.where(
            above >= 0, np.take_along_axis(parents, np.maximum(above, 0), axis=1), NO_ROW
        )
    zeros = np.zeros(tokens.shape, dtype=np.float32)
    return DraftTrees(
        tokens,
        parents,
        depths,
        ranks,
        num_nodes,
        zeros if log_probs is None else np.asarray(log_probs, dtype=np.float32),
        zeros if survivals is None else np.asarray(survivals, dtype=np.float32),
        np.zeros_like(tokens) if strata is None else strata,
    )


def top_k_entropy(
    log_probs: Floats,  # [..., top_k] the likeliest next tokens of a node, descending or not
) -> Floats:
    """[...] entropy in nats of the top-K probabilities renormalised to sum to 1."""
    rows = np.reshape(log_probs, (-1, log_probs.shape[-1])).astype(np.float32)
    entropies = np.array([row_entropy(row) for row in rows], dtype=np.float32)
    return entropies.reshape(log_probs.shape[:-1])
