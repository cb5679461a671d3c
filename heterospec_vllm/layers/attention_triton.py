# SPDX-License-Identifier: Apache-2.0
"""vLLM's TritonAttention backend with trees."""

from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from heterospec_vllm.layers.attention_gpu import with_trees

HeteroSpecTritonBackend = with_trees(TritonAttentionBackend, __name__, "HeteroSpecTritonBackend")
