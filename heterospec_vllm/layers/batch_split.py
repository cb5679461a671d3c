# SPDX-License-Identifier: Apache-2.0
"""Trees in attention metadata, for any backend: tree requests come first, the rest stays with vLLM's own code."""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata


def requests_from(
    common: CommonAttentionMetadata, first_req: int, first_token: int
) -> CommonAttentionMetadata | None:
    """The batch without its first requests, None where nobody is left."""
    if first_req >= common.num_reqs:
        return None

    def rest(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[first_req:]

    return replace(
        common,
        query_start_loc=common.query_start_loc[first_req:] - first_token,
        query_start_loc_cpu=common.query_start_loc_cpu[first_req:] - first_token,
        seq_lens=common.seq_lens[first_req:],
        seq_lens_cpu_upper_bound=rest(common.seq_lens_cpu_upper_bound),
        is_prefilling=rest(common.is_prefilling),
        num_reqs=common.num_reqs - first_req,
        num_actual_tokens=common.num_actual_tokens - first_token,
        block_table_tensor=common.block_table_tensor[first_req:],
        slot_mapping=common.slot_mapping[first_token:],
        positions=None if common.positions is None else common.positions[first_token:],
    )
