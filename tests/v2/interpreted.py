# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 on a CPU under Triton's interpreter: `prepare()` before vLLM is imported, `install()` after.

vLLM's CPU platform wants a Triton backend named "cpu" and only checks that it is there; the interpreter does the work.
Attention runs through vLLM's Triton backend for GPUs, derived by `with_trees` as on a GPU, under the name CPU_ATTN,
which is the only one that vLLM's CPU platform takes. In this process only.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def prepare() -> None:
    """Environment and the stand-in; must run before vLLM and triton kernels are imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


def install() -> None:
    """CPU_ATTN becomes vLLM's Triton backend, with trees; our worker is the interpreted one."""
    import torch
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu import structured_outputs

    from heterospec_vllm.plugin import wraps

    # The interpreter cannot run vLLM's own kernel for top-k and top-p; vLLM has the same in PyTorch.
    in_torch = topk_topp_sampler.apply_top_k_top_p_pytorch
    # vLLM 0.33 also says which of the two a row asks for, which only its kernel uses.
    topk_topp_sampler.apply_top_k_top_p_triton = lambda logits, k, p, **_: in_torch(logits, k, p)
    structured_outputs.StructuredOutputsWorker.apply_grammar_bitmask = _apply_grammar_bitmask
    # vLLM's Triton backend asks for it when it stores keys and values.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    # Without trees it stands for a backend that has no tree kernel.
    name = os.environ.get("INTERPRETED_BACKEND", "InterpretedBackend")
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}_parts.{name}")
    wraps.CPU_WORKER = f"{__name__}_parts.InterpretedWorker"
    leave_async_scheduling(
        lambda config: config.parallel_config.worker_cls == wraps.CPU_WORKER  # engines with ours
    )


def _apply_grammar_bitmask(
    self: Any, logits: Any, input_batch: Any, grammar_req_ids: list[str], grammar_bitmask: Any
) -> None:
    """In place of vLLM's kernel, which the interpreter cannot run: a mask for each row of these requests, in order."""
    import numpy as np
    import torch

    ends = input_batch.cu_num_logits_np
    masks = iter(np.asarray(grammar_bitmask))
    for req_id in grammar_req_ids:
        place = input_batch.req_ids.index(req_id)
        for row in range(ends[place], ends[place + 1]):
            bits = np.unpackbits(next(masks).view(np.uint8), bitorder="little")
            forbidden = torch.from_numpy(bits[: logits.shape[1]] == 0)
            logits[row].masked_fill_(forbidden, -torch.inf)
    assert next(masks, None) is None


def leave_async_scheduling(is_left: Callable[[Any], bool]) -> None:
    """What vLLM's config decided about async scheduling holds for these configs, as on a GPU.

    vLLM's CPU platform would switch it off by itself.
    """
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config: Any) -> None:
        decided = vllm_config.scheduler_config.async_scheduling
        original(cls, vllm_config)
        if is_left(vllm_config):
            vllm_config.scheduler_config.async_scheduling = decided

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
