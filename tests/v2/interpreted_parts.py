# SPDX-License-Identifier: Apache-2.0
"""The classes of `interpreted.py`, which import vLLM."""

from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu import model_runner as cpu_v2

from heterospec_vllm.layers.attention_gpu import with_trees
from heterospec_vllm.runners.v2 import HeteroSpecGPUModelRunner
from heterospec_vllm.runners.worker_calls import WorkerCalls


class _Named:
    """vLLM's CPU platform asks for a backend of this name."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"


class InterpretedBackend(_Named, with_trees(TritonAttentionBackend, __name__, "_Trees")):
    """vLLM's Triton backend with trees."""


class PlainBackend(_Named, TritonAttentionBackend):
    """vLLM's Triton backend as it is."""


class InterpretedRunner(HeteroSpecGPUModelRunner, cpu_v2.CPUModelRunner):
    """Our runner with what vLLM's CPU worker calls."""


class InterpretedWorker(WorkerCalls, cpu_worker.CPUWorker):
    """vLLM's CPU worker around our V2 runner."""

    def init_device(self) -> None:
        theirs = cpu_v2.CPUModelRunner
        cpu_v2.CPUModelRunner = InterpretedRunner
        try:
            super().init_device()
        finally:
            cpu_v2.CPUModelRunner = theirs
