# SPDX-License-Identifier: Apache-2.0
"""What steps and drafts took: the clock of a step, what it teaches the policy, and the counters' seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from heterospec_vllm.observe.counters import StepCounters
from heterospec_vllm.policy.base import Cycle, DraftPolicy, Scope
from heterospec_vllm.policy.cost import DECODE_TOKENS

# A longer pause between two steps means that the engine was idle.
IDLE_SECONDS = 0.05


@dataclass(frozen=True)
class StepSize:
    """The tokens of a step and the requests they belong to."""

    num_tokens: int  # draft nodes included
    num_nodes: int  # verified draft nodes among them
    num_reqs: int
    context: float  # tokens of context of all requests

    @property
    def only_decodes(self) -> bool:
        """Whether no prompt is read in it."""
        return self.num_tokens - self.num_nodes == self.num_reqs


@dataclass(frozen=True)
class _LastDraft:
    """What the next step's cycle began with."""

    scope: Scope
    num_reqs: int
    seconds: float
    caught_up: bool  # tokens of earlier steps were in it
    possible: bool  # for some request


class StepLedger:
    """Times the parts of a step on the host's clock. Calls: begin, forward, sampling, end_step, end_draft."""

    def __init__(self) -> None:
        self.counters = StepCounters()
        # Of this step, of its forward pass, of the step before.
        self._begin = self._forward = self._end = 0.0
        self._done: float | None = None  # where the step's tokens left before drafting
        self._sample_seconds = 0.0
        self._last_draft = _LastDraft("none", 0, 0.0, False, False)

    def begin(self) -> None:
        """A step begins: its drafts are matched now."""
        self._begin = time.perf_counter()

    def forward(self) -> None:
        """The drafts are matched; the target's forward pass begins."""
        self._forward = time.perf_counter()
        self.counters.seconds["policy"] += self._forward - self._begin

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Around the walk: its time is counted apart from the forward pass."""
        start = time.perf_counter()
        yield
        self._sample_seconds = time.perf_counter() - start
        self.counters.seconds["sample"] += self._sample_seconds

    def tokens_left(self) -> None:
        """The step's tokens are on their way; drafting begins after what the engine does with them."""
        self._done = time.perf_counter()

    def end_step(
        self,
        policy: DraftPolicy,
        size: StepSize,
        num_emitted: int,  # tokens, where everybody decodes
    ) -> None:
        """The target's step is over, with all that happens between two drafts; drafting begins."""
        now = time.perf_counter()
        done, self._done = self._done or now, None
        gap = self._begin - self._end
        gap = gap if 0 <= gap < IDLE_SECONDS else 0.0
        seconds = now - self._begin + gap
        # A prompt's token has no logits and costs less than a drafted one, for which it must not be taken.
        if size.only_decodes or size.num_tokens > DECODE_TOKENS:
            policy.observe_step(size.num_tokens, size.num_reqs, size.context, seconds)
        self.counters.seconds["target"] += done - self._forward - self._sample_seconds
        self._sample_seconds = 0.0
        self.counters.seconds["rest"] += gap + now - done
        self._observe_cycle(policy, size, num_emitted, seconds)

    def _observe_cycle(
        self, policy: DraftPolicy, size: StepSize, num_emitted: int, step_seconds: float
    ) -> None:
        """Only where everybody decoded and what was drafted was the same for all: other cycles compare with nothing."""
        last = self._last_draft
        speculated = policy.drafts_for_all(last.scope, size.num_reqs)
        if not (size.only_decodes and size.num_reqs == last.num_reqs) or last.caught_up:
            return
        if last.scope == "probe" and not speculated:
            return
        if speculated and not last.possible:  # plain steps, whatever was asked for
            return
        policy.observe_cycle(
            Cycle(speculated, size.num_reqs, size.context, num_emitted, last.seconds + step_seconds)
        )

    def end_draft(
        self, scope: Scope, num_reqs: int, start: float, *, caught_up: bool, possible: bool
    ) -> None:
        """Drafting, which began at ``start``, is over, and with it the step."""
        self._end = time.perf_counter()
        seconds = self._end - start
        self.counters.seconds["draft"] += seconds
        if scope in ("none", "probe"):
            self.counters.seconds_off += start - self._begin
        self._last_draft = _LastDraft(scope, num_reqs, seconds, caught_up, possible)
