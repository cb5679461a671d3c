# SPDX-License-Identifier: Apache-2.0
"""Penalties, bad words, minimum lengths, biases, allowed tokens and masks: the walk against vLLM's own sampler.

Both ways to walk are compared: the one C++ call, and vLLM's sampler once a depth. The reference walks token by token as
plain decoding does: every row goes through vLLM's sampler with the request's whole past.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from heterospec_vllm.arrays import NO_ROW
from heterospec_vllm.kernels.cpu.library import is_available
from heterospec_vllm.kernels.cpu.walk import num_words_of
from heterospec_vllm.tree.masks import TokenMasks
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify.rules import UNUSED, RequestRules, has_rules
from heterospec_vllm.verify.scorer_v1 import RowChanges, TreeScorer, draws_as_vllm, put_masks

pytestmark = pytest.mark.skipif(
    not (current_platform.is_cpu() and is_available()), reason="the kernel is a CPU's"
)
current_platform.import_kernels()

DEVICE = torch.device("cpu")


def params_of(draw: np.random.Generator, vocab_size: int, sampled: bool) -> SamplingParams:
    """Some of the features, each with some probability."""

    def some(value):
        return value if draw.random() < 0.5 else None

    tokens = [int(t) for t in draw.integers(0, vocab_size, 12)]
    params = SamplingParams(
        temperature=float(draw.choice([0.3, 0.7, 1.0, 1.6])) if sampled else 0.0,
        repetition_penalty=some(float(draw.choice([1.1, 0.8, 2.0]))) or 1.0,
        presence_penalty=some(float(draw.choice([0.6, -1.0]))) or 0.0,
        frequency_penalty=some(float(draw.choice([0.3, 1.7]))) or 0.0,
        min_tokens=some(int(draw.integers(1, 9))) or 0,
        stop_token_ids=tokens[:2],
        logit_bias=some({t: float(draw.normal()) * 5 for t in tokens[2:5]}),
        allowed_token_ids=some(sorted({int(t) for t in draw.integers(0, vocab_size, 40)})),
        ignore_eos=True,
    )
    # What vLLM's tokenizer makes of `bad_words`.
    params._bad_words_token_ids = some([[tokens[5]], tokens[6:8], tokens[8:11]])
    return params


def metadata_of(
    params: list[SamplingParams],
    prompts: list[list[int]],
    outputs: list[list[int]],
    vocab_size: int,
    generators: dict[int, torch.Generator],
) -> SamplingMetadata:
    """As vLLM's input batch makes it of these requests."""
    added = [(i, p, prompts[i], outputs[i]) for i, p in enumerate(params)]
    update = BatchUpdate(batch_size=len(params), removed=[], added=added, moved=[])
    bias = LogitBiasLogitsProcessor(None, DEVICE, False)
    least = MinTokensLogitsProcessor(None, DEVICE, False)
    for processor in (least, bias):
        processor.update_state(update)
    padded = [one + [vocab_size] * (max(map(len, prompts)) - len(one)) for one in prompts]
    disallowed = torch.zeros((len(params), vocab_size), dtype=torch.bool)
    for row, one in zip(disallowed, params, strict=True):
        if one.allowed_token_ids:
            row[:] = True
            row[one.allowed_token_ids] = False
    penalties = [
        torch.tensor([getattr(one, f"{name}_penalty") for one in params])
        for name in ("frequency", "presence", "repetition")
    ]
    temperatures = torch.tensor([one.temperature for one in params])
    return SamplingMetadata(
        temperature=temperatures,
        all_greedy=not temperatures.any(),
        all_random=bool(temperatures.all()),
        top_p=None,
        top_k=None,
        generators=generators,
        max_num_logprobs=None,
        no_penalties=all(p.eq(n).all() for p, n in zip(penalties, (0, 0, 1), strict=True)),
        prompt_token_ids=torch.tensor(padded),
        frequency_penalties=penalties[0],
        presence_penalties=penalties[1],
        repetition_penalties=penalties[2],
        output_token_ids=outputs,
        allowed_token_ids_mask=disallowed if disallowed.any() else None,
        bad_words_token_ids={
            i: p.bad_words_token_ids for i, p in enumerate(params) if p.bad_words_token_ids
        },
        logitsprocs=LogitsProcessors([least, bias]),
        spec_token_ids=[[9] * 3 for _ in params],  # what the scheduler took for a path
    )


class Case:
    """A batch with trees whose nodes are often right, since few tokens are likely."""

    def __init__(self, seed: int, vocab_size: int, num_reqs: int, dtype: torch.dtype) -> None:
        draw = np.random.default_rng(seed)
        self.vocab_size = vocab_size
        self.likely = draw.integers(0, vocab_size, 4)
        sampled = draw.random(num_reqs) < 0.6
        self.params = [params_of(draw, vocab_size, bool(s)) for s in sampled]
        if draw.random() < 0.3:  # an ordinary request among the others
            self.params[0] = SamplingParams(temperature=self.params[0].temperature)
        self.prompts = [self._tokens(draw, int(draw.integers(1, 30))) for _ in self.params]
        self.outputs = [self._tokens(draw, int(draw.integers(0, 20))) for _ in self.params]
        self.num_nodes = draw.integers(0, 8, num_reqs)
        self.trees = self._trees(draw)
        num_rows = int(self.num_nodes.sum()) + num_reqs
        logits = draw.normal(size=(num_rows, vocab_size)) * 2
        logits[:, self.likely] += 6
        self.logits = torch.from_numpy(logits).to(dtype)
        self.seeds = draw.integers(0, 2**31, num_reqs).tolist()
        of_row = np.where(draw.random(num_rows) < 0.3, np.arange(num_rows), NO_ROW)
        bits = draw.integers(-(2**31), 2**31, (num_rows, num_words_of(vocab_size)))
        self.masks = TokenMasks(bits.astype(np.int32), of_row.astype(np.int32))

    def _tokens(self, draw: np.random.Generator, count: int) -> list[int]:
        rare = draw.integers(0, self.vocab_size, count)
        return np.where(draw.random(count) < 0.5, draw.choice(self.likely, count), rare).tolist()

    def _trees(self, draw: np.random.Generator) -> DraftTrees:
        num_reqs, most = self.num_nodes.size, int(self.num_nodes.max(initial=0))
        parents = np.full((num_reqs, most + 1), NO_ROW)
        tokens = np.full((num_reqs, most), NO_ROW)
        depths = np.zeros((num_reqs, most + 1), dtype=np.int64)
        for req, count in enumerate(self.num_nodes.tolist()):
            taken: set[tuple[int, int]] = set()
            for node in range(1, count + 1):
                while True:
                    parent = int(draw.integers(max(0, node - 3), node))
                    token = int(draw.choice(self.likely))
                    if (parent, token) not in taken:
                        break
                    token = int(draw.integers(0, self.vocab_size))
                    if (parent, token) not in taken:
                        break
                taken.add((parent, token))
                parents[req, node], tokens[req, node - 1] = parent, token
                depths[req, node] = depths[req, parent] + 1
        return replace(
            DraftTrees.empty(num_reqs),
            tokens=tokens,
            parents=parents,
            depths=depths,
            num_nodes=self.num_nodes,
        )

    def generators(self) -> dict[int, torch.Generator]:
        return {
            i: torch.Generator().manual_seed(seed)
            for i, seed in enumerate(self.seeds)
            if self.params[i].temperature
        }

    def metadata(self) -> SamplingMetadata:
        return metadata_of(
            self.params, self.prompts, self.outputs, self.vocab_size, self.generators()
        )

    def changes(self) -> RowChanges:
        rules = [
            RequestRules(p, prompt, self.vocab_size) if has_rules(p) else None
            for p, prompt in zip(self.params, self.prompts, strict=True)
        ]
        self.kept = rules  # what is packed points into them
        pairs = zip(rules, self.outputs, strict=True)
        packed = b"".join(UNUSED if r is None else r.packed(tokens) for r, tokens in pairs)
        return RowChanges(packed, self.masks)

    def plain(self, req: int) -> list[int]:
        """What plain decoding emits at the rows that its own tokens lead to."""
        logits = self.logits.clone()
        put_masks(logits, self.masks)
        first = int((self.num_nodes[:req] + 1).sum())
        own = self.generators().get(req)
        generators = {} if own is None else {0: own}
        outputs, row, emitted = [list(self.outputs[req])], 0, []
        while True:
            metadata = metadata_of(
                [self.params[req]], [self.prompts[req]], outputs, self.vocab_size, generators
            )
            output = Sampler()(
                logits=logits[first + row : first + row + 1].clone(), sampling_metadata=metadata
            )
            token = int(output.sampled_token_ids[0, 0])
            emitted.append(token)
            outputs[0].append(token)
            children = np.flatnonzero(
                (self.trees.parents[req, 1:] == row) & (self.trees.tokens[req] == token)
            )
            if not children.size:
                return emitted
            row = int(children[0]) + 1


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.sampled_from([33, 64, 515]),
    num_reqs=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_walk_emits_what_plain_decoding_would(seed, vocab_size, num_reqs, dtype) -> None:
    assert draws_as_vllm()
    case = Case(seed, vocab_size, num_reqs, dtype)
    before = [list(tokens) for tokens in case.outputs]
    want = [case.plain(req) for req in range(num_reqs)]
    for alone in (True, False):
        ours = TreeScorer(Sampler())
        if not alone:
            ours._draws_alone = lambda *_: False  # type: ignore[method-assign]
        walked, output = ours.walk(
            case.trees,
            case.logits.clone(),
            case.metadata(),
            changes=case.changes(),
            outputs=case.outputs,
        )
        assert case.outputs == before, "the lists are vLLM's to write"
        for req, emitted in enumerate(want):
            got = walked.tokens[req, : walked.num_emitted[req]].tolist()
            assert got == emitted, (alone, req, case.params[req])
        np.testing.assert_array_equal(output.sampled_token_ids.numpy(), walked.tokens)


def test_the_cases_go_deep() -> None:
    """The test above would see little if walks ended at their roots."""
    lengths = [len(case.plain(0)) for case in (Case(s, 64, 1, torch.float32) for s in range(40))]
    assert sum(length > 1 for length in lengths) > 8 and max(lengths) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_without_drafts(dtype) -> None:
    for seed in range(20):
        case = Case(seed, 130, 4, dtype)
        first = np.cumsum(case.num_nodes + 1) - case.num_nodes - 1
        roots = case.logits[torch.from_numpy(first)]
        masks = TokenMasks(case.masks.bits, case.masks.of_row[first])
        changes = RowChanges(case.changes().rules, masks)
        got = TreeScorer(Sampler()).sample_plain(roots.clone(), case.metadata(), changes)
        want = [case.plain(req)[0] for req in range(4)]
        assert got.sampled_token_ids[:, 0].tolist() == want


def test_counts_are_kept_token_by_token() -> None:
    """A request that was followed for long equals one that is new."""
    case = Case(3, 64, 1, torch.float32)
    params = SamplingParams(temperature=0.0, frequency_penalty=1.3, repetition_penalty=1.2)
    case.params = [params]
    rules = RequestRules(params, case.prompts[0], 64)
    for count in range(200):
        rules.packed([t % 64 for t in range(count)])
    case.outputs = [[t % 64 for t in range(200)]]
    packed = RowChanges(rules.packed(case.outputs[0]), case.masks)
    walks = [
        TreeScorer(Sampler()).walk(
            case.trees, case.logits, case.metadata(), changes=changes, outputs=case.outputs
        )[0]
        for changes in (packed, case.changes())
    ]
    assert walks[0].tokens.tolist() == walks[1].tokens.tolist()
    assert walks[0].tokens[0, : walks[0].num_emitted[0]].tolist() == case.plain(0)
