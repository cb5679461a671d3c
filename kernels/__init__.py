# SPDX-License-Identifier: Apache-2.0
"""Tensor operations of the plugin; imports torch and triton only, never vLLM."""
