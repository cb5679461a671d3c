# SPDX-License-Identifier: Apache-2.0
"""Model Runner V1 with tree speculation: a thin adapter between vLLM's step and the drafter and scorer.

One step: ``execute_model`` matches the scheduled drafts with their trees -> ``_may_reorder_batch`` puts tree
requests first -> ``_prepare_inputs`` rewrites positions and hands the attention builders the tree rows -> target
forward -> ``_sample`` walks and compacts -> the tokens leave the engine -> ``take_draft_token_ids`` drafts the next
trees.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from heterospec_vllm.arrays import Ints
from heterospec_vllm.draft.eagle_v1 import EagleDrafterV1
from heterospec_vllm.engine.seeds import ArrivalSeeds
from heterospec_vllm.engine.step import Step, without_speculation
from heterospec_vllm.kernels.cpu.library import is_available
from heterospec_vllm.layers.attention_cpu import (
    PIECE_ROWS,
    HeteroSpecCPUAttentionMetadataBuilder,
    MaskedRows,
)
from heterospec_vllm.layers.linears_cpu import loading, renew_embeddings
from heterospec_vllm.layers.op_choice import VLLMS, OpChoice, choose_op
from heterospec_vllm.layers.op_timing import Heads
from heterospec_vllm.plugin.head_loading import loading_head
from heterospec_vllm.runners.row_changes import RowChanger
from heterospec_vllm.runners.thinking_budgets import RowBudgets
from heterospec_vllm.runners.v1_drafting import DraftingRunner
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.verify.scorer_v1 import TreeScorer, root_logits
from heterospec_vllm.verify.stops import Stops


class HeteroSpecCPUModelRunner(DraftingRunner):
    """vLLM's CPU runner; every override calls the original and adds what a tree needs."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.drafter = EagleDrafterV1(vllm_config, device, self)
        self.start_speculation(vllm_config, self.drafter)
        self.scorer = TreeScorer(self.sampler)
        self._arrival_seeds = ArrivalSeeds(self.model_config.seed)
        self._kv_caches_of_target: list[torch.Tensor] = []
        self._op_choice: OpChoice = VLLMS
        self._row_changer = RowChanger(vllm_config)
        whole = self._row_changer.leaves_drafts_whole
        self._unsupported = frozenset(() if whole else ("structured_output",))
        self._grammar_output: GrammarOutput | None = None
        self._sample_as_without_speculation()

    def _sample_as_without_speculation(self) -> None:
        """What vLLM's sampler applies to a row: the walk samples one row a request, in the order of the batch.

        With a speculative config vLLM builds no logits processors for min_p and logit_bias, and its holder of
        thinking budgets takes a request's row to be the sum of the draft counts before it.
        """
        batch = self.input_batch
        batch.logitsprocs = build_logitsprocs(
            without_speculation(self.vllm_config),
            self.device,
            PIN_MEMORY,
            self.is_pooling_model,
            (),
        )
        reasoning = self.vllm_config.reasoning_config
        if reasoning is not None:
            batch.thinking_budget_state_holder = RowBudgets(
                reasoning, self.max_num_reqs, self.device
            )

    def may_reinitialize_input_batch(self, kv_cache_config: KVCacheConfig) -> None:
        batch = self.input_batch
        super().may_reinitialize_input_batch(kv_cache_config)
        if self.input_batch is not batch:
            self._sample_as_without_speculation()

    def load_model(self, load_dummy_weights: bool = False) -> None:
        with (
            loading() if self._config.packed_linears else nullcontext(),
            loading_head(self._config.model, self.model_config),
        ):
            super().load_model(load_dummy_weights)

    def weights_changed(self) -> None:
        renew_embeddings(self.model)
        super().weights_changed()

    def _draws_trees(self) -> bool:
        return is_available()

    def prepare_drafting(self) -> None:
        super().prepare_drafting()
        if self._draws_trees():
            self._op_choice = choose_op(
                Heads.of(self.vllm_config), self.model_config.dtype, self._isa
            )

    def _request(self, req_id: str) -> CachedRequestState:
        return self.requests[req_id]

    # ---- step: match scheduled drafts with their trees

    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors=None):
        self._draft_next()  # where nobody took the drafts of the step before
        for new in scheduler_output.scheduled_new_reqs:
            self._row_changer.start(new)
        with CLOCK.span("execute_model"):
            for req_id in scheduler_output.preempted_req_ids or ():
                # It may come back at the same position in other blocks.
                self.controller.remove(req_id)
            scheduler_output = self._arrival_seeds.give(scheduler_output)
            with CLOCK.span("match drafts"):
                self._step, scheduler_output = self._match_drafts(scheduler_output)
            self.counters.steps += bool(scheduler_output.total_num_scheduled_tokens)
            return super().execute_model(scheduler_output, intermediate_tensors)

    def sample_tokens(self, grammar_output):
        """vLLM's, but for the masks: it takes a draft for one path, and its sampler reads every row."""
        self._grammar_output = grammar_output
        with CLOCK.span("sample_tokens"):
            return super().sample_tokens(None)

    def _model_forward(self, *args, **kwargs):
        with CLOCK.span("target forward"):
            return super()._model_forward(*args, **kwargs)

    def _may_reorder_batch(self, scheduler_output: SchedulerOutput) -> None:
        """Requests whose rows our attention takes first, those of vLLM's behind them."""
        super()._may_reorder_batch(scheduler_output)
        step, batch = self._step, self.input_batch
        masked = self._masked(scheduler_output)
        count = step.num_masked_reqs = int(masked.sum())
        if not masked[:count].all():
            late = np.nonzero(masked[count:])[0] + count
            early = np.nonzero(~masked[:count])[0]
            for i, j in zip(early.tolist(), late.tolist(), strict=True):
                batch.swap_states(i, j)
        if step.matched.tokens:
            step.trees = step.matched.trees_of(batch.req_ids)

    def _masked(self, scheduler_output: SchedulerOutput) -> np.ndarray:
        """[num_reqs] bool: drafts, and what else our op is the faster one for."""
        req_ids, choice = self.input_batch.req_ids, self._op_choice
        if choice.decodes and choice.prompts:
            return np.ones(len(req_ids), dtype=np.bool_)
        num_scheduled = scheduler_output.num_scheduled_tokens
        drafts = self._step.matched.tokens if self._draws_trees() else {}
        by_rows = [choice.decodes if num_scheduled[r] == 1 else choice.prompts for r in req_ids]
        # Bool also for a step that only ends requests and has none.
        return np.logical_or(by_rows, [r in drafts for r in req_ids])

    # ---- step: inputs and attention

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        step = self._step
        rows = None
        starts = self.query_start_loc.np[: self.input_batch.num_reqs + 1].astype(np.int64)
        if step.trees is not None:
            step.root_rows = starts[1:] - step.trees.num_nodes - 1
        if step.num_masked_reqs:
            with CLOCK.span("tree layout"):
                rows = self._masked_rows(step, starts[: step.num_masked_reqs + 1])
        for builder in self._builders():
            builder.masked_rows = rows
        return prepared

    def _calc_spec_decode_metadata(
        self, num_draft_tokens: np.ndarray, cu_num_scheduled_tokens: np.ndarray
    ) -> SpecDecodeMetadata:
        """Only which rows get logits: the walk needs none of what vLLM's rejection sampler does."""
        num_sampled = num_draft_tokens + 1
        cu_num_sampled = np.cumsum(num_sampled)
        first = cu_num_scheduled_tokens - cu_num_sampled  # scheduled rows without logits before it
        logits_indices = np.arange(cu_num_sampled[-1]) + np.repeat(first, num_sampled)
        unused = torch.empty(0, dtype=torch.int32)
        return SpecDecodeMetadata(
            draft_token_ids=unused,
            num_draft_tokens=num_draft_tokens.tolist(),
            cu_num_draft_tokens=unused,
            cu_num_sampled_tokens=unused,
            target_logits_indices=unused,
            bonus_logits_indices=unused,
            logits_indices=torch.from_numpy(logits_indices),
        )

    def _masked_rows(self, step: Step, starts: Ints) -> MaskedRows:
        """Positions follow the depth (slots were computed from the row index, which is what KV needs)."""
        trees, count = step.attending(), step.num_masked_reqs
        context_lens = self.input_batch.num_computed_tokens_cpu[:count].astype(np.int64)
        placed = trees.placed(context_lens, starts, PIECE_ROWS)
        if step.trees is not None:
            self.positions[: placed.positions.size] = torch.from_numpy(placed.positions)
        block_table = self.input_batch.block_table[self.drafter.kv_cache_gid].get_device_tensor(
            count
        )
        return MaskedRows.of(placed, block_table)

    def _builders(self) -> list[HeteroSpecCPUAttentionMetadataBuilder]:
        return [group.get_metadata_builder(0) for groups in self.attn_groups for group in groups]

    # ---- step: verification

    def _sample(
        self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        with self.controller.sampling():
            return self._walk_or_sample(logits)

    def _walk_or_sample(self, logits: torch.Tensor | None) -> SamplerOutput:
        step = self._step
        metadata = self._without_discarded_generators()
        assert logits is not None
        requests = [self.requests[req_id] for req_id in self.input_batch.req_ids]
        grammar, self._grammar_output = self._grammar_output, None
        with CLOCK.span("row changes"):
            changes = self._row_changer.of_step(requests, step.trees, grammar)
        if step.trees is None:
            with CLOCK.span("walk"):
                return self.scorer.sample_plain(logits, metadata, changes)
        assert step.root_rows is not None
        with CLOCK.span("walk"):
            step.walked, output = self.scorer.walk(
                step.trees,
                logits,
                metadata,
                self._batch_stops(),
                changes,
                [request.output_token_ids for request in requests],
            )
        slot_mapping = self.input_batch.block_table[self.drafter.kv_cache_gid].slot_mapping.gpu
        with CLOCK.span("compaction"):
            moves = self.scorer.compact(
                step.walked, step.root_rows, slot_mapping, self._target_kv_caches(), self._isa
            )
        with CLOCK.span("counters"):
            self.counters.record_walk(step.trees, step.walked, moves.num_moves)
        with CLOCK.span("learn"):
            self.controller.learn(step.trees, step.walked, self._kinds())
        return output

    def _batch_stops(self) -> Stops:
        batch, num_reqs = self.input_batch, self.input_batch.num_reqs
        return self._stops(
            batch.req_ids,
            batch.num_prompt_tokens[:num_reqs].astype(np.int64),
            batch.num_tokens_no_spec[:num_reqs].astype(np.int64),
            lambda req: self.requests[batch.req_ids[req]].output_token_ids,
        )

    def _kinds(self) -> Ints:
        """[num_reqs] by temperature, rules and grammar; in the order of the step's batch."""
        step, batch = self._step, self.input_batch
        if step.kinds is None:
            step.kinds = (batch.temperature_cpu[: batch.num_reqs] > 0).astype(np.int64)
            self._row_changer.put_kinds(batch.req_ids, step.kinds)
        return step.kinds

    def _without_discarded_generators(self):
        """Rows of unfinished prefills are sampled and thrown away: their seeds must not be drawn."""
        metadata = self.input_batch.sampling_metadata
        discarded = self._discarded_with_generator()
        if not discarded:
            return metadata
        kept = {i: g for i, g in metadata.generators.items() if i not in discarded}
        return replace(metadata, generators=kept)

    def _discarded_with_generator(self) -> list[int]:
        discard = self.discard_request_mask.np
        return [i for i in self.input_batch.generators if discard[i]]

    def _bookkeeping_sync(self, *args, **kwargs):
        """vLLM rewinds discarded rows' generators by an offset that CPU generators do not have.

        They were not drawn from (``_sample``), so they are hidden from it.
        """
        generators = self.input_batch.generators
        hidden = {i: generators.pop(i) for i in self._discarded_with_generator()}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(hidden)

    def _get_nans_in_logits(self, logits: torch.Tensor | None) -> dict[str, int]:
        """vLLM takes a request's place in the batch for its row, so it gets one row a request: the root's."""
        trees = self._step.trees
        if logits is not None and trees is not None:
            logits = logits[torch.from_numpy(root_logits(trees.num_nodes))]
        return super()._get_nans_in_logits(logits)

    def _target_kv_caches(self) -> list[torch.Tensor]:
        if not self._kv_caches_of_target:
            draft_layers = self.drafter._draft_attn_layer_names
            context = self.compilation_config.static_forward_context
            names = [n for g in self.kv_cache_config.kv_cache_groups for n in g.layer_names]
            self._kv_caches_of_target = [
                context[n].kv_cache for n in names if n not in draft_layers
            ]
        return self._kv_caches_of_target

    @property
    def _isa(self) -> str:
        """vLLM's name of the layout of the pages, the same in every layer."""
        return self._builders()[0].isa

    def initialize_kv_cache(self, *args, **kwargs) -> None:
        self._kv_caches_of_target = []
        super().initialize_kv_cache(*args, **kwargs)
        block_size = self.input_batch.block_table[self.drafter.kv_cache_gid].block_size
        self.drafter.start_reading(self.kv_cache_config.num_blocks, block_size)

    def _forget(self, req_id: str) -> None:
        super()._forget(req_id)
        self._row_changer.forget(req_id)

    def _update_streaming_request(self, req_id: str, new_req_data) -> CachedRequestState:
        """A session's next input may bring other sampling parameters: it is judged like a new request."""
        self._forget(req_id)
        return super()._update_streaming_request(req_id, new_req_data)

    def _on_request_state_removed(self, req_id: str, req_state) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self._forget(req_id)
        self._arrival_seeds.remove(req_id)
