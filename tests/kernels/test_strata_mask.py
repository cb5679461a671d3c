# SPDX-License-Identifier: Apache-2.0
"""Scores, selection and masks of draft trees: the Triton kernel against the reference and against the host's code."""

import math
import random
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strata_mask_inputs import (
    KNOTS,
    NAN,
    assert_matches,
    build,
    chain,
    draft,
    eagle_parents,
    random_parents,
    star,
    survival_table,
)

from heterospec_vllm.kernels.gpu.strata_mask import StrataMask, StrataTables, strata_mask

SHAPES = {
    "none": (),
    "single": (-1,),
    "chain63": chain(63),
    "star63": star(63),
    "two levels": (-1, -1, 0, 0, 1, 1),
    "tree63": random_parents(63, 1),
    "beam": eagle_parents(8, 4),
}


@pytest.mark.parametrize("use_table", [True, False], ids=["table", "probability"])
@pytest.mark.parametrize("parents", SHAPES.values(), ids=SHAPES)
def test_shapes(device: torch.device, parents: tuple[int, ...], use_table: bool) -> None:
    assert_matches(build(device, [draft(parents)], use_table=use_table))


@pytest.mark.parametrize("max_nodes", [1, 5, 63])
def test_ragged_batch(device: torch.device, max_nodes: int) -> None:
    """Capacities that are no powers of two, some smaller than the trees, some larger."""
    drafts = [draft(parents, seed) for seed, parents in enumerate(SHAPES.values())]
    inputs = build(
        device,
        drafts,
        max_nodes=max_nodes,
        thresholds=[0.0, 0.1, 0.05, 0.3, 0.2, 0.0, 0.4],
        limits=[5, 1, 60, 7, 0, 30, 63],
        temperatures=[0, 1, 0, 1, 1, 0, 1],
    )
    got = assert_matches(inputs)
    assert got.num_nodes.max() == min(max_nodes, int(got.num_nodes.max()))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.integers(0, 70), max_size=4),
    max_nodes=st.integers(1, 63),
    max_depth=st.integers(1, 20),
    threshold=st.sampled_from([0.0, 0.01, 0.2, 0.99]),
    levels=st.sampled_from([1, 3, 1000]),
    use_table=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_random_batches(
    device: torch.device,
    sizes: list[int],
    max_nodes: int,
    max_depth: int,
    threshold: float,
    levels: int,
    use_table: bool,
    seed: int,
) -> None:
    """Few levels of probability make ties likely."""
    rng = random.Random(seed)
    drafts = []
    for size in sizes:
        local = tuple(-rng.randrange(1, levels + 1) / max(levels / 2, 1) for _ in range(size))
        drafts.append(draft(random_parents(size, rng.randrange(2**16)), seed, local))
    inputs = build(
        device,
        drafts,
        max_nodes=max_nodes,
        max_depth=max_depth,
        thresholds=[threshold] * len(sizes),
        limits=[rng.randrange(0, 64) for _ in sizes],
        temperatures=[rng.randrange(2) for _ in sizes],
        use_table=use_table,
    )
    got = assert_matches(inputs)
    assert_connected(got)


def assert_connected(got: StrataMask) -> None:
    """Parents first, masks are parents' masks plus the own bit, survivals fall."""
    for req, num_nodes in enumerate(got.num_nodes.tolist()):
        parents, masks = got.parents[req].tolist(), got.ancestor_mask[req].tolist()
        unsigned = [mask & (2**64 - 1) for mask in masks]
        assert parents[0] == -1 and unsigned[0] == 1
        for row in range(1, num_nodes + 1):
            assert 0 <= parents[row] < row
            assert unsigned[row] == unsigned[parents[row]] | 1 << row
            assert int(got.row_depths[req, row]) == unsigned[row].bit_count() - 1
        survivals = got.node_survivals[req, :num_nodes]
        assert (survivals.diff() <= 0).all() and (survivals > 0).all()


@pytest.mark.parametrize("use_table", [True, False], ids=["table", "probability"])
def test_ties_go_to_the_lower_column(device: torch.device, use_table: bool) -> None:
    """All equally likely, children as likely as their parents: expansion order, cut anywhere, stays connected."""
    parents = random_parents(20, 4)
    inputs = build(device, [draft(parents, local=(0.0,) * 20)], limits=[7], use_table=use_table)
    inputs.candidates.entropies.zero_()
    if use_table:
        inputs.tables.survival.fill_(0.5)  # type: ignore[union-attr]
    got = assert_matches(inputs)
    assert got.columns[0, :7].tolist() == list(range(7))
    assert_connected(got)


def test_survival_never_rises_along_a_path(device: torch.device) -> None:
    """A table that favours depth must not lift a child above its parent."""
    inputs = build(device, [draft(chain(5), local=(-0.5,) * 5)])
    rising = torch.linspace(0.1, 0.9, 3, device=device)
    inputs.tables.survival.copy_(rising[None, :, None, None].expand(2, 3, 4, 5))  # type: ignore[union-attr]
    got = assert_matches(inputs)
    torch.testing.assert_close(got.survivals[0, :5], torch.full((5,), 0.1, device=device))


@pytest.mark.parametrize("bad", [-math.inf, NAN])
def test_absent_candidates(device: torch.device, bad: float) -> None:
    """A candidate of probability 0, or a NaN of a poisoned head, is never selected, nor what hangs from it."""
    parents = (-1, -1, 0, 1, 3, 2)
    got = assert_matches(build(device, [draft(parents, local=(-0.1, bad, -0.2, -0.3, -0.1, -0.4))]))
    assert got.columns[0, :4].tolist() == [0, 2, 5, -1]
    assert (got.survivals[0, [1, 3, 4]] == 0).all()


def test_nothing_but_absent_candidates(device: torch.device) -> None:
    inputs = build(device, [draft(star(4), local=(-math.inf, NAN, -math.inf, NAN))])
    got = assert_matches(inputs)
    assert got.num_nodes.tolist() == [0]
    assert got.ancestor_mask[0].tolist() == [1] + [0] * 63


def test_entropies_on_and_beyond_the_edges(device: torch.device) -> None:
    """An edge belongs to the stratum below it; deeper paths use the last edges; NaN is the least certain."""
    parents = (-1, -1, -1, -1, -1, 0, 5, 6)
    one = replace(draft(parents), entropies=(0.3, 0.30001, 0.0, 9.0, NAN, 0.5, 0.2, 0.0))
    got = assert_matches(build(device, [one]))
    assert got.strata[0, :8].tolist() == [0, 1, 0, 3, 3, 0, 0, 0]


@pytest.mark.parametrize("log_prob", [-50.0, -6.0, -3.0, -2.9, -0.25, -0.1, 0.0, 0.5])
def test_interpolation(device: torch.device, log_prob: float) -> None:
    """Below the lowest knot, on knots, between them, above the highest."""
    inputs = build(device, [draft((-1,), local=(log_prob,))])
    inputs.candidates.entropies.zero_()
    got = assert_matches(inputs)
    cell = survival_table()[0, 0, 0].double().numpy()
    expected = float(np.interp(log_prob, KNOTS, cell))
    assert float(got.survivals[0, 0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0, math.inf, NAN])
def test_thresholds(device: torch.device, threshold: float) -> None:
    """A NaN threshold selects nothing."""
    inputs = build(device, [draft(random_parents(40))] * 2, thresholds=[threshold, 0.0])
    got = assert_matches(inputs)
    assert got.num_nodes[1] == 40
    if math.isnan(threshold) or threshold >= 1:
        assert got.num_nodes[0] == 0


def test_a_node_at_the_threshold_is_kept(device: torch.device) -> None:
    inputs = build(device, [draft(star(3), local=(-1.0, -2.0, -3.0))], use_table=False)
    second = inputs.run().survivals[0, 1]
    inputs.selection.thresholds.copy_(second)
    assert inputs.run().num_nodes.tolist() == [2]


@pytest.mark.parametrize("max_depth", [1, 2, 4, 5, 6])
def test_deeper_candidates_are_absent(device: torch.device, max_depth: int) -> None:
    inputs = build(device, [draft((*chain(6), -1, 0), local=(-0.1,) * 8)], max_depth=max_depth)
    got = assert_matches(inputs)
    assert int(got.num_nodes[0]) == max_depth + (1 if max_depth == 1 else 2)


def test_a_prefix_of_a_tree_keeps_its_rows(device: torch.device) -> None:
    """Lowering `num_nodes` later needs no new masks."""
    many = build(device, [draft(random_parents(50, 8))], limits=[50]).run()
    few = build(device, [draft(random_parents(50, 8))], limits=[20]).run()
    assert few.num_nodes.tolist() == [20]
    assert torch.equal(many.columns[:, :20], few.columns[:, :20])
    for name in ("parents", "row_depths", "ancestor_mask"):
        assert torch.equal(getattr(many, name)[:, :21], getattr(few, name)[:, :21])


def test_largest_pool(device: torch.device) -> None:
    parents = eagle_parents(10, 11, seed=2)
    assert len(parents) == 1010
    assert_connected(assert_matches(build(device, [draft(parents, 5)], max_depth=11, spare=14)))


def test_no_requests_and_no_columns(device: torch.device) -> None:
    assert build(device, []).run().num_nodes.shape == (0,)
    assert_matches(build(device, [draft(())], spare=0))


def test_equals_the_host(device: torch.device) -> None:
    """Strata, survivals, trees and masks are those of the modules that decide on the host (float64 there)."""
    pytest.importorskip("heterospec_vllm.policy.survival")
    from heterospec_vllm.policy.strata import DEFAULT_STRATA
    from heterospec_vllm.policy.survival import KNOTS as HOST_KNOTS
    from heterospec_vllm.policy.survival import NodeFeatures, SurvivalTables, along_paths
    from heterospec_vllm.tree.pool import CandidatePool
    from heterospec_vllm.tree.trees import DraftTrees

    drafts = [draft(eagle_parents(8, 3, seed), seed) for seed in range(3)]
    generator = np.random.default_rng(0)
    host = SurvivalTables()
    host.estimate = np.sort(generator.uniform(1e-3, 0.99, host.estimate.shape), axis=-1)
    inputs = build(device, drafts, temperatures=[0, 1, 0], limits=[63, 20, 5], spare=0)
    inputs.tables = StrataTables.of(
        DEFAULT_STRATA.edges, HOST_KNOTS.tolist(), torch.from_numpy(host.estimate), device
    )
    got = inputs.run()
    columns = {item.name: getattr(got, item.name).cpu().numpy() for item in fields(got)}
    log_probs, depths = columns["log_probs"], columns["depths"]
    parents = inputs.candidates.parents.cpu().numpy()
    strata = np.zeros_like(depths)
    for at in np.ndindex(depths.shape):
        strata[at] = DEFAULT_STRATA.of(depths[at], columns["path_entropies"][at])
    assert (strata == columns["strata"]).all()
    temperatures = np.broadcast_to(np.array([[0], [1], [0]]), log_probs.shape)
    own = host.predict(NodeFeatures(log_probs, depths, strata, temperatures))
    survivals = own.copy()
    for column in range(own.shape[1]):
        above = parents[:, column]
        of_parent = np.where(above >= 0, survivals[np.arange(3), np.maximum(above, 0)], 1.0)
        survivals[:, column] = along_paths(own[:, column], of_parent)
    np.testing.assert_allclose(columns["survivals"], survivals, rtol=1e-5, atol=1e-6)
    pool = CandidatePool(
        tokens=np.arange(log_probs.size).reshape(log_probs.shape),
        log_probs=log_probs,
        survivals=columns["survivals"],
        strata=strata.astype(np.int64),
        entropies=columns["path_entropies"],
        parents=parents.astype(np.int64),
        ranks=np.zeros(log_probs.shape, dtype=np.int64),
    )
    trees = DraftTrees.from_pool(pool, np.array([63, 20, 5]))
    trees.check()
    assert (trees.num_nodes == columns["num_nodes"]).all()
    width = trees.max_nodes + 1
    assert (trees.parents == columns["parents"][:, :width]).all()
    assert (trees.depths == columns["row_depths"][:, :width]).all()
    masks = columns["ancestor_mask"].view(np.uint64)[:, :width]
    rows = np.arange(width) <= trees.num_nodes[:, None]
    placed = trees.placed(np.zeros(trees.num_reqs, dtype=np.int64))
    assert (placed.ancestor_mask.view(np.uint64) == masks[rows]).all()
    assert not masks[~rows].any()


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "parents.dtype": ("candidates", {"parents": torch.zeros(1, 8, dtype=torch.int64)}),
    "parents.shape": ("candidates", {"parents": torch.zeros(1, 1025, dtype=torch.int32)}),
    "local_log_probs.shape": ("candidates", {"local_log_probs": torch.zeros(1, 7)}),
    "entropies.dtype": ("candidates", {"entropies": torch.zeros(1, 8, dtype=torch.float64)}),
    "entropies.stride": ("candidates", {"entropies": torch.zeros(1, 16)[:, ::2]}),
    "num_candidates.shape": ("candidates", {"num_candidates": torch.zeros(2, dtype=torch.int32)}),
    "thresholds.dtype": ("selection", {"thresholds": torch.zeros(1, dtype=torch.int32)}),
    "limits.shape": ("selection", {"limits": torch.zeros(3, dtype=torch.int32)}),
    "temperatures.dtype": ("selection", {"temperatures": torch.zeros(1)}),
    "edges.shape": ("tables", {"edges": torch.zeros(3)}),
    "knots.dtype": ("tables", {"knots": torch.zeros(5, dtype=torch.float64)}),
    "survival.shape": ("tables", {"survival": torch.zeros(2, 3, 3, 5)}),
    "out.columns.shape": ("out", {"columns": torch.zeros(1, 64, dtype=torch.int32)}),
    "out.ancestor_mask.shape": ("out", {"ancestor_mask": torch.zeros(1, 6, dtype=torch.int64)}),
    "out.log_probs.stride": ("out", {"log_probs": torch.zeros(8, 2).T[:1]}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(device: torch.device, move, name: str) -> None:
    inputs = build(device, [draft(star(6))], max_nodes=4)
    which, changed = BAD[name]
    arguments: dict[str, Any] = {
        "candidates": inputs.candidates,
        "tables": inputs.tables,
        "selection": inputs.selection,
        "out": inputs.poisoned(),
    }
    on_device = {key: move(value) for key, value in changed.items()}
    arguments[which] = replace(arguments[which], **on_device)
    with pytest.raises(ValueError, match=f"strata_mask: {name}"):
        strata_mask(**arguments, max_depth=8)


@pytest.mark.parametrize("max_depth", [0, 64])
def test_bad_depth_is_named(device: torch.device, max_depth: int) -> None:
    inputs = build(device, [draft(star(6))], max_depth=max_depth)
    with pytest.raises(ValueError, match="strata_mask: max_depth"):
        inputs.run()
