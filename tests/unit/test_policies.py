# SPDX-License-Identifier: Apache-2.0
"""The policies over whole drafts of a made-up head: which nodes they expand, hand over and verify."""

import numpy as np
import pytest
from fake_drafter import Drafted, batch_of, depths_of, draft, step_costs
from hypothesis import given, settings
from hypothesis import strategies as st

from heterospec_vllm.policy.base import FixedPolicy, PlainPolicy
from heterospec_vllm.policy.cost import TOKEN_KNOTS, CostTable
from heterospec_vllm.policy.decisions import TreeShape, tree_shape
from heterospec_vllm.policy.marginal import MarginalPolicy
from heterospec_vllm.policy.paper import PaperPolicy
from heterospec_vllm.policy.survival import NodeFeatures

few = settings(max_examples=40, deadline=None)
SHAPE = TreeShape(num_nodes=16, max_depth=6, top_k=4)

SURE = np.array([0.96, 0.01, 0.01, 0.01])
FAIR = np.array([0.6, 0.2, 0.1, 0.05])
UNSURE = np.array([0.25, 0.22, 0.2, 0.18])


def each(*probs: np.ndarray):
    """A head that is equally sure of itself at every node of a request."""
    return lambda req, depth: probs[req]


def random_head(seed: int):
    def head(req: int, depth: int) -> np.ndarray:
        rng = np.random.default_rng([seed, req, depth])
        weights = rng.dirichlet(np.full(5, rng.choice([0.1, 1.0, 10.0])))
        return -np.sort(-weights[:4])

    return head


# ---- fixed trees


@few
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 16))
def test_a_static_tree_expands_exactly_the_beam(seed: int, depth: int, num_nodes: int) -> None:
    policy = FixedPolicy(TreeShape(num_nodes, depth, 4))
    drafted = draft(policy, batch_of(2), random_head(seed))
    assert depths_of(drafted) == [depth, depth]
    start = 0
    for chosen in drafted.expanded:
        scores = drafted.pool.log_probs[:, start : start + chosen.shape[1]]
        start += chosen.shape[1]
        for row, taken in zip(scores, chosen, strict=True):
            best = np.argsort(-row, kind="stable")[: min(4, num_nodes)]
            assert set(np.flatnonzero(taken)) == {i for i in best if row[i] > -np.inf}


def test_a_static_tree_is_cut_to_its_budget_and_the_limits() -> None:
    policy = FixedPolicy(SHAPE)
    batch = batch_of(3)
    batch.limits[:] = [0, 5, 63]
    drafted = draft(policy, batch, each(SURE, FAIR, UNSURE))
    assert drafted.trees.num_nodes.tolist() == [0, 5, 16]
    # Ranked by path probability.
    assert drafted.trees.survivals == pytest.approx(
        np.where(drafted.trees.survivals > 0, np.exp(drafted.trees.log_probs), 0), rel=1e-5
    )
    scheduled = np.array([0, 3, 16])
    assert (drafted.plan.keep(drafted.trees.survivals, scheduled, 900, 3, 0.0) == scheduled).all()


def test_a_chain_is_one_path() -> None:
    policy = FixedPolicy(tree_shape("chain", 16, 6, 8))
    drafted = draft(policy, batch_of(2), lambda req, depth: np.array([0.4]))
    assert drafted.trees.num_nodes.tolist() == [6, 6]
    assert drafted.trees.is_chain.all() and drafted.trees.max_depth == 6


def test_plain_drafts_nothing() -> None:
    assert PlainPolicy(SHAPE).scope(1, 0.0) == "none"
    assert FixedPolicy(SHAPE).scope(1, 0.0) == "all"


# ---- HeteroSpec's formulas

# Entropy of a path of six: SURE 1.2, FAIR 5.9, UNSURE 8.3.
EDGES = (2.0, 4.0, 7.0)


@pytest.mark.parametrize(
    ("first_index", "depths", "budgets"),
    [(0, [9, 7, 6], [7, 17, 16]), (1, [8, 6, 6], [6, 16, 16])],
)
def test_paper_goes_deeper_and_prunes_where_it_is_sure(
    first_index: int, depths: list[int], budgets: list[int]
) -> None:
    """N = 17 with the root, alpha = 3; strata 0, 2 and 3: 0.3 N rounded + 3 - i, N + 3 - i, N."""
    policy = PaperPolicy(SHAPE, EDGES, max_nodes=63, first_index=first_index)
    assert policy.plan(batch_of(1)).max_depth == 9
    for size in (3, 2, 3):  # nothing of a draft is left to the next
        drafted = draft(policy, batch_of(size), each(SURE, FAIR, UNSURE))
        assert depths_of(drafted) == depths[:size]
        assert drafted.trees.num_nodes.tolist() == budgets[:size]


def test_paper_stays_within_the_room_that_vllm_makes() -> None:
    policy = PaperPolicy(SHAPE, EDGES, max_nodes=16)
    batch = batch_of(2)
    batch.limits[:] = [3, 63]
    drafted = draft(policy, batch, each(SURE, FAIR))
    assert drafted.trees.num_nodes.tolist() == [3, 16]


def test_paper_without_low_strata_is_the_static_tree() -> None:
    never = (-3.0, -2.0, -1.0)
    paper = draft(PaperPolicy(SHAPE, never, max_nodes=63), batch_of(1), each(UNSURE))
    static = draft(FixedPolicy(SHAPE), batch_of(1), each(UNSURE))
    assert paper.trees.log_probs.tolist() == static.trees.log_probs.tolist()
    assert depths_of(paper) == depths_of(static)


def marginal(**costs: float) -> MarginalPolicy:
    policy = MarginalPolicy(SHAPE, step_costs(**costs))
    policy.gain_every = 1
    policy.switch.doubt = -np.inf  # predictions decide; test_switch.py measures
    return policy


def test_no_more_nodes_are_handed_over_than_there_are() -> None:
    batch, survivals = batch_of(2), np.array([[0.9, 0.0, 0.0], [0.9, 0.8, 0.7]])
    assert FixedPolicy(SHAPE).plan(batch).propose(survivals, 0.0).tolist() == [1, 3]
    free = marginal(node=0.0)
    assert free.plan(batch).propose(survivals, 0.0).tolist() == [1, 3]


@pytest.mark.parametrize("depth", [1, 2, 6])
@pytest.mark.parametrize("kind", ["static", "paper", "marginal"])
def test_a_poisoned_head_drafts_nothing(kind: str, depth: int) -> None:
    shape = TreeShape(16, depth, 4)
    policy = {
        "static": lambda: FixedPolicy(shape),
        "paper": lambda: PaperPolicy(shape, EDGES, max_nodes=16),
        "marginal": lambda: MarginalPolicy(shape, step_costs()),
    }[kind]()
    drafted = draft(policy, batch_of(2), each(np.full(4, np.nan), SURE))
    assert drafted.trees.num_nodes[0] == 0 and drafted.trees.num_nodes[1] > 0
    drafted = draft(policy, batch_of(1), each(np.full(4, np.nan)))
    assert drafted.trees.num_nodes.tolist() == [0]


# ---- the marginal policy: depth and nodes


def settled(policy: MarginalPolicy, *probs: np.ndarray, drafts: int = 60) -> Drafted:
    """The last of some drafts, when the policy knows what children are like."""
    for _ in range(drafts):
        drafted = draft(policy, batch_of(len(probs)), each(*probs), seconds=0.004)
    return drafted


def test_sure_requests_are_drafted_deeper_and_get_more_nodes() -> None:
    drafted = settled(marginal(node=0.001), SURE, UNSURE)
    sure, unsure = depths_of(drafted)
    assert sure >= 4 and unsure <= 2
    nodes = drafted.trees.num_nodes
    assert nodes[0] > nodes[1]


def test_cheap_nodes_are_all_taken_and_dear_ones_left() -> None:
    cheap = settled(marginal(node=1e-7, level=1e-7, row=1e-7), FAIR)
    assert cheap.trees.num_nodes.tolist() == [16]
    assert depths_of(cheap) == [6]
    some = settled(marginal(node=0.003), FAIR)
    assert 0 < some.trees.num_nodes[0] < 8
    dear = settled(marginal(node=0.05), FAIR)
    assert dear.trees.num_nodes.tolist() == [0]
    assert depths_of(dear) == [1]


def test_a_dear_level_is_not_started() -> None:
    assert depths_of(settled(marginal(level=0.0005), FAIR))[0] >= 3
    assert depths_of(settled(marginal(level=0.05), FAIR)) == [1]


def test_prefill_of_others_makes_the_step_verify_less() -> None:
    policy = marginal(node=0.0001)
    seconds = policy.costs.verify.seconds + 10.0 * (policy.costs.verify.knots > 32)  # a cliff
    policy.costs.verify = CostTable(TOKEN_KNOTS, seconds)
    drafted = settled(policy, FAIR)
    scheduled = drafted.trees.num_nodes
    survivals = drafted.trees.survivals
    assert scheduled[0] > 8
    assert drafted.plan.keep(survivals, scheduled, 1, 1, 100.0)[0] == scheduled[0]
    assert drafted.plan.keep(survivals, scheduled, 30, 2, 100.0)[0] == min(scheduled[0], 2)


# ---- the marginal policy: on and off


def off(policy: MarginalPolicy) -> MarginalPolicy:
    policy.gain = lambda num_reqs, context: 0.9  # type: ignore[method-assign]
    assert policy.scope(1, 0.0) == "none"
    return policy


def test_dear_nodes_turn_speculation_off_and_cheap_ones_on_again() -> None:
    policy = marginal(node=0.05)
    settled(policy, FAIR)
    assert [policy.scope(1, 100.0) for _ in range(10)] == ["none"] * 10
    policy.costs = step_costs(node=0.0005)
    assert policy.scope(1, 100.0) == "all"


def test_a_large_batch_is_decoded_plainly_where_nodes_cost_what_tokens_cost() -> None:
    policy = marginal(node=0.01, start=0.03)
    settled(policy, FAIR)
    assert policy.scope(1, 100.0) == "all"
    assert policy.scope(64, 6400.0) == "none"
    assert policy.scope(1, 100.0) == "all"


def test_an_unsure_head_turns_speculation_off() -> None:
    """The trees themselves say that they are worth less than they cost."""
    policy = marginal(node=0.004, level=0.002)
    assert policy.scope(1, 100.0) == "all"
    settled(policy, np.full(4, 0.02), drafts=100)
    assert policy.scope(1, 100.0) == "none"
    sure = marginal(node=0.004, level=0.002)
    settled(sure, SURE, drafts=100)
    assert sure.scope(1, 100.0) == "all"


# More than a probe drafts for: smaller batches are probed for some cycles in a row (test_switch.py).
LARGE = MarginalPolicy.probe_requests + 1


def test_probes_come_after_a_wait_that_doubles() -> None:
    policy = off(marginal())
    waits, since = [], 1
    for _ in range(6000):
        since += 1
        scope = policy.scope(LARGE, 0.0)
        if scope == "probe":
            waits.append(since)
            since = 0
        else:
            assert scope == "none"
    assert waits[:6] == [64, 128, 256, 512, 1024, 1024]


def test_the_wait_starts_over_when_speculation_was_on() -> None:
    policy = off(marginal())
    while policy.scope(LARGE, 0.0) != "probe":
        pass
    policy.gain = lambda num_reqs, context: 2.0  # type: ignore[method-assign]
    assert policy.scope(LARGE, 0.0) == "all"
    off(policy)
    assert [policy.scope(LARGE, 0.0) for _ in range(63)] == ["none"] * 62 + ["probe"]


def test_a_probe_verifies_a_few_nodes_whatever_they_cost() -> None:
    policy = off(marginal(node=0.05))
    while policy.scope(LARGE, 0.0) != "probe":
        pass
    batch = batch_of(2)
    batch.limits[:] = [1, 63]
    drafted = draft(policy, batch, each(FAIR, UNSURE), scope="probe")
    assert drafted.trees.num_nodes.tolist() == [1, policy.probe_nodes]
    scheduled = drafted.trees.num_nodes
    assert (drafted.plan.keep(drafted.trees.survivals, scheduled, 2, 2, 0.0) == scheduled).all()
    # The step after a probe is no probe.
    assert policy.scope(LARGE, 0.0) == "none"
    assert drafted.plan.keep(drafted.trees.survivals, scheduled, 2, 2, 0.0).tolist() == [0, 0]


def test_probes_of_a_better_head_bring_speculation_back() -> None:
    policy = marginal(node=0.004, level=0.002)
    settled(policy, np.full(4, 0.02), drafts=100)
    probes = 0
    for _ in range(5000):
        scope = policy.scope(1, 100.0)
        if scope == "all":
            break
        if scope == "probe":
            probes += 1
            draft(policy, batch_of(1), each(SURE), seconds=0.004, scope="probe")
    assert scope == "all" and 1 <= probes <= 4


def test_gains_within_the_band_change_nothing() -> None:
    gains = iter([1.01, 1.025] * 50)
    policy = marginal()
    policy.gain = lambda num_reqs, context: next(gains)  # type: ignore[method-assign]
    assert {policy.scope(1, 0.0) for _ in range(50)} == {"all"}
    policy.switch.on = False
    assert {policy.scope(1, 0.0) for _ in range(50)} == {"none"}


def test_the_gain_is_looked_at_now_and_then_and_when_the_batch_changes() -> None:
    policy = MarginalPolicy(SHAPE, step_costs())
    asked = []
    policy.gain = lambda num_reqs, context: asked.append(num_reqs) or 2.0  # type: ignore[method-assign]
    for num_reqs in (1, *[1] * 17, 2, 2, 1):
        assert policy.scope(num_reqs, 0.0) == "all"
    assert asked == [1, 1, 1, 2, 1]


# ---- learning


def test_a_head_that_is_sure_and_always_wrong_is_found_out() -> None:
    """Speculation goes off within 600 steps, and until then fewer and fewer nodes are verified."""
    policy = marginal(node=0.001)
    verified = []
    while policy.scope(1, 100.0) == "all" and len(verified) < 600:
        trees = draft(policy, batch_of(1), each(SURE), seconds=0.004).trees
        count = int(trees.num_nodes[0])
        verified.append(count)
        features = NodeFeatures(
            trees.log_probs[0, :count],
            trees.depths[0, 1 : count + 1],
            trees.strata[0, :count],
            np.zeros(count, dtype=np.int64),
        )
        policy.observe_nodes(features, np.zeros(count, dtype=np.float32))
    assert verified[0] >= 3 and len(verified) < 600
    assert verified[-1] <= 1


def test_times_reach_the_cost_tables() -> None:
    policy = marginal()
    costs = policy.costs
    before = [costs.step(8, 2, 100.0), costs.first_pass.at(4), costs.level.at(4)]
    policy.observe_step(8, 2, 100.0, 2 * before[0])
    policy.observe_first_pass(4, 2 * before[1])
    policy.observe_level(4, 2 * before[2])
    after = [costs.step(8, 2, 100.0), costs.first_pass.at(4), costs.level.at(4)]
    assert all(new > old for new, old in zip(after, before, strict=True))


# ---- any policy


@few
@given(
    st.sampled_from(["chain", "static", "paper", "marginal"]),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 20), min_size=1, max_size=3),
    st.tuples(st.integers(1, 24), st.integers(1, 5)),
    st.floats(1e-6, 0.05),
)
def test_whatever_is_chosen_is_a_connected_prefix_within_limits(
    kind: str, seed: int, limits: list[int], bounds: tuple[int, int], node: float
) -> None:
    shape = tree_shape(kind, *bounds, top_k=4)  # type: ignore[arg-type]
    most, deepest = shape.num_nodes, shape.max_depth
    policy = FixedPolicy(shape)
    if kind == "paper":
        policy, most = PaperPolicy(shape, EDGES, max_nodes=24), 24
        deepest += -(-deepest // 2)
    elif kind == "marginal":
        policy = MarginalPolicy(shape, step_costs(node=node))
    head = random_head(seed)
    rng = np.random.default_rng(seed)
    for step in range(3):
        scope = policy.scope(len(limits), 0.0)
        batch = batch_of(len(limits), num_decoding=len(limits) + step)
        batch.limits[:] = limits
        drafted = draft(
            policy, batch, lambda req, depth: head(req, depth)[: shape.top_k], scope=scope
        )
        trees = drafted.trees
        trees.check()
        assert (trees.num_nodes <= np.minimum(limits, most)).all()
        assert max(depths_of(drafted)) <= deepest and trees.max_depth <= deepest
        assert all((chosen.sum(axis=1) <= drafted.plan.beam).all() for chosen in drafted.expanded)
        scheduled = rng.integers(0, trees.num_nodes + 1)
        cut = trees.take(np.arange(len(limits)), scheduled)
        kept = drafted.plan.keep(cut.survivals, scheduled, 5, len(limits) + step, 0.0)
        assert ((kept >= 0) & (kept <= scheduled)).all()
        cut.take(np.arange(len(limits)), kept).laid_out().check()
