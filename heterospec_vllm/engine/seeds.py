# SPDX-License-Identifier: Apache-2.0
"""Seeds for sampled requests that bring none: from the engine's seed and the order of arrival.

Plain vLLM draws their noise from the process's generator, one number for each request and step. With trees the number
of steps follows measured time, so the same engine seed would answer differently each time. With a generator of its own
a request draws one number for each token that it emits, whatever tree was walked and whoever stands beside it.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

_MASK = 2**64 - 1


def _mixed(value: int) -> int:
    """SplitMix64's output function (Steele, Lea and Flood, 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class ArrivalSeeds:
    """Numbers requests as they arrive; a request that comes back (a session's next input) keeps its seed."""

    def __init__(self, engine_seed: int | None) -> None:
        self._state = _mixed((engine_seed or 0) & _MASK)
        self._seeds: dict[str, int] = {}

    def give(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        """The step with a seed for every new request that samples without one.

        In-process the scheduler and the front end hold the same records, so those that change are copies.
        """
        new = scheduler_output.scheduled_new_reqs
        if not any(map(_lacks_seed, new)):
            return scheduler_output
        given = [self._with_seed(request) if _lacks_seed(request) else request for request in new]
        return replace(scheduler_output, scheduled_new_reqs=given)

    def _with_seed(self, request: NewRequestData) -> NewRequestData:
        if request.req_id not in self._seeds:
            self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
            # As many bits as torch's CPU generator takes.
            self._seeds[request.req_id] = _mixed(self._state) >> 32
        params = copy.copy(request.sampling_params)
        assert params is not None
        params.__dict__.pop("sampling_type", None)  # cached by vLLM
        params.seed = self._seeds[request.req_id]
        return replace(request, sampling_params=params)

    def remove(self, req_id: str) -> None:
        self._seeds.pop(req_id, None)


def _lacks_seed(request: NewRequestData) -> bool:
    params: SamplingParams | None = request.sampling_params
    return params is not None and params.sampling_type == SamplingType.RANDOM
