# SPDX-License-Identifier: Apache-2.0
"""The walk through vLLM's sampler, one call a depth: for whatever the one C++ call does not know.

Logprobs, min_p, thinking budgets and custom logits processors look at a request's outputs through vLLM's own lists. A
deeper row's past is those outputs and what the walk has emitted, so these tokens stand in the lists until it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from heterospec_vllm.arrays import Ints
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.verify.walk import Walk


@dataclass(frozen=True)
class _Level:
    """Requests sampled at one depth, their tokens and logprobs."""

    reqs: Ints  # [num_active]
    tokens: Ints  # [num_active]
    logprobs: LogprobsTensors | None


class SampledLevels:
    """vLLM's sampler on the rows visited at one depth after the other (`walk.SampleRows`)."""

    def __init__(
        self,
        sampler: Sampler,
        logits: torch.Tensor,  # [num_logits, vocab_size]
        first_row: Ints,  # [num_reqs] each root's row of the logits
        metadata: SamplingMetadata,
        outputs: list[list[int]],  # [num_reqs] vLLM's lists; [] where nothing reads them
    ) -> None:
        self._sampler = sampler
        self._logits = logits
        self._first_row = first_row
        self._metadata = replace(metadata, spec_token_ids=[])
        self._outputs = outputs
        self._lengths = [len(tokens) for tokens in outputs]
        self._levels: list[_Level] = []

    def sample(self, reqs: Ints, rows: Ints, depth: int) -> Ints:
        """[num_active] the tokens that the target emits at the visited rows of a depth."""
        metadata = self._metadata
        at = self._first_row.copy()
        at[reqs] += rows
        if depth > 0:
            self._remember(reqs)
            active = set(reqs.tolist())
            generators = {i: g for i, g in metadata.generators.items() if i in active}
            metadata = replace(metadata, generators=generators)
            if not _rows_are_bound(metadata):
                metadata = _subset(metadata, reqs)
                at = at[reqs]
            for processor in metadata.logitsprocs.all:
                processor.update_state(None)
        holder = metadata.thinking_budget_state_holder
        with CLOCK.span("sampling"), _only(holder, reqs):
            output = self._sampler(
                logits=self._logits[torch.from_numpy(at)], sampling_metadata=metadata
            )
        picked = slice(None) if at.size == reqs.size else reqs
        tokens = output.sampled_token_ids.view(-1).numpy().astype(np.int64)[picked]
        logprobs = output.logprobs_tensors
        if logprobs is not None and at.size != reqs.size:
            index = torch.from_numpy(reqs)
            logprobs = LogprobsTensors(*(None if t is None else t[index] for t in logprobs[:3]))
        self._levels.append(_Level(reqs, tokens, logprobs))
        return tokens

    def _remember(self, reqs: Ints) -> None:
        """What the depth before emitted belongs to the past of these requests."""
        if not self._outputs:
            return
        above = self._levels[-1]
        emitted = dict(zip(above.reqs.tolist(), above.tokens.tolist(), strict=True))
        for req in reqs.tolist():
            self._outputs[req].append(emitted[req])

    def forget(self) -> None:
        """The walk is over: vLLM writes its tokens itself."""
        for tokens, length in zip(self._outputs, self._lengths, strict=True):
            del tokens[length:]

    def logprobs(self, walked: Walk) -> LogprobsTensors | None:
        """Per-depth logprobs laid out as vLLM's parse_output expects: ``num_reqs * max_emitted`` rows."""
        levels = self._levels
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


@contextmanager
def _only(holder: ThinkingBudgetStateHolder | None, reqs: Ints) -> Iterator[None]:
    """Budgets of requests that this depth does not sample stay as they are."""
    if holder is None or not holder._state:
        yield
        return
    active = set(reqs.tolist())
    state = holder._state
    holder._state = {req: state[req] for req in state if req in active}
    try:
        yield
    finally:
        holder._state = state


def is_active(processor: LogitsProcessor) -> bool:
    """Whether a logits processor touches any request of the batch (unknown ones always may)."""
    if isinstance(processor, MinTokensLogitsProcessor):
        return bool(processor.min_toks)
    if isinstance(processor, LogitBiasLogitsProcessor):
        return bool(processor.biases)
    return not isinstance(processor, MinPLogitsProcessor) or bool(processor.min_p_count)


def _rows_are_bound(metadata: SamplingMetadata) -> bool:
    """Whether some rule is keyed by the row's place in the batch, so that rows must stay where they are."""
    holder = metadata.thinking_budget_state_holder
    return (
        any(map(is_active, metadata.logitsprocs.all))
        or metadata.allowed_token_ids_mask is not None
        or bool(metadata.logprob_token_ids)
        or bool(metadata.bad_words_token_ids)
        or not metadata.no_penalties
        or (holder is not None and holder.has_tracked_requests())
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
