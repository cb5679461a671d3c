# SPDX-License-Identifier: Apache-2.0
"""TreeScorer: one step's trees on the target - how they are walked, how KV is compacted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from heterospec_vllm.arrays import Ints
from heterospec_vllm.kernels.cpu.argmax_rows import argmax_rows_cpu
from heterospec_vllm.kernels.cpu.kv_compact import kv_compact_cpu
from heterospec_vllm.kernels.cpu.library import is_available
from heterospec_vllm.kernels.cpu.walk import walk_cpu
from heterospec_vllm.kernels.reference import cpu as reference
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify.compact import KVMoves, plan_moves
from heterospec_vllm.verify.stops import Stops
from heterospec_vllm.verify.walk import Walk, walk

logger = init_logger(__name__)


class TreeScorer:
    """Walks and compacts the trees of one batch at a time; holds no state between steps."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def sample_plain(
        self,
        logits: torch.Tensor,  # [num_reqs, vocab_size]
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """One token a request, no drafts: vLLM's sampler, or the same tokens without a float32 copy."""
        if not self._reads_logits_alone(sampling_metadata):
            with CLOCK.span("sampling"):
                return self.sampler(logits=logits, sampling_metadata=sampling_metadata)
        if sampling_metadata.all_greedy:
            tokens = argmax_rows(logits, torch.arange(logits.shape[0]))
        else:
            num_reqs = logits.shape[0]
            trees = DraftTrees.empty(num_reqs)
            tokens = torch.from_numpy(
                walk_logits(trees, logits, np.arange(num_reqs), sampling_metadata).tokens[:, 0]
            )
        return SamplerOutput(sampled_token_ids=tokens.int()[:, None], logprobs_tensors=None)

    def _reads_logits_alone(self, metadata: SamplingMetadata) -> bool:
        """Whether :func:`is_plain` holds and we can draw what vLLM's sampler would."""
        if not is_plain(metadata):
            return False
        sampler = self.sampler.topk_topp_sampler
        return metadata.all_greedy or (
            not sampler.use_fp64_gumbel
            and sampler.forward == sampler.forward_cpu
            and draws_as_vllm()
        )

    def walk(
        self,
        trees: DraftTrees,
        logits: torch.Tensor,  # [num_logits, vocab_size], each request's root and nodes in row order
        sampling_metadata: SamplingMetadata,
        stops: Stops | None = None,
    ) -> tuple[Walk, SamplerOutput]:
        """Walk the batch with the target's own samples up to where requests stop, in vLLM's padded spec-decode form.

        Only visited rows are looked at, and a seeded request draws exactly one seed for every token it emits, as
        without speculation. Where tokens follow from logits, temperature, top-k and top-p, the whole walk is one
        call; otherwise vLLM's sampler runs once a depth.
        """
        first_row = root_logits(trees.num_nodes)
        if self._reads_logits_alone(sampling_metadata):
            walked = walk_logits(trees, logits, first_row, sampling_metadata, stops)
            return walked, _sampler_output(walked, None)
        levels: list[_SampledLevel] = []

        def sample(reqs: Ints, rows: Ints, depth: int) -> Ints:
            level = self._sample_level(logits, first_row, reqs, rows, depth, sampling_metadata)
            levels.append(level)
            return level.tokens

        walked = walk(trees, sample, None if stops is None else stops.have_stopped)
        return walked, _sampler_output(walked, _stitch_logprobs(walked, levels))

    def _sample_level(
        self,
        logits: torch.Tensor,
        first_row: Ints,
        reqs: Ints,
        rows: Ints,
        depth: int,
        metadata: SamplingMetadata,
    ) -> _SampledLevel:
        """vLLM's sampler on the rows visited at one depth."""
        at = first_row.copy()
        at[reqs] += rows
        if depth > 0:
            metadata = _for_deeper_levels(metadata, reqs)
            if not _rows_are_bound(metadata):
                metadata = _subset(metadata, reqs)
                at = at[reqs]
        with CLOCK.span("sampling"):
            output = self.sampler(logits=logits[torch.from_numpy(at)], sampling_metadata=metadata)
        picked = slice(None) if at.size == reqs.size else reqs
        tokens = output.sampled_token_ids.view(-1).numpy().astype(np.int64)[picked]
        logprobs = output.logprobs_tensors
        if logprobs is not None and at.size != reqs.size:
            index = torch.from_numpy(reqs)
            logprobs = LogprobsTensors(*(None if t is None else t[index] for t in logprobs[:3]))
        return _SampledLevel(reqs, tokens, logprobs)

    def compact(
        self,
        walked: Walk,
        root_rows: Ints,  # [num_reqs] token row of each request's root in the step
        slot_mapping: torch.Tensor,  # [num_step_tokens] int64
        kv_caches: list[
            torch.Tensor
        ],  # target layers, each [num_blocks, num_kv_heads, block_size, 2 * head_size]
        isa: str,  # vLLM's name of their layout
    ) -> KVMoves:
        """Bring the accepted rows' keys and values into the slots that follow the context."""
        moves = plan_moves(walked, root_rows)
        if moves.num_moves:
            kv_compact_cpu(
                kv_caches,
                slot_mapping[torch.from_numpy(moves.sources)],
                slot_mapping[torch.from_numpy(moves.targets)],
                isa=isa,
            )
        return moves


def root_logits(
    num_nodes: Ints,  # [num_reqs]
) -> Ints:
    """[num_reqs] each root's row of the logits; those of its nodes follow."""
    first_row = np.zeros(num_nodes.size, dtype=np.int64)
    np.cumsum(num_nodes[:-1] + 1, out=first_row[1:])
    return first_row


def argmax_rows(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[num_rows] the token with the largest logit of each named row, as vLLM's greedy sampling picks it."""
    with CLOCK.span("sampling"):
        return (argmax_rows_cpu if is_available() else reference.argmax_rows)(logits, rows)


def walk_logits(
    trees: DraftTrees,
    logits: torch.Tensor,  # [num_logits, vocab_size]
    first_row: Ints,  # [num_reqs] the root's row of the logits
    metadata: SamplingMetadata | None = None,  # None: all are greedy
    stops: Stops | None = None,
) -> Walk:
    """`verify.walk` where :func:`is_plain` holds; one call where the library is there."""
    greedy = metadata is None or metadata.all_greedy
    if not is_available():
        assert greedy
        return walk(
            trees,
            lambda reqs, rows, _: argmax_rows(
                logits, torch.from_numpy(first_row[reqs] + rows)
            ).numpy(),
            None if stops is None else stops.have_stopped,
        )
    first, parents, tokens = map(torch.from_numpy, (first_row, trees.parents, trees.tokens))
    width = trees.max_depth + 1
    seeds = None
    sampling: tuple[Any, ...] = ()
    if not greedy:
        assert metadata is not None and metadata.temperature is not None
        seeds = _Seeds(trees.num_reqs, width, metadata.generators)
        sampling = (metadata.temperature, seeds.values, metadata.top_k, metadata.top_p)
    with CLOCK.span("sampling"):
        found = walk_cpu(logits, first, parents, tokens, width, *sampling)
        walked = Walk(*(values.numpy() for values in found))
        if stops is not None:
            walked = stops.cut(walked)
        if seeds is not None:
            seeds.give_back(walked.num_emitted)
    return walked


@cache
def draws_as_vllm() -> bool:
    """Whether our kernel draws from a seed what the installed vLLM does: the noise is no promise of vLLM's."""
    op = getattr(torch.ops._C, "fused_gumbel_argmax", None)
    if op is None or not is_available():
        return False
    logits = 3.0 * torch.randn((16, 517), generator=torch.Generator().manual_seed(0))
    seeds = torch.arange(16)
    trees = DraftTrees.empty(16)
    parents, tokens = map(torch.from_numpy, (trees.parents, trees.tokens))
    _, drawn, _ = walk_cpu(logits, seeds, parents, tokens, 1, torch.ones(16), seeds[:, None])
    alike = torch.equal(drawn[:, 0], op(logits, seeds))
    if not alike:
        logger.info("heterospec: vLLM's sampler draws other samples than ours, so it is called.")
    return alike


class _Seeds:
    """One for every depth that a request may reach; those that were not used are given back to its generator."""

    def __init__(self, num_reqs: int, width: int, generators: dict[int, torch.Generator]) -> None:
        self.values = _seeds((num_reqs, width), None)  # [num_reqs, width]
        self._generators = generators
        self._states = {}
        for req, generator in generators.items():
            if width > 1:
                self._states[req] = generator.get_state()
            self.values[req] = _seeds((width,), generator)

    def give_back(
        self,
        used: Ints,  # [num_reqs]
    ) -> None:
        width = self.values.shape[1]
        for req, state in self._states.items():
            count = int(used[req])
            if count < width:
                self._generators[req].set_state(state)
                _seeds((count,), self._generators[req])


def _seeds(shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
    """As vLLM's sampler draws them on CPU; several from a generator are those of as many single draws."""
    return torch.randint(0, 2**31, shape, generator=generator, dtype=torch.long)


class _SampledLevel:
    """Requests sampled at one depth, their tokens and logprobs."""

    __slots__ = ("logprobs", "reqs", "tokens")

    def __init__(self, reqs: Ints, tokens: Ints, logprobs: LogprobsTensors | None) -> None:
        self.reqs = reqs
        self.tokens = tokens
        self.logprobs = logprobs


def is_plain(metadata: SamplingMetadata) -> bool:
    """Whether a row's token is the argmax of its raw logits or a sample by temperature, top-k and top-p alone."""
    holder = metadata.thinking_budget_state_holder
    sampled = not metadata.all_greedy
    processors = metadata.logitsprocs
    return (
        metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and metadata.no_penalties
        and not metadata.bad_words_token_ids
        and metadata.allowed_token_ids_mask is None
        and not any(_is_active(p) for p in processors.non_argmax_invariant)
        and not (sampled and any(_is_active(p) for p in processors.argmax_invariant))
        and not (holder is not None and holder.has_tracked_requests())
    )


def _is_active(processor: object) -> bool:
    """Whether a built-in logits processor touches any request of the batch (unknown ones always may)."""
    for attribute in ("biases", "min_toks"):
        if hasattr(processor, attribute):
            return bool(getattr(processor, attribute))
    count = getattr(processor, "min_p_count", None)
    return True if count is None else bool(count)


def _for_deeper_levels(metadata: SamplingMetadata, reqs: Ints) -> SamplingMetadata:
    """Below the root only speculating requests are sampled: no path-dependent rules, only their generators."""
    active = set(reqs.tolist())
    return replace(
        metadata,
        generators={i: g for i, g in metadata.generators.items() if i in active},
        no_penalties=True,
        bad_words_token_ids={},
        thinking_budget_state_holder=None,
    )


def _rows_are_bound(metadata: SamplingMetadata) -> bool:
    """Whether some rule is keyed by the row's place in the batch, so that rows must stay where they are."""
    processors = (
        *metadata.logitsprocs.argmax_invariant,
        *metadata.logitsprocs.non_argmax_invariant,
    )
    return (
        any(_is_active(p) for p in processors)
        or metadata.allowed_token_ids_mask is not None
        or bool(metadata.logprob_token_ids)
    )


def _subset(metadata: SamplingMetadata, reqs: Ints) -> SamplingMetadata:
    index = torch.from_numpy(reqs)

    def rows(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[index]

    place = {int(req): i for i, req in enumerate(reqs)}
    return replace(
        metadata,
        temperature=rows(metadata.temperature),
        top_p=rows(metadata.top_p),
        top_k=rows(metadata.top_k),
        generators={place[i]: g for i, g in metadata.generators.items()},
        logitsprocs=type(metadata.logitsprocs)(),
    )


def _sampler_output(walked: Walk, logprobs: LogprobsTensors | None) -> SamplerOutput:
    tokens = torch.from_numpy(walked.tokens.astype(np.int32))
    return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)


def _stitch_logprobs(walked: Walk, levels: list[_SampledLevel]) -> LogprobsTensors | None:
    """Per-depth logprobs laid out as vLLM's parse_output expects: ``num_reqs * max_emitted`` rows."""
    if levels[0].logprobs is None:
        return None
    num_reqs, width = walked.rows.shape
    stitched = []
    for values in levels[0].logprobs[:3]:
        stitched.append(values.new_zeros((num_reqs * width, *values.shape[1:])))
    for depth, level in enumerate(levels):
        at = torch.from_numpy(level.reqs * width + depth)
        assert level.logprobs is not None
        for out, values in zip(stitched, level.logprobs[:3], strict=True):
            out[at] = values
    return LogprobsTensors(*stitched)
