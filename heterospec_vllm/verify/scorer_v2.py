# SPDX-License-Identifier: Apache-2.0
"""DeviceScorer: one step's trees on Model Runner V2's target - sampled, walked and compacted by Triton kernels.

Launches per step beside vLLM's own: two for sampling and walking, one for compaction, whatever the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from heterospec_vllm.arrays import Bools, Ints
from heterospec_vllm.kernels.gpu.kv_compact import KVLayers, kv_compact
from heterospec_vllm.kernels.gpu.tree_verify import tree_verify
from heterospec_vllm.kernels.reference.tree_verify import SamplingKeys, TreeBatch, TreeWalks
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify.compact import plan_moves
from heterospec_vllm.verify.path_rows import PathRows
from heterospec_vllm.verify.stops import Stops
from heterospec_vllm.verify.walk import Walk

_LOGIT_MODES = ("raw_logits", "processed_logits")


@dataclass(frozen=True)
class _Scored:
    """A walk as the device left it and as the host reads it."""

    on_device: TreeWalks
    walk: Walk


class DeviceScorer:
    """Stands in for vLLM's rejection sampler; the runner names the step's trees, and where requests stop, before."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.trees: DraftTrees | None = None
        self.stops: Stops | None = None
        # [num_reqs] whose penalties, bad words or thinking budgets look at the past
        self.follows: Bools | None = None
        self._scored: _Scored | None = None

    def __call__(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size], each request's root and nodes in row order
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> SamplerOutput:
        """Walk the batch: vLLM's processing of the logits row by row, then its noise, keyed by position."""
        assert self.trees is not None and draft_logits is None and invalid_drafts is None
        sampler = self.sampler
        positions = input_batch.positions[input_batch.logits_indices]
        processed = self._processed(logits, positions, input_batch)
        walks = tree_verify(
            processed,
            _on_device(self.trees, input_batch),
            SamplingKeys(
                expanded_idx_mapping=input_batch.expanded_idx_mapping.int(),
                positions=positions,
                temperature=sampler.sampling_states.temperature.gpu,
                seeds=sampler.sampling_states.seeds.gpu,
            ),
            TreeWalks.allocate(input_batch.num_reqs, self.trees.max_depth, logits.device),
            apply_temperature=False,
        )
        walks = self._keep(walks)
        processed_mode = sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
        logprobs = self._logprobs(processed if processed_mode else logits, input_batch)
        # Rows of an unfinished prompt emit nothing.
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            walks.num_sampled.clone(),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            sampler.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=walks.sampled,
            logprobs_tensors=logprobs,
            num_nans=get_num_nans(logits) if sampler.compute_nans else None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _processed(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size]
        positions: torch.Tensor,  # [num_logits]
        input_batch: InputBatch,
    ) -> torch.Tensor:
        """[num_logits, vocab_size] the logits after vLLM's processing, each row behind its own path."""
        assert self.trees is not None
        input_ids = input_batch.input_ids[input_batch.logits_indices]
        states, local_pos = input_batch.expanded_idx_mapping, input_batch.expanded_local_pos
        last = None
        if self.follows is not None and self.follows.any():
            laid = PathRows.of(self.trees, self.follows)
            index = torch.from_numpy(np.concatenate([laid.rows, laid.local_pos, laid.last]))
            rows, before, last = index.to(logits.device).split(
                (laid.rows.size, laid.rows.size, laid.last.size)
            )
            logits, positions, input_ids = logits[rows], positions[rows], input_ids[rows]
            states, local_pos = states[rows], before.to(local_pos.dtype)
        processed = self.sampler.apply_sampling_params(
            logits,
            states,
            input_batch.idx_mapping,
            input_batch.idx_mapping_np,
            positions,
            input_ids,
            local_pos,
            input_batch.seq_lens_cpu_upper_bound.numpy(),
        )
        return processed if last is None else processed[last]

    def _keep(self, walks: TreeWalks) -> TreeWalks:
        """The step's walks up to where requests stop; nothing is written on the device where none does inside."""
        walked = _to_host(walks)
        kept = walked if self.stops is None else self.stops.cut(walked)
        if kept is not walked:
            num_sampled = torch.from_numpy(kept.num_emitted).to(walks.num_sampled)
            walks = replace(walks, num_sampled=num_sampled)
        self._scored = _Scored(walks, kept)
        return walks

    def _logprobs(self, logits: torch.Tensor, input_batch: InputBatch) -> LogprobsTensors | None:
        """Of the emitted tokens only, each from the row where it was emitted."""
        wanted = self.sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        if wanted is None:
            return None
        assert self._scored is not None
        walks, walked = self._scored.on_device, self._scored.walk
        emitted = torch.from_numpy(walked.rows >= 0).to(logits.device)
        rows = walks.logits_rows[emitted].long()
        ends = np.concatenate([[0], np.cumsum(walked.num_emitted)])
        num_logprobs, max_token_ids = wanted
        return compute_topk_scores(
            logits[rows],
            num_logprobs,
            walks.sampled[emitted],
            ends.tolist(),
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=input_batch.expanded_idx_mapping[rows],
            max_per_req_token_ids=max_token_ids,
            logits_mode=self.sampler.logprobs_mode in _LOGIT_MODES,
        )

    @property
    def walked(self) -> Walk:
        """The latest walk."""
        assert self._scored is not None
        return self._scored.walk

    def compact(
        self,
        layers: KVLayers,
        slot_mapping: torch.Tensor,  # [num_step_tokens] int64
        root_rows: Ints,  # [num_reqs] token row of each request's root in the step
    ) -> int:
        """Bring the accepted rows' keys and values into the slots that follow the context; how many moved."""
        assert self._scored is not None
        walks = self._scored.on_device
        num_moves = plan_moves(self._scored.walk, root_rows).num_moves
        if num_moves:
            starts = np.append(root_rows, len(slot_mapping)).astype(np.int32)
            kv_compact(
                layers,
                slot_mapping,
                torch.from_numpy(starts).to(slot_mapping.device),
                walks.rows,
                walks.num_sampled,
            )
        return num_moves


def _on_device(trees: DraftTrees, input_batch: InputBatch) -> TreeBatch:
    device = input_batch.cu_num_logits.device

    def put(values: np.ndarray, dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype)).to(device)

    return TreeBatch(
        cu_num_logits=input_batch.cu_num_logits.int(),
        tokens=put(trees.tokens, np.int64),
        parents=put(trees.parents, np.int32),
        num_nodes=put(trees.num_nodes, np.int32),
    )


def _to_host(walks: TreeWalks) -> Walk:
    """The step's one wait for the device: which rows were visited decides what is drafted next."""
    packed = torch.stack([walks.rows.long(), walks.sampled]).cpu().numpy()
    rows, tokens = packed
    return Walk(rows, tokens, (rows >= 0).sum(axis=1))
