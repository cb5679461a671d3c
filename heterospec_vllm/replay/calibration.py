# SPDX-License-Identifier: Apache-2.0
"""From a trace and timed steps to a profile: strata, survivals, costs, and a check on requests that were held out.

Drafts begin where a step ends, not at every position, and behind a rejection the head does worse than on average. So
survivals are fitted at the positions at which a fixed tree would really have drafted, from several starting points.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heterospec_vllm.arrays import Floats, Ints
from heterospec_vllm.kernels import private_files
from heterospec_vllm.policy.cost import (
    ROW_KNOTS,
    TOKEN_KNOTS,
    CostTable,
    StepCosts,
    table_from_samples,
)
from heterospec_vllm.policy.strata import Strata, fit_edges
from heterospec_vllm.policy.survival import TABLE_DEPTH, NodeFeatures, SurvivalTables, log_loss
from heterospec_vllm.replay.simulate import Replay

HELD_OUT = 5  # one request in that many is not fitted
WALK_NODES = 8  # nodes of the fixed tree whose steps give the positions
OFFSETS = 3
LABELLED_NODES = 32  # the likeliest candidates of a draft are labelled


@dataclass(frozen=True)
class Labelled:
    """Candidates of drafts with what became of them."""

    nodes: NodeFeatures
    accepted: Floats  # 0 or 1


@dataclass(frozen=True)
class Fit:
    """What calibration found."""

    strata: Strata
    paper_edges: tuple[float, ...]
    survivals: SurvivalTables
    held_out: Labelled
    num_nodes: int
    figures: dict[str, float]


def fit(replay: Replay, paper_depth: int, paper_nodes: int) -> Fit:
    """Strata and survivals from a trace; checked on held-out requests."""
    drafts = _step_starts(replay)
    request = replay.trace.request[drafts]
    training = drafts[request % HELD_OUT != HELD_OUT - 1]
    held_out = drafts[request % HELD_OUT == HELD_OUT - 1]
    strata = Strata(
        tuple(
            _edges(replay, training, depth)
            for depth in range(1, min(replay.max_depth, TABLE_DEPTH) + 1)
        )
    )
    tables = SurvivalTables(memory=np.inf)
    learned = label(replay, training, strata)
    tables.observe(learned.nodes, learned.accepted)
    tables.refresh()
    check = label(replay, held_out if held_out.size else training, strata)
    raw = np.exp(check.nodes.log_probs)
    rate = float(learned.accepted.mean())
    figures = {
        "log_loss": tables.log_loss(check.nodes, check.accepted),
        "log_loss_path_probability": log_loss(raw, check.accepted),
        "log_loss_constant": log_loss(np.full(raw.shape, rate), check.accepted),
        "nodes": float(check.accepted.size),
    }
    return Fit(
        strata=strata,
        paper_edges=paper_edges(replay, training, paper_depth, paper_nodes),
        survivals=tables,
        held_out=check,
        num_nodes=int(learned.accepted.size),
        figures=figures,
    )


def _step_starts(replay: Replay) -> Ints:
    """[num_steps] the drafts at which a fixed tree's steps begin, with repetition."""
    trace = replay.trace
    depth_two = np.flatnonzero(replay.depths <= 2)
    order = np.argsort(-trace.log_probs[:, depth_two], axis=1, kind="stable")[:, :WALK_NODES]
    hits = np.take_along_axis(replay.accepted[:, depth_two], order, axis=1).sum(axis=1)
    found: list[int] = []
    for request in range(replay.num_requests):
        for offset in range(OFFSETS):
            position = int(replay.first[request]) + offset
            while position < replay.last[request]:
                row = replay.rows(np.array([request]), np.array([position]))[0]
                if row < 0:
                    break
                found.append(int(row))
                position += int(hits[row]) + 1
    return np.array(found, dtype=np.int64)


def _meta_nodes(replay: Replay, drafts: Ints, depth: int) -> tuple[Floats, Floats]:
    """Entropy and fate of each draft's meta-path at a depth: the level's node of highest path probability."""
    columns = replay.columns(depth)
    log_probs = replay.trace.log_probs[drafts, columns]
    best = log_probs.argmax(axis=1)[:, None]
    entropy = np.take_along_axis(replay.trace.entropies[drafts, columns], best, axis=1)[:, 0]
    accepted = np.take_along_axis(replay.accepted[drafts, columns], best, axis=1)[:, 0]
    return entropy, accepted.astype(np.float64)


def _edges(replay: Replay, drafts: Ints, depth: int) -> tuple[float, ...]:
    entropy, accepted = _meta_nodes(replay, drafts, depth)
    return fit_edges(entropy, accepted)


def paper_edges(replay: Replay, drafts: Ints, depth: int, num_nodes: int) -> tuple[float, ...]:
    """HeteroSpec 3.2: over fully accepted meta-paths, the rank of the path's end among the kept nodes by entropy."""
    depth = min(depth, replay.max_depth)
    entropy, accepted = _meta_nodes(replay, drafts, depth)
    columns = replay.columns(depth)
    up_to = replay.trace.log_probs[drafts][:, : columns.stop]
    best = replay.trace.log_probs[drafts, columns].max(axis=1)
    rank = np.minimum((up_to > best[:, None]).sum(axis=1), num_nodes).astype(np.float64)
    whole = accepted > 0
    if whole.sum() < 32:
        raise ValueError(
            f"calibrate: found {int(whole.sum())} fully accepted paths of {depth} tokens, allowed: "
            "at least 32 (take more prompts, longer answers or a smaller --depth)"
        )
    return fit_edges(entropy[whole], rank[whole])


def label(replay: Replay, drafts: Ints, strata: Strata) -> Labelled:
    """The likeliest candidates of some drafts, with their features and whether the answer went through them."""
    trace = replay.trace
    order = np.argsort(-trace.log_probs[drafts], axis=1, kind="stable")[:, :LABELLED_NODES]
    log_probs = np.take_along_axis(trace.log_probs[drafts], order, axis=1)
    depths = replay.depths[order]
    entropies = np.take_along_axis(trace.entropies[drafts], order, axis=1)
    stratum = np.zeros(order.shape, dtype=np.int64)
    for depth in range(1, replay.max_depth + 1):
        here = depths == depth
        stratum[here] = strata.of(depth, entropies[here])
    sampled = np.broadcast_to(trace.sampled[trace.request[drafts]][:, None], order.shape)
    real = log_probs > -np.inf
    nodes = NodeFeatures(log_probs, depths, stratum, sampled.astype(np.int64))
    accepted = np.take_along_axis(replay.accepted[drafts], order, axis=1)
    return Labelled(nodes[real], accepted[real].astype(np.float64))


def fit_costs(samples: list[dict[str, list]]) -> StepCosts:
    """Cost tables from what ``CostRecorder`` noted over several batch sizes, trees and context lengths.

    A step is the table of its tokens, plus a share a request, plus a share for every row and token of context that the
    row attends to. All slopes are non-negative, and errors count relative to the step, so that short steps matter.
    """
    steps = np.array([row for part in samples for row in part["steps"]], dtype=np.float64)
    tokens, requests, context, seconds = steps.T
    knots = np.array(TOKEN_KNOTS, dtype=np.float64)
    low, width = knots[:-1], np.diff(knots)
    # The first column is a step of one token, the next ones rise from each knot to the following.
    rises = np.clip(tokens[:, None] - low, 0.0, width)
    design = np.concatenate(
        [
            np.ones((tokens.size, 1)),
            rises,
            requests[:, None],
            (context * tokens / requests)[:, None],
        ],
        axis=1,
    )
    found = _robust(design, seconds)
    slopes = found[1 : knots.size].copy()
    slopes[low >= tokens.max()] = slopes[low < tokens.max()][-1]  # beyond what was timed
    values = found[0] + np.concatenate([[0.0], np.cumsum(slopes * width)])
    return StepCosts(
        verify=CostTable(TOKEN_KNOTS, np.maximum(values, 1e-5)),
        first_pass=_table([row for part in samples for row in part["first_passes"]]),
        level=_table([row for part in samples for row in part["levels"]]),
        request_seconds=float(found[-2]),
        context_seconds=float(found[-1]),
    )


def _table(rows: list[tuple[int, float]]) -> CostTable:
    counts, seconds = np.array(rows, dtype=np.float64).T
    return table_from_samples(ROW_KNOTS, counts.astype(np.int64), seconds)


def _robust(design: Floats, seconds: Floats) -> Floats:
    """Non-negative least squares, twice: the second time without steps that something interrupted."""
    from scipy.optimize import nnls

    scale = design.max(axis=0)
    scale[scale == 0] = 1.0
    keep = np.ones(seconds.size, dtype=np.bool_)
    solution: Floats = np.zeros(design.shape[1])
    for _ in range(2):
        weight = 1.0 / seconds[keep]
        solution = nnls(design[keep] / scale * weight[:, None], np.ones(weight.size))[0] / scale
        error = np.abs(design @ solution / seconds - 1.0)
        keep = error <= 3 * np.median(error) + 1e-9
    return solution


def draw_reliability(check: Labelled, tables: SurvivalTables, path: Path) -> None:
    """Reliability diagram (PNG): how often nodes of a predicted survival were accepted, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 6))
    axis.plot([0, 1], [0, 1], color="grey", linewidth=1, label="perfect")
    raw = np.exp(check.nodes.log_probs)
    for values, name in ((raw, "path probability"), (tables.predict(check.nodes), "survival")):
        predicted, observed, counts = _bins(values, check.accepted)
        axis.scatter(
            predicted, observed, s=np.clip(np.sqrt(counts) * 3, 10, 150), label=name, alpha=0.8
        )
    axis.set_xlabel("predicted probability of being accepted")
    axis.set_ylabel("accepted")
    axis.set_title(f"{check.accepted.size} nodes of held-out requests")
    axis.legend()
    figure.tight_layout()
    with private_files.beside(path) as part:
        figure.savefig(part, dpi=110)
    pyplot.close(figure)


def _bins(values: Floats, accepted: Floats, count: int = 15) -> tuple[Any, Any, Any]:
    edges = np.linspace(0, 1, count + 1)
    index = np.clip(np.digitize(values, edges) - 1, 0, count - 1)
    sizes = np.bincount(index, minlength=count)
    full = sizes > 0
    predicted = np.bincount(index, weights=values, minlength=count)[full] / sizes[full]
    observed = np.bincount(index, weights=accepted, minlength=count)[full] / sizes[full]
    return predicted, observed, sizes[full]
