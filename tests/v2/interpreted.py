# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 on a CPU under Triton's interpreter: `prepare()` before vLLM is imported, `install()` after.

vLLM's CPU platform wants a Triton backend named "cpu" and only checks that it is there; the interpreter does the work.
Attention runs through vLLM's Triton backend for GPUs, derived by `with_trees` as on a GPU, under the name CPU_ATTN,
which is the only one that vLLM's CPU platform takes. In this process only.
"""

import os
from types import SimpleNamespace


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

    from heterospec_vllm import wraps

    # The interpreter cannot run vLLM's own kernel for top-k and top-p; vLLM has the same in PyTorch.
    topk_topp_sampler.apply_top_k_top_p_triton = topk_topp_sampler.apply_top_k_top_p_pytorch
    # vLLM's Triton backend asks for it when it stores keys and values.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}_parts.InterpretedBackend")
    wraps.CPU_WORKER = f"{__name__}_parts.InterpretedWorker"
