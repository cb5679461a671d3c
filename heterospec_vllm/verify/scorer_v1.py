# SPDX-License-Identifier: Apache-2.0
"""TreeScorer: one step's trees on the target - how they are walked, how KV is compacted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from heterospec_vllm.arrays import NO_ROW, Ints
from heterospec_vllm.kernels.cpu.argmax_rows import argmax_rows_cpu
from heterospec_vllm.kernels.cpu.kv_compact import kv_compact_cpu
from heterospec_vllm.kernels.cpu.library import is_available
from heterospec_vllm.kernels.cpu.walk import walk_cpu
from heterospec_vllm.kernels.reference import cpu as reference
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree.masks import TokenMasks
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify.compact import KVMoves, plan_moves
from heterospec_vllm.verify.sampled_levels import SampledLevels, is_active
from heterospec_vllm.verify.stops import Stops
from heterospec_vllm.verify.walk import Walk, walk

logger = init_logger(__name__)


@dataclass(frozen=True)
class RowChanges:
    """What changes the logits of a step's rows before they are sampled."""

    rules: bytes | None  # [num_reqs] `RowRules`, one after the other; None: no request has any
    masks: TokenMasks | None  # of the rows of logits; None: no request has a grammar


class TreeScorer:
    """Walks and compacts the trees of one batch at a time; holds no state between steps."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def sample_plain(
        self,
        logits: torch.Tensor,  # [num_reqs, vocab_size]
        sampling_metadata: SamplingMetadata,
        changes: RowChanges | None = None,
    ) -> SamplerOutput:
        """One token a request, no drafts: vLLM's sampler, or the same tokens without a float32 copy."""
        if not self._draws_alone(sampling_metadata, changes):
            if changes is not None and changes.masks is not None:
                put_masks(logits, changes.masks)
            with CLOCK.span("sampling"):
                return self.sampler(logits=logits, sampling_metadata=sampling_metadata)
        if sampling_metadata.all_greedy and changes is None:
            tokens = argmax_rows(logits, torch.arange(logits.shape[0]))
        else:
            num_reqs = logits.shape[0]
            trees = DraftTrees.empty(num_reqs)
            walked = walk_logits(
                trees, logits, np.arange(num_reqs), sampling_metadata, changes=changes
            )
            tokens = torch.from_numpy(walked.tokens[:, 0])
        return SamplerOutput(sampled_token_ids=tokens.int()[:, None], logprobs_tensors=None)

    def _draws_alone(self, metadata: SamplingMetadata, changes: RowChanges | None) -> bool:
        """Whether we can draw what vLLM's sampler would."""
        if needs_sampler(metadata) or (changes is not None and not is_available()):
            return False
        if has_rules(metadata) and (changes is None or changes.rules is None):
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
        changes: RowChanges | None = None,
        # [num_reqs] vLLM's own lists of what each request has emitted; [] where nothing reads them
        outputs: list[list[int]] | None = None,
    ) -> tuple[Walk, SamplerOutput]:
        """Walk the batch with the target's own samples up to where requests stop, in vLLM's padded spec-decode form.

        Only visited rows are looked at, and a seeded request draws exactly one seed for every token it emits, as
        without speculation. Where tokens follow from logits, temperature, top-k, top-p and what ``changes`` holds, the
        whole walk is one call; otherwise vLLM's sampler runs once a depth.
        """
        first_row = root_logits(trees.num_nodes)
        if self._draws_alone(sampling_metadata, changes):
            walked = walk_logits(trees, logits, first_row, sampling_metadata, stops, changes)
            return walked, _sampler_output(walked, None)
        if changes is not None and changes.masks is not None:
            put_masks(logits, changes.masks)
        levels = SampledLevels(self.sampler, logits, first_row, sampling_metadata, outputs or [])
        try:
            walked = walk(trees, levels.sample, None if stops is None else stops.have_stopped)
        finally:
            levels.forget()
        return walked, _sampler_output(walked, levels.logprobs(walked))

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
    changes: RowChanges | None = None,
) -> Walk:
    """`verify.walk` without vLLM's sampler (:func:`needs_sampler`); one call where the library is there."""
    greedy = metadata is None or metadata.all_greedy
    if not is_available():
        assert greedy and changes is None
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
    sampling: dict[str, Any] = {}
    if changes is not None:
        sampling["rules"] = changes.rules
        if changes.masks is not None:
            sampling["masks"] = torch.from_numpy(changes.masks.bits)
            sampling["mask_of_row"] = torch.from_numpy(changes.masks.of_row)
    if not greedy:
        assert metadata is not None and metadata.temperature is not None
        seeds = _Seeds(trees.num_reqs, width, metadata.generators)
        sampling.update(
            temperatures=metadata.temperature,
            seeds=seeds.values,
            top_k=metadata.top_k,
            top_p=metadata.top_p,
        )
    with CLOCK.span("sampling"):
        found = walk_cpu(logits, first, parents, tokens, width, **sampling)
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


def needs_sampler(metadata: SamplingMetadata) -> bool:
    """Whether a row's token depends on more than its logits, what rules make of them, and a plain sample."""
    holder = metadata.thinking_budget_state_holder
    processors = metadata.logitsprocs
    return (
        metadata.max_num_logprobs is not None
        or bool(metadata.logprob_token_ids)
        or any(_needs_sampler(p) for p in processors.non_argmax_invariant)
        or (not metadata.all_greedy and any(map(is_active, processors.argmax_invariant)))
        or (holder is not None and holder.has_tracked_requests())
    )


def has_rules(metadata: SamplingMetadata) -> bool:
    """Whether the logits of some request are changed by what `RowRules` stands for."""
    return (
        not metadata.no_penalties
        or bool(metadata.bad_words_token_ids)
        or metadata.allowed_token_ids_mask is not None
        or any(map(is_active, metadata.logitsprocs.non_argmax_invariant))
    )


def _needs_sampler(processor: LogitsProcessor) -> bool:
    """Whether a processor is neither idle nor one that `RowRules` stands for."""
    if isinstance(processor, LogitBiasLogitsProcessor):
        return False
    if isinstance(processor, MinTokensLogitsProcessor):
        # Of requests with a grammar it gives stop tokens back where nothing else is left.
        return any(structured for *_, structured in processor.min_toks.values())
    return is_active(processor)


def put_masks(
    logits: torch.Tensor,  # [num_rows, vocab_size], written
    masks: TokenMasks,
) -> None:
    """Makes the logits of tokens that a grammar forbids minus infinity, as vLLM does before it samples."""
    for row in np.flatnonzero(masks.of_row != NO_ROW).tolist():
        bits = np.unpackbits(masks.bits[masks.of_row[row]].view(np.uint8), bitorder="little")
        forbidden = torch.from_numpy(bits[: logits.shape[1]] == 0)
        logits[row].masked_fill_(forbidden, -torch.inf)


def _sampler_output(walked: Walk, logprobs: LogprobsTensors | None) -> SamplerOutput:
    tokens = torch.from_numpy(walked.tokens.astype(np.int32))
    return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)
