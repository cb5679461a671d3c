# SPDX-License-Identifier: Apache-2.0
"""The walk of draft trees: Triton against the reference, vLLM's own sampler and the distribution."""

import importlib.util
import math
import sys
import types
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_trees import from_parents
from scipy.stats import chisquare

from heterospec_vllm.kernels.gpu import tree_verify as kernel
from heterospec_vllm.kernels.reference import tree_verify as reference
from heterospec_vllm.kernels.reference.tree_verify import SamplingKeys, TreeBatch, TreeWalks
from heterospec_vllm.verify.walk import walk

pytestmark = pytest.mark.usefixtures("poisoned_scratch")
NAN = math.nan
POISON = -77
# A chi-square test with this threshold fails a right sampler once in 10^5 seeds; the seed is fixed.
MIN_P_VALUE = 1e-5

# Parents of each node; -1 never occurs: 0 is the root.
CHAIN = [0, 1, 2, 3]
STAR = [0, 0, 0, 0, 0]
BUSH = [0, 0, 1, 1, 3, 2]


@dataclass
class Case:
    logits: torch.Tensor
    trees: TreeBatch
    keys: SamplingKeys
    max_depth: int

    def fresh(self) -> TreeWalks:
        out = TreeWalks.allocate(len(self.trees.num_nodes), self.max_depth, self.logits.device)
        for field in fields(out):
            getattr(out, field.name).fill_(POISON)
        return out

    def run(self, apply_temperature: bool = True) -> TreeWalks:
        arguments = (self.logits, self.trees, self.keys)
        got = kernel.tree_verify(*arguments, self.fresh(), apply_temperature=apply_temperature)
        expected = reference.tree_verify_reference(
            *arguments, self.fresh(), apply_temperature=apply_temperature
        )
        for field in fields(got):
            assert torch.equal(getattr(got, field.name), getattr(expected, field.name)), field.name
        return got


def _trees(parents: list[list[int]], tokens: list[list[int]], device, num_rows=None) -> TreeBatch:
    """`num_rows`: rows of each request, where they are not all that its tree needs."""
    width = max((len(p) for p in parents), default=0)
    rows = [len(p) + 1 for p in parents] if num_rows is None else num_rows
    batch = TreeBatch(
        torch.tensor([0, *np.cumsum(rows)], dtype=torch.int32),
        torch.tensor([t + [-1] * (width - len(t)) for t in tokens], dtype=torch.int64).reshape(
            -1, width
        )
        if width
        else torch.zeros(len(tokens), 0, dtype=torch.int64),
        torch.tensor(
            [[-1, *p] + [-1] * (width - len(p)) for p in parents], dtype=torch.int32
        ).reshape(len(parents), width + 1),
        torch.tensor([len(p) for p in parents], dtype=torch.int32),
    )
    return TreeBatch(*(getattr(batch, f.name).to(device) for f in fields(batch)))


def _keys(trees: TreeBatch, temperature: list[float], seed: int = 0, spare: int = 0):
    """Request states are the requests backwards; rows have the positions that their depths give."""
    num_reqs = len(trees.num_nodes)
    device = trees.tokens.device
    generator = torch.Generator().manual_seed(seed)
    starts = trees.cu_num_logits.tolist()
    mapping, positions = [], []
    for req in range(num_reqs):
        parents = trees.parents[req].tolist()
        depths = [0] * (len(parents) + 1)
        for row in range(starts[req + 1] - starts[req]):
            depths[row] = depths[parents[row]] + 1 if row and parents[row] >= 0 else 0
            mapping.append(num_reqs - 1 - req)
            positions.append(10 + req + depths[row])
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_reqs,), generator=generator)
    return SamplingKeys(
        torch.tensor(mapping + [-1] * spare, dtype=torch.int32).to(device),
        torch.tensor(positions + [0] * spare, dtype=torch.int64).to(device),
        torch.tensor(temperature[::-1], dtype=torch.float32).reshape(num_reqs).to(device),
        seeds.to(device),
    )


def _greedy_case(device, parents, tokens, row_tokens, max_depth=4) -> Case:
    """One greedy request each whose rows' largest logits are at `row_tokens`."""
    trees = _trees(parents, tokens, device)
    flat = [token for rows in row_tokens for token in rows]
    logits = torch.nn.functional.one_hot(torch.tensor(flat), 12).float().to(device)
    return Case(logits, trees, _keys(trees, [0.0] * len(parents)), max_depth)


def test_empty_batch(device) -> None:
    case = _greedy_case(device, [[0]], [[1]], [[1, 2]])
    none = TreeBatch(*(getattr(case.trees, f.name)[:0] for f in fields(TreeBatch)))
    none = replace(none, cu_num_logits=torch.zeros(1, dtype=torch.int32, device=device))
    got = kernel.tree_verify(
        case.logits, none, case.keys, TreeWalks.allocate(0, 3, device), apply_temperature=True
    )
    assert got.num_sampled.numel() == 0


def test_empty_tree_and_no_rows(device) -> None:
    """A request without nodes emits one token; one without rows (a prefill chunk) emits none."""
    trees = _trees([[], []], [[], []], device, num_rows=[1, 0])
    logits = torch.nn.functional.one_hot(torch.tensor([7]), 12).float().to(device)
    got = Case(logits, trees, _keys(trees, [0.0, 0.0]), 2).run()
    assert got.sampled.tolist() == [[7, -1, -1], [-1, -1, -1]]
    assert got.num_sampled.tolist() == [1, 0]
    assert got.last_sampled.tolist() == [7, -1]


def test_all_accepted_and_all_rejected(device) -> None:
    case = _greedy_case(
        device,
        [CHAIN, CHAIN, STAR, BUSH],
        [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]],
        [[1, 2, 3, 4, 5], [9, 2, 3, 4, 5], [4, 0, 0, 0, 8, 0], [1, 4, 9, 9, 5, 6, 9]],
    )
    got = case.run()
    assert got.num_sampled.tolist() == [5, 1, 2, 3]
    assert got.rows.tolist()[2:] == [[0, 4, -1, -1, -1], [0, 1, 4, -1, -1]]
    assert got.sampled.tolist()[3] == [1, 4, 5, -1, -1]
    assert got.logits_rows.tolist()[3] == [16, 17, 20, -1, -1]
    assert got.last_sampled.tolist() == [5, 9, 8, 5]


def test_walk_ends_at_the_outputs_capacity(device) -> None:
    case = _greedy_case(device, [CHAIN], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], max_depth=2)
    got = case.run()
    assert got.sampled.tolist() == [[1, 2, 3]]
    assert got.last_sampled.tolist() == [3]


def test_tree_cut_to_the_rows_it_got(device) -> None:
    """The scheduler may schedule a prefix: nodes without a row are not there."""
    trees = _trees([CHAIN, CHAIN], [[1, 2, 3, 4], [1, 2, 3, 4]], device, num_rows=[3, 5])
    tokens = torch.tensor([1, 2, 3, 1, 2, 3, 4, 5])
    logits = torch.nn.functional.one_hot(tokens, 12).float().to(device)
    got = Case(logits, trees, _keys(trees, [0.0, 0.0]), 4).run()
    assert got.sampled.tolist() == [[1, 2, 3, -1, -1], [1, 2, 3, 4, 5]]


def test_corrupt_parents_end_the_walk(device) -> None:
    """A node that is its own ancestor can be reached once at most."""
    case = _greedy_case(device, [[1, 1]], [[1, 1]], [[1, 1, 1]], max_depth=9)
    assert case.run().num_sampled.tolist() == [1]


def test_ties_infinities_and_nan(device) -> None:
    """Across parts of the vocabulary too; a row without a number emits token 0."""
    logits = torch.full((6, 20_000), -math.inf, device=device)
    logits[0, [5, 9000, 19_999]] = 1.0
    logits[1, 19_999] = -3.0
    logits[3] = NAN
    logits[4, :2] = torch.tensor([NAN, 0.0])
    logits[5, [30, 8192]] = math.inf
    trees = _trees([[]] * 6, [[]] * 6, device)
    got = Case(logits, trees, _keys(trees, [0.0] * 6), 0).run()
    assert got.last_sampled.tolist() == [5, 19_999, 0, 0, 1, 30]
    # sampled: what is not finite still never wins
    got = Case(logits, trees, _keys(trees, [1.0] * 6), 0).run()
    assert got.last_sampled.tolist()[1:5] == [19_999, 0, 0, 1]
    assert got.last_sampled.tolist()[0] in (5, 9000, 19_999)


def test_rows_without_a_request_are_not_read(device) -> None:
    """Padding of a CUDA graph: NaN logits, mapping -1; strided logits behind it."""
    trees = _trees([[0, 0]], [[3, 4]], device)
    keys = _keys(trees, [0.0], spare=4)
    wide = torch.full((7, 40), NAN, device=device)
    wide[:3, :12] = torch.nn.functional.one_hot(torch.tensor([4, 1, 2]), 12).float().to(device)
    got = Case(wide[:, :12], trees, keys, 2).run()
    assert got.sampled.tolist() == [[4, 2, -1]]


@st.composite
def _forests(draw) -> tuple[list[list[int]], list[list[int]]]:
    """Ragged trees over a small vocabulary, siblings distinct, so that walks go somewhere."""
    parents, tokens = [], []
    for _ in range(draw(st.integers(1, 4))):
        above, drafted = [], []
        for node in range(draw(st.integers(0, 12))):
            parent = draw(st.integers(0, node))
            taken = {t for p, t in zip(above, drafted, strict=True) if p == parent}
            free = sorted(set(range(5)) - taken)
            if free:
                above.append(parent)
                drafted.append(draw(st.sampled_from(free)))
            else:
                break
        parents.append(above)
        tokens.append(drafted)
    return parents, tokens


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    forest=_forests(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
    apply_temperature=st.booleans(),
)
def test_equals_the_reference_and_the_cpu_walk(
    device, forest, dtype, seed, apply_temperature
) -> None:
    trees = _trees(*forest, device)
    num_reqs, num_rows = len(forest[0]), int(trees.cu_num_logits[-1])
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, 5, generator=generator).to(dtype).to(device)
    temperature = [[0.0, 0.6, 1.0][i % 3] for i in range(num_reqs)]
    case = Case(logits, trees, _keys(trees, temperature, seed), 12)
    got = case.run(apply_temperature)

    row_tokens = reference.sample_rows_reference(
        logits, case.keys, apply_temperature=apply_temperature
    ).numpy(force=True)
    starts = trees.cu_num_logits.numpy(force=True)
    arrays = from_parents(
        trees.tokens.numpy(force=True),
        trees.parents[:, 1:].long().numpy(force=True),
        np.zeros(trees.tokens.shape, dtype=np.int64),
        trees.num_nodes.long().numpy(force=True),
    )
    walked = walk(arrays, lambda reqs, rows, depth: row_tokens[starts[reqs] + rows])
    width = walked.rows.shape[1]
    assert got.rows[:, :width].tolist() == walked.rows.tolist()
    assert got.sampled[:, :width].tolist() == walked.tokens.tolist()
    assert got.num_sampled.tolist() == walked.num_emitted.tolist()


def test_largest_tree(device) -> None:
    """63 nodes as one chain, accepted whole, with a vocabulary of several parts."""
    tokens = [100 * i for i in range(63)]
    trees = _trees([list(range(63))], [tokens], device)
    logits = torch.zeros(64, 9000)
    logits[torch.arange(63), torch.tensor(tokens)] = 1.0
    case = Case(logits.to(device), trees, _keys(trees, [0.0]), 63)
    assert case.run().num_sampled.tolist() == [64]


def _vllm_gumbel(monkeypatch) -> types.ModuleType:
    """vLLM's own sampler, loaded alone: importing vLLM disables Triton where there is no GPU."""
    import triton
    import triton.language as tl

    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    path = Path(found.submodule_search_locations[0]) / "v1/worker/gpu/sample/gumbel.py"
    stand_in = types.ModuleType("vllm.triton_utils")
    stand_in.tl, stand_in.triton = tl, triton  # type: ignore[attr-defined]
    if "vllm" not in sys.modules:
        monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.triton_utils", stand_in)
    spec = importlib.util.spec_from_file_location("vllm_gumbel", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("apply_temperature", [True, False])
def test_tokens_are_those_of_vllms_sampler(device, monkeypatch, apply_temperature) -> None:
    """The same (seed, position, logits) give the same token: seeded output equals plain decoding's."""
    gumbel = _vllm_gumbel(monkeypatch)
    torch.manual_seed(4)
    trees = _trees([STAR, BUSH, []], [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], []], device)
    keys = _keys(trees, [0.8, 1.0, 0.0], seed=5)
    keys = replace(keys, positions=keys.positions * 10**6)
    logits = (torch.randn(14, 3001) * 2).to(device)
    plain = logits.clone()
    if apply_temperature:
        gumbel.apply_temperature(plain, keys.expanded_idx_mapping, keys.temperature)
    expected = gumbel.gumbel_sample(
        plain,
        keys.expanded_idx_mapping,
        keys.temperature,
        keys.seeds,
        keys.positions,
        apply_temperature=False,
        is_drafting=False,
    )
    sampled = reference.sample_rows_reference(logits, keys, apply_temperature=apply_temperature)
    assert torch.equal(sampled, expected)
    # every row as a root of its own, so that the kernel emits each row's token
    alone = _trees([[]] * 14, [[]] * 14, device)
    got = Case(logits, alone, keys, 0).run(apply_temperature)
    assert torch.equal(got.last_sampled, expected)


def test_samples_the_distribution(device) -> None:
    """Chi-square over seeds and positions; a tree is there, so emitted pairs are tested, not rows."""
    num_reqs, temperature = 150, 0.7
    torch.manual_seed(6)
    by_token = torch.randn(6, 6) / 2  # logits after each token; row 5 stands for the context
    trees = _trees([[0, 0]] * num_reqs, [[0, 1]] * num_reqs, device)
    logits = torch.stack([by_token[5], by_token[0], by_token[1]]).repeat(num_reqs, 1).to(device)
    case = Case(logits, trees, _keys(trees, [temperature] * num_reqs, seed=7), 1)
    sampled = case.run().sampled
    first = (by_token[5] / temperature).softmax(0)
    second = (by_token[0] / temperature).softmax(0)
    counts = torch.bincount(sampled[:, 0].cpu(), minlength=6)
    assert chisquare(counts, first.double() / first.double().sum() * num_reqs).pvalue > MIN_P_VALUE
    after = sampled[sampled[:, 0] == 0, 1].cpu()
    expected = second.double() / second.double().sum() * len(after)
    assert chisquare(torch.bincount(after, minlength=6), expected).pvalue > MIN_P_VALUE


def test_reference_samples_the_distribution() -> None:
    """Many more draws than the interpreter can make, over consecutive seeds and positions."""
    num_rows = 60_000
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, 0.5, -4.0])
    keys = SamplingKeys(
        torch.arange(num_rows, dtype=torch.int32) // 100,
        torch.arange(num_rows) % 100,
        torch.full((num_rows // 100,), 0.9),
        torch.arange(num_rows // 100) - 300,
    )
    tokens = reference.sample_rows_reference(
        logits.expand(num_rows, -1), keys, apply_temperature=True
    )
    expected = (logits.double() / 0.9).softmax(0) * num_rows
    assert chisquare(torch.bincount(tokens, minlength=6), expected).pvalue > MIN_P_VALUE


@pytest.mark.parametrize(
    ("record", "name", "value"),
    [
        ("trees", "tokens", torch.zeros(1, 2, dtype=torch.int32)),
        ("trees", "tokens", torch.zeros(1, 64, dtype=torch.int64)),
        ("trees", "parents", torch.zeros(1, 2, dtype=torch.int32)),
        ("trees", "parents", torch.zeros(1, 6, dtype=torch.int32)[:, ::2]),
        ("trees", "num_nodes", torch.zeros(2, dtype=torch.int32)),
        ("trees", "cu_num_logits", torch.zeros(1, dtype=torch.int32)),
        ("keys", "expanded_idx_mapping", torch.zeros(2, dtype=torch.int32)),
        ("keys", "positions", torch.zeros(3, dtype=torch.int32)),
        ("keys", "temperature", torch.zeros(1, dtype=torch.float64)),
        ("keys", "seeds", torch.zeros(2, dtype=torch.int64)),
        ("out", "sampled", torch.zeros(1, 4, dtype=torch.int32)),
        ("out", "rows", torch.zeros(1, 3, dtype=torch.int32)),
        ("out", "last_sampled", torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_names_the_wrong_argument(record, name, value) -> None:
    cpu = torch.device("cpu")
    trees = _trees([[0, 0]], [[3, 4]], cpu)
    records = {"trees": trees, "keys": _keys(trees, [0.0]), "out": TreeWalks.allocate(1, 3, cpu)}
    records[record] = replace(records[record], **{name: value})
    with pytest.raises(ValueError, match=rf"^{record}\.{name}: "):
        kernel.tree_verify(torch.zeros(3, 9), **records, apply_temperature=True)


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(3, 9, dtype=torch.int64), torch.zeros(9), torch.zeros(9, 3).T, torch.zeros(3, 0)],
)
def test_names_wrong_logits(logits) -> None:
    trees = _trees([[0, 0]], [[3, 4]], torch.device("cpu"))
    out = TreeWalks.allocate(1, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="^logits: "):
        kernel.tree_verify(logits, trees, _keys(trees, [0.0]), out, apply_temperature=True)
