# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention backend with trees."""

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from heterospec_vllm.layers.attention_gpu import with_trees

HeteroSpecFlashBackend = with_trees(FlashAttentionBackend, __name__, "HeteroSpecFlashBackend")
