# SPDX-License-Identifier: Apache-2.0
"""The worker that vLLM starts on GPUs when our config is used: backends with trees, and our runner."""

from __future__ import annotations

from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker import gpu_worker

from heterospec_vllm.runners.worker_calls import WorkerCalls, refuse_async_scheduling

logger = init_logger(__name__)

_BACKENDS = {
    AttentionBackendEnum.FLASH_ATTN: "heterospec_vllm.layers.attention_flash.HeteroSpecFlashBackend",
    AttentionBackendEnum.TRITON_ATTN: "heterospec_vllm.layers.attention_triton.HeteroSpecTritonBackend",
}


class HeteroSpecGPUWorker(WorkerCalls, gpu_worker.Worker):
    """vLLM's GPU worker around our model runner."""

    def init_device(self) -> None:
        if not self.use_v2_model_runner:
            raise ValueError(
                "heterospec: model runner: found V1, allowed on GPUs: V2 (unset "
                "VLLM_USE_V2_MODEL_RUNNER; vLLM's log says which option asks for V1)"
            )
        refuse_async_scheduling(self.vllm_config)
        logger.warning(
            "heterospec: of the GPU path only the kernels have run on a GPU (an H100), the rest "
            "under Triton's interpreter; `make gpu-serve-check` in a checkout tests it on this one."
        )
        for backend, path in _BACKENDS.items():
            register_backend(backend, path)
        super().init_device()

    def _make_model_runner(self):
        from heterospec_vllm.runners.v2 import HeteroSpecGPUModelRunner

        return HeteroSpecGPUModelRunner(self.vllm_config, self.device)
