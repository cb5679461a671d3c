# SPDX-License-Identifier: Apache-2.0
"""What can be asked of our workers through ``LLM.collective_rpc``, for any model runner."""

from __future__ import annotations

from typing import Any

import torch

from heterospec_vllm.observe.step_recorder import StepRecorder
from heterospec_vllm.runners.shared import SpeculatingRunner
from heterospec_vllm.timing import CLOCK


def refuse_async_scheduling(vllm_config: Any) -> None:
    """Raises ValueError where the scheduler would hand out placeholders, for which there is no tree, as drafts.

    The engine's config switches it off; this notices a vLLM that decides otherwise later, for nothing else would:
    every draft would be dropped and answers would stay right.
    """
    if vllm_config.scheduler_config.async_scheduling:
        raise ValueError(
            "heterospec: async_scheduling: found True, allowed: False, for the scheduler then hands out "
            "placeholders in place of drafts (--no-async-scheduling)"
        )


class WorkerCalls:
    """Mixed into vLLM's workers."""

    model_runner: SpeculatingRunner

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """Costs are measured on the warm engine, so the policy starts last."""
        result = super().compile_or_warm_up_model(*args, **kwargs)  # type: ignore[misc]
        # What is measured on random inputs leaves the generator as it would be without us.
        with torch.random.fork_rng(devices=[]):
            self.model_runner.prepare_drafting()
            self.model_runner.start_policy()
        return result

    def finish_weight_update(self, *args: Any, **kwargs: Any) -> None:
        """Weights that a trainer sent: vLLM's session goes round the runner's `reload_weights`."""
        super().finish_weight_update(*args, **kwargs)  # type: ignore[misc]
        self.model_runner.weights_changed()

    def set_heterospec_policy(self, policy: str, **bounds: int) -> None:
        """Switch the policy (and optionally num_speculative_tokens, max_depth, top_k) between steps."""
        self.model_runner.set_policy(policy, **bounds)

    def heterospec_counters(self, reset: bool = False) -> dict[str, Any]:
        """What was drafted, verified and accepted so far (``metrics.StepCounters``)."""
        return self.model_runner.read_counters(reset)

    def heterospec_trace(self, on: bool) -> dict[str, Any] | None:
        """Start recording every draft while nothing is verified; stop it and return what was recorded."""
        return self.model_runner.record_trace(on)

    def heterospec_steps(self, on: bool) -> list[dict[str, Any]] | None:
        """Start noting every step's drafts and walk of one request; stop it and return the notes."""
        controller = self.model_runner.controller
        recorder, controller.step_recorder = (
            controller.step_recorder,
            StepRecorder() if on else None,
        )
        return None if recorder is None else recorder.steps

    def heterospec_record_costs(self, trees: list[tuple[int, int, int]]) -> None:
        """Time fixed trees (nodes, depth, top_k) in turns, 0 nodes for plain decoding."""
        self.model_runner.record_costs(trees)

    def heterospec_recorded_costs(self) -> dict[str, list] | None:
        """The noted costs; the configured policy is back afterwards."""
        return self.model_runner.recorded_costs()

    def heterospec_clock(self, on: bool) -> dict[str, tuple[float, int]]:
        """Switch the step clock; returns the seconds and calls by span since the last switch."""
        return CLOCK.restart(on)
