# SPDX-License-Identifier: Apache-2.0
"""Sampling on CPU in our kernel: token for token what vLLM's own sampler draws, seeds included."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from heterospec_vllm.kernels.cpu.library import is_available
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify import scorer_v1 as scorer_module
from heterospec_vllm.verify.scorer_v1 import TreeScorer, draws_as_vllm, has_rules, needs_sampler
from heterospec_vllm.verify.stops import Stops

pytestmark = pytest.mark.skipif(
    not (current_platform.is_cpu() and is_available()), reason="the kernel is a CPU's"
)

current_platform.import_kernels()


def metadata(temperatures: list[float], seeds: dict[int, int]) -> SamplingMetadata:
    """Of requests without anything but a temperature, some of them seeded."""
    none = torch.empty(0)
    return SamplingMetadata(
        temperature=torch.tensor(temperatures),
        all_greedy=not any(temperatures),
        all_random=all(temperatures),
        top_p=None,
        top_k=None,
        generators={i: torch.Generator().manual_seed(seed) for i, seed in seeds.items()},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none,
        output_token_ids=[[] for _ in temperatures],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperatures", [[1.0] * 6, [0.7, 0.0, 1.3, 0.0, 1.0, 0.2]])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_p": torch.tensor([0.9, 1.0, 0.2, 0.5, 0.99, 1e-6])},
        {"top_k": torch.tensor([1, 5000, 40, 7, 3, 1000], dtype=torch.int32)},
        {
            "top_p": torch.tensor([0.9, 1.0, 0.2, 0.5, 0.99, 0.8]),
            "top_k": torch.tensor([20, 5000, 40, 7, 3, 1000], dtype=torch.int32),
        },
    ],
)
def test_a_plain_step_is_vllms(dtype, temperatures, filters, monkeypatch) -> None:
    """Ours takes the generator of the process where a request has none, as vLLM's does: equal for equal seeds."""
    sampler = Sampler()
    ours = TreeScorer(sampler)
    logits = (4.0 * torch.randn((6, 5000), generator=torch.Generator().manual_seed(1))).to(dtype)
    given = {i: 100 + i for i, temperature in enumerate(temperatures) if temperature and i < 5}
    # vLLM's top-k changes its argument.
    mine, theirs = (
        replace(metadata(temperatures, given), **{k: v.clone() for k, v in filters.items()})
        for _ in range(2)
    )
    assert draws_as_vllm()  # which is a call of its own, once
    calls = []
    walk_cpu = scorer_module.walk_cpu
    monkeypatch.setattr(
        scorer_module,
        "walk_cpu",
        lambda *args, **named: calls.append(1) or walk_cpu(*args, **named),
    )
    kept = theirs.top_k
    for step in range(5):
        if kept is not None:
            theirs = replace(theirs, top_k=kept.clone())
        torch.manual_seed(step)
        got = ours.sample_plain(logits.clone(), mine)
        torch.manual_seed(step)
        want = sampler(logits=logits.clone(), sampling_metadata=theirs)
        assert torch.equal(got.sampled_token_ids, want.sampled_token_ids)
    assert len(calls) == 5
    for i in given:
        assert torch.equal(mine.generators[i].get_state(), theirs.generators[i].get_state())


def _chain(tokens: list[list[int]]) -> DraftTrees:
    """A chain of each request's tokens, all of one length."""
    num_reqs, length = len(tokens), len(tokens[0])
    empty = DraftTrees.empty(num_reqs)
    depths = np.arange(length + 1)
    return replace(
        empty,
        tokens=np.array(tokens),
        parents=np.tile(depths - 1, (num_reqs, 1)),
        depths=np.tile(depths, (num_reqs, 1)),
        num_nodes=np.full(num_reqs, length),
    )


def test_a_walk_draws_as_many_seeds_as_it_emits(monkeypatch) -> None:
    """In one call and with vLLM's sampler once a depth: the same tokens, generators in the same state."""
    ours = TreeScorer(Sampler())
    lengths = set()
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        logits = torch.randn((12, 6), generator=draw)
        trees = _chain(torch.randint(0, 6, (3, 3), generator=draw).tolist())
        for req in range(3):  # drafts that are often right
            logits[4 * req + torch.arange(3), torch.from_numpy(trees.tokens[req])] += 2.0
        mine, theirs = (metadata([1.0] * 3, {0: seed, 2: seed + 1}) for _ in range(2))
        one_call, output = ours.walk(trees, logits, mine)
        with monkeypatch.context() as patch:
            patch.setattr(TreeScorer, "_draws_alone", lambda *_: False)
            by_depth, _ = ours.walk(trees, logits, theirs)
        for req in (0, 2):
            np.testing.assert_array_equal(one_call.rows[req], by_depth.rows[req])
            np.testing.assert_array_equal(one_call.tokens[req], by_depth.tokens[req])
            states = (m.generators[req].get_state() for m in (mine, theirs))
            assert torch.equal(*states)
            lengths.add(int(one_call.num_emitted[req]))
        np.testing.assert_array_equal(output.sampled_token_ids.numpy(), one_call.tokens)
    assert lengths == {1, 2, 3, 4}


def test_a_walk_that_stops_inside_draws_no_seed_behind_the_stop(monkeypatch) -> None:
    """Each generator is where as many single draws as there are emitted tokens leave it, by both ways to walk."""
    ours = TreeScorer(Sampler())
    params = [SamplingParams(max_tokens=n, stop_token_ids=[2]) for n in (1, 2, 100)]
    inside = 0
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        logits = torch.randn((12, 6), generator=draw)
        trees = _chain(torch.randint(0, 6, (3, 3), generator=draw).tolist())
        for req in range(3):
            logits[4 * req + torch.arange(3), torch.from_numpy(trees.tokens[req])] += 4.0
        outputs = np.zeros(3, dtype=np.int64)
        stops = Stops(params, outputs, outputs + 5, 100, lambda _: [])
        whole, _ = ours.walk(trees, logits, metadata([1.0] * 3, dict.fromkeys(range(3), seed)))
        for alone in (True, False):
            given = metadata([1.0] * 3, dict.fromkeys(range(3), seed))
            with monkeypatch.context() as patch:
                if not alone:
                    patch.setattr(TreeScorer, "_draws_alone", lambda *_: False)
                walked, output = ours.walk(trees, logits, given, stops)
            expected = stops.cut(whole)
            np.testing.assert_array_equal(walked.tokens, expected.tokens)
            np.testing.assert_array_equal(output.sampled_token_ids.numpy(), walked.tokens)
            for req, count in enumerate(walked.num_emitted.tolist()):
                fresh = torch.Generator().manual_seed(seed)
                for _ in range(count):
                    torch.randint(0, 2**31, (1,), generator=fresh)
                assert torch.equal(fresh.get_state(), given.generators[req].get_state())
        inside += int((expected.num_emitted < whole.num_emitted).sum())
    assert inside > 30


@pytest.mark.parametrize(
    "asked",
    [
        {"max_num_logprobs": 2},
        {"no_penalties": False},
        {"bad_words_token_ids": {0: [[1]]}},
        {"allowed_token_ids_mask": torch.zeros((1, 6), dtype=torch.bool)},
        {"logprob_token_ids": {0: [1]}},
    ],
)
def test_whatever_else_is_asked_for_goes_to_vllms_sampler(asked) -> None:
    ours, plain = TreeScorer(Sampler()), metadata([1.0], {})
    assert not needs_sampler(plain) and not has_rules(plain) and ours._draws_alone(plain, None)
    assert not ours._draws_alone(replace(plain, **asked), None)


def test_a_vllm_that_draws_otherwise_keeps_its_sampler(monkeypatch) -> None:
    """What noise a seed gives is vLLM's own affair: a version that changes it is asked itself."""
    sampler = Sampler()
    ours = TreeScorer(sampler)
    sampled, greedy = metadata([1.0], {}), metadata([0.0], {})
    assert draws_as_vllm() and ours._draws_alone(sampled, None)
    other = SimpleNamespace(fused_gumbel_argmax=lambda logits, seeds: logits.argmax(dim=-1))
    draws_as_vllm.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(scorer_module.torch.ops, "_C", other)
        assert not ours._draws_alone(sampled, None)
        assert ours._draws_alone(greedy, None)
    draws_as_vllm.cache_clear()
