# SPDX-License-Identifier: Apache-2.0
"""Where requests stop inside a step: told before the scheduler counts, which would keep accepted tokens behind a stop.

vLLM's scheduler drops the tokens behind a stop, but not from the number of computed tokens. Whatever goes on after a
stop (a streaming-input session, its seeds, blocks that enter the prefix cache) would then stand on dropped drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.request import RequestStatus

from heterospec_vllm.arrays import Bools, Ints
from heterospec_vllm.compiled import compiled
from heterospec_vllm.verify.walk import Walk


@dataclass
class _Request:
    """What vLLM's `check_stop` reads of a request, and writes into it."""

    sampling_params: SamplingParams
    output_token_ids: list[int]  # the latest ones; all of them where repetitions are looked for
    num_output_tokens: int
    num_tokens: int
    status: RequestStatus = RequestStatus.RUNNING
    stop_reason: int | str | None = None
    pooling_params: None = None

    @property
    def max_tokens(self) -> int:
        assert self.sampling_params.max_tokens is not None
        return self.sampling_params.max_tokens

    def stops_at(self, token_id: int, max_model_len: int) -> bool:
        self.output_token_ids.append(token_id)
        self.num_output_tokens += 1
        self.num_tokens += 1
        return check_stop(self, max_model_len)


def num_kept(
    params: SamplingParams,
    outputs: list[int],  # the request's; may be empty where no repetitions are looked for
    num_outputs: int,
    num_tokens: int,  # prompt and outputs
    token_ids: list[int],  # emitted now
    max_model_len: int,
) -> int | None:
    """How many of the tokens vLLM keeps, the one at which it stops among them; None where it does not stop."""
    request = _Request(params, list(outputs), num_outputs, num_tokens)
    for count, token_id in enumerate(token_ids, 1):
        if request.stops_at(token_id, max_model_len):
            return count
    return None


def repeats(params: SamplingParams | None, outputs: list[int]) -> bool:
    """Whether a request has stopped since it repeats itself."""
    if params is None or params.repetition_detection is None or not outputs:
        return False
    *earlier, last = outputs
    # As if it were short: its length is looked at elsewhere.
    return num_kept(params, earlier, len(earlier), 0, [last], len(outputs) + 2) is not None


@compiled("b1[::1](i8[:,:], i8[:], i8[:], i8[:])")
def may_stop_inside(
    tokens,  # [num_reqs, width] emitted
    num_emitted,  # [num_reqs]
    tokens_left,  # [num_reqs] that a request may still emit
    stop_ids,  # [num_ids] of any request
):
    """[num_reqs] where some token before the last may be a stop: all those where one is, and few others."""
    found = np.zeros(num_emitted.size, np.bool_)
    for req in range(num_emitted.size):
        for depth in range(num_emitted[req] - 1):
            if depth + 1 >= tokens_left[req]:
                found[req] = True
            for stop_id in stop_ids:
                if tokens[req, depth] == stop_id:
                    found[req] = True
    return found


@dataclass(frozen=True)
class Stops:
    """What decides where the requests of a batch stop in this step."""

    params: list[SamplingParams | None]  # [num_reqs]
    num_outputs: Ints  # [num_reqs] before the step, likewise num_tokens
    num_tokens: Ints  # [num_reqs] of prompts and outputs
    max_model_len: int
    # A request's outputs; asked only for those in which repetitions are looked for.
    outputs_of: Callable[[int], list[int]] = field(repr=False)

    @cached_property
    def _bounds(self) -> tuple[Ints, Ints]:
        """[num_reqs] tokens that each may still emit, 0 where any may be the last; [num_ids] stop tokens of all."""
        left, token_ids = [], set[int]()
        counts = zip(self.params, self.num_outputs.tolist(), self.num_tokens.tolist(), strict=True)
        for params, num_outputs, num_tokens in counts:
            most = self.max_model_len - num_tokens
            if params is not None:
                if params.max_tokens is not None:
                    most = min(most, params.max_tokens - num_outputs)
                if params.repetition_detection is not None:
                    most = 0
                token_ids.update(params.stop_token_ids or ())
                if params.eos_token_id is not None:
                    token_ids.add(params.eos_token_id)
            left.append(most)
        return np.array(left, np.int64), np.fromiter(token_ids, np.int64, len(token_ids))

    def _is_watched(self, req: int) -> bool:
        params = self.params[req]
        return params is not None and params.repetition_detection is not None

    def _num_kept(self, req: int, token_ids: list[int]) -> int | None:
        params = self.params[req]
        assert params is not None
        return num_kept(
            params,
            self.outputs_of(req) if self._is_watched(req) else [],
            int(self.num_outputs[req]),
            int(self.num_tokens[req]),
            token_ids,
            self.max_model_len,
        )

    def have_stopped(
        self,
        reqs: Ints,  # [num_active]
        tokens: Ints,  # [num_active, depth + 1] what they emitted in this step
    ) -> Bools:
        """[num_active] which requests stop at their latest token, none of them before."""
        tokens_left, stop_ids = self._bounds
        stopped = (tokens.shape[1] >= tokens_left[reqs]) | np.isin(tokens[:, -1], stop_ids)
        for at in np.flatnonzero(stopped).tolist():
            stopped[at] = self._num_kept(int(reqs[at]), tokens[at].tolist()) is not None
        return stopped

    def cut(self, walked: Walk) -> Walk:
        """The walk without what lies behind a stop; itself in most steps."""
        suspects = may_stop_inside(walked.tokens, walked.num_emitted, *self._bounds)
        if not suspects.any():
            return walked
        kept = walked.num_emitted.copy()
        for req in np.flatnonzero(suspects).tolist():
            emitted = walked.tokens[req, : kept[req]].tolist()
            kept[req] = self._num_kept(req, emitted) or kept[req]
        return walked.cut(kept)
