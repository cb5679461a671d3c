# SPDX-License-Identifier: Apache-2.0
"""Sizes of attention heads, declared once: launchers, the plugin's checks, tests and documentation read them here.

It imports nothing, so that the plugin can ask before torch is loaded.
"""

# The C++ takes these; vLLM stores others as `vec16`.
CPU_KERNELS = tuple(range(32, 257, 32))
# Of the target and of the head: those that whole engines are tested with. Others are refused.
CPU = (64, 96, 128)
# Triton kernels are compiled for these. An engine with others drafts chains.
GPU = (64, 96, 128, 256)
