# SPDX-License-Identifier: Apache-2.0
"""A made-up head and target: draft trees whose nodes survive with a known probability.

The head's distributions differ in difficulty from tree to tree and from node to node. What the target does with a
node's children is a function of the head's own distribution, so its error is of the kind that heads have.
"""

from collections.abc import Callable

import numpy as np
from made_up_trees import top_k_entropy

from heterospec_vllm.policy.strata import DEFAULT_STRATA
from heterospec_vllm.policy.survival import NodeFeatures

TOP_K, DEPTH, NODES = 8, 4, 6
# (probabilities of a node's children, their depth, their stratum) -> how often the target takes each
Truth = Callable[[np.ndarray, int, int], np.ndarray]


def tempered(power: float, scale: float, by_depth: float = 0.0, by_stratum: float = 0.0) -> Truth:
    """The head's distribution flattened (power < 1) or sharpened, then a part of it lost."""

    def taken(probs: np.ndarray, depth: int, stratum: int) -> np.ndarray:
        weights = probs**power
        rest = max(1.0 - float(probs.sum()), 0.0) ** power
        share = scale - by_depth * (depth - 1) - by_stratum * stratum
        return share * weights / (weights.sum() + rest)

    return taken


def stream(truth: Truth, num_trees: int, seed: int) -> tuple[NodeFeatures, np.ndarray, np.ndarray]:
    """The likeliest nodes of many trees, whether each was accepted, and the probability that it would be."""
    rng = np.random.default_rng(seed)
    trees = [_tree(truth, rng) for _ in range(num_trees)]
    log_probs, depths, strata, accepted, survivals = (
        np.concatenate(column) for column in zip(*trees, strict=True)
    )
    nodes = NodeFeatures(log_probs, depths, strata, np.zeros(depths.shape, dtype=np.int64))
    return nodes, accepted, survivals


def _tree(truth: Truth, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    # Root first: log-probability, entropy, survival, accepted; only paths that happened go on.
    frontier = [(0.0, 0.0, 1.0, True)]
    levels = []
    hardness = rng.normal()
    for depth in range(1, DEPTH + 1):
        level = []
        for log_prob, entropy, survival, accepted in frontier:
            probs = _distribution(rng, hardness)
            total = entropy + float(top_k_entropy(np.log(probs)))
            stratum = int(DEFAULT_STRATA.of(depth, np.array(total)))
            taken = truth(probs, depth, stratum)
            winner = int(np.searchsorted(np.cumsum(taken), rng.random()))
            for rank in range(TOP_K):
                node = log_prob + np.log(probs[rank]), total, survival * taken[rank]
                level.append((*node, accepted and rank == winner, depth, stratum))
        level.sort(key=lambda node: -node[0])
        levels += level
        frontier = [node[:4] for node in level[:3]]
    levels.sort(key=lambda node: -node[0])
    log_probs, _, survivals, accepted, depths, strata = zip(*levels[:NODES], strict=True)
    return (
        np.array(log_probs, dtype=np.float32),
        np.array(depths),
        np.array(strata),
        np.array(accepted, dtype=np.float32),
        np.array(survivals),
    )


def _distribution(rng: np.random.Generator, hardness: float) -> np.ndarray:
    """[TOP_K] falling probabilities that leave something to the rest of the vocabulary."""
    slope = np.exp(0.6 + 0.7 * hardness + 0.6 * rng.normal())
    weights = np.exp(-slope * np.log(np.arange(1, TOP_K + 1)) + rng.normal(0.0, 0.3, TOP_K))
    weights = -np.sort(-weights)
    return weights / (weights.sum() + weights[0] * np.exp(rng.normal(-2.0, 1.0)))
