# SPDX-License-Identifier: Apache-2.0
"""The workers that vLLM starts when our config is used: they register our attention and build our runner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker import cpu_worker

from heterospec_vllm.attention.cpu import HeteroSpecCPUAttentionBackend
from heterospec_vllm.kernels import tree_attention_cpu
from heterospec_vllm.runners.v1 import HeteroSpecCPUModelRunner
from heterospec_vllm.steps import StepRecorder
from heterospec_vllm.timing import CLOCK

logger = init_logger(__name__)


class HeteroSpecCPUWorker(cpu_worker.CPUWorker):
    """vLLM's CPU worker around our model runner."""

    model_runner: HeteroSpecCPUModelRunner

    def init_device(self) -> None:
        reason = tree_attention_cpu.unavailable_reason()
        if reason is not None:
            logger.warning("heterospec drafts chains only, no trees: %s", reason)
        backend = HeteroSpecCPUAttentionBackend
        register_backend(
            AttentionBackendEnum.CPU_ATTN, f"{backend.__module__}.{backend.__qualname__}"
        )
        with _our_runner_class():
            super().init_device()

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """Costs are measured on the warm engine, so the policy starts last."""
        result = super().compile_or_warm_up_model(*args, **kwargs)
        self.model_runner.start_policy()
        return result

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


@contextmanager
def _our_runner_class() -> Iterator[None]:
    """CPUWorker.init_device names its runner class itself; remove when it asks an overridable method."""
    theirs = cpu_worker.CPUModelRunner
    cpu_worker.CPUModelRunner = HeteroSpecCPUModelRunner
    try:
        yield
    finally:
        cpu_worker.CPUModelRunner = theirs
