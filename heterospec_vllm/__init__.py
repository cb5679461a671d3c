# SPDX-License-Identifier: Apache-2.0
"""Adaptive tree speculative decoding for the stock vLLM wheel; importing this loads nothing."""
