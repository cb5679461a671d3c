# SPDX-License-Identifier: Apache-2.0
"""The workers that vLLM starts when our config is used: they register our attention and build our runner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker import cpu_worker

from heterospec_vllm.kernels.cpu.library import unavailable_reason
from heterospec_vllm.layers.attention_cpu import HeteroSpecCPUAttentionBackend
from heterospec_vllm.runners.v1 import HeteroSpecCPUModelRunner
from heterospec_vllm.runners.worker_calls import WorkerCalls, refuse_async_scheduling

logger = init_logger(__name__)


class HeteroSpecCPUWorker(WorkerCalls, cpu_worker.CPUWorker):
    """vLLM's CPU worker around our model runner."""

    model_runner: HeteroSpecCPUModelRunner

    def init_device(self) -> None:
        if self.use_v2_model_runner:
            raise ValueError(
                "heterospec: VLLM_USE_V2_MODEL_RUNNER: found 1, allowed on CPU: 0 or unset"
            )
        refuse_async_scheduling(self.vllm_config)
        reason = unavailable_reason()
        if reason is not None:
            logger.warning("heterospec drafts chains only, no trees: %s", reason)
        backend = HeteroSpecCPUAttentionBackend
        register_backend(
            AttentionBackendEnum.CPU_ATTN, f"{backend.__module__}.{backend.__qualname__}"
        )
        with _our_runner_class():
            super().init_device()


@contextmanager
def _our_runner_class() -> Iterator[None]:
    """CPUWorker.init_device names its runner class itself; remove when it asks an overridable method."""
    theirs = cpu_worker.CPUModelRunner
    cpu_worker.CPUModelRunner = HeteroSpecCPUModelRunner
    try:
        yield
    finally:
        cpu_worker.CPUModelRunner = theirs
