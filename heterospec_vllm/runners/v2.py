# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 with tree speculation: a thin adapter, "tree in, chain out", over the decisions that V1 uses.

One step: ``execute_model`` matches the scheduled drafts with their trees -> ``prepare_inputs`` puts their tokens where
vLLM reads drafts -> ``prepare_attn`` rewrites positions and hands the attention builders the tree rows -> target
forward -> ``sample`` walks and compacts -> vLLM's bookkeeping sees accepted and rejected counts, as of a chain ->
the speculator's ``propose`` comes back to ``_draft`` for the next trees.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config

from heterospec_vllm.arrays import Bools, Ints
from heterospec_vllm.config import WHOLE_DRAFTS_SCHEDULER
from heterospec_vllm.draft.accepted_tokens import AcceptedTokens
from heterospec_vllm.draft.base import StepOutput
from heterospec_vllm.draft.eagle_v2 import EagleDrafterV2, tree_reason_of
from heterospec_vllm.engine.step import Step, accepted_rows
from heterospec_vllm.kernels.gpu.kv_compact import KVLayers
from heterospec_vllm.layers.attention_gpu import StepTrees, TreeBuilder
from heterospec_vllm.plugin.head import load as head_config
from heterospec_vllm.plugin.head_loading import loading_head
from heterospec_vllm.policy.survival import CONSTRAINED, RULED
from heterospec_vllm.runners.grammars import Grammars
from heterospec_vllm.runners.shared import SpeculatingRunner, logger
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify.scorer_v2 import DeviceScorer
from heterospec_vllm.verify.stops import Stops


class HeteroSpecGPUModelRunner(SpeculatingRunner, GPUModelRunner):
    """vLLM's runner; every override calls the original and adds what a tree needs."""

    speculator: EagleDrafterV2

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.speculator = EagleDrafterV2(vllm_config, device)
        self.speculator.on_propose = self._draft
        self.start_speculation(vllm_config, self.speculator)
        self._grammars = Grammars(vllm_config)
        self._outputs: dict[str, list[int]] = {}  # of requests with a grammar
        self._unready: set[str] = set()  # requests whose grammar is still being compiled
        self._sampled: torch.Tensor | None = None  # [num_reqs, 1] of a step without trees
        whole = vllm_config.scheduler_config.scheduler_cls == WHOLE_DRAFTS_SCHEDULER
        self._leaves_drafts_whole = whole
        self._unsupported = frozenset(() if whole else ("structured_output",))
        self._requests: dict[str, NewRequestData] = {}
        self._drafts: DraftTokenIds | None = None
        self._layers: KVLayers | None = None
        self._tree_reason: str | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with loading_head(self._config.model, self.model_config):
            super().load_model(*args, **kwargs)
        nested = head_config(self._config.model).eagle_config.eagle_aux_hidden_state_layer_ids
        if nested and get_eagle3_aux_layers_from_config(self.speculative_config) is None:
            # V2 does not look where V1 finds a head's aux layers, and takes default ones.
            self.model.set_aux_hidden_state_layers(tuple(nested))
        assert self.sampler is not None
        self.scorer = DeviceScorer(self.sampler)
        self.rejection_sampler = self.scorer

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)
        self._layers = None
        self._target_gid = next(
            i
            for i, group in enumerate(self.kv_cache_config.kv_cache_groups)
            if set(group.layer_names) - self.speculator.draft_attn_layer_names
        )
        gid = self.speculator.kv_cache_gid
        self.speculator.start_reading(
            self.kv_cache_config.num_blocks, self.block_tables.block_sizes[gid]
        )
        reason = tree_reason_of(self.attn_groups) or self.speculator.tree_reason()
        if reason is not None and reason != self._tree_reason:
            logger.warning("heterospec drafts chains only, no trees: found %s", reason)
        self._tree_reason = reason

    def _draws_trees(self) -> bool:
        return self._tree_reason is None

    def _request(self, req_id: str) -> NewRequestData:
        return self._requests[req_id]

    # ---- requests

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            before = self._requests.get(request.req_id)
            if before is not None and before.sampling_params != request.sampling_params:
                # A session's next input, which is judged like a new request.
                self._forget(request.req_id)
            self._requests[request.req_id] = request
            self._start_grammar(request)

    def _start_grammar(self, request: NewRequestData) -> None:
        """Preempted requests come back as new ones: their grammar has followed them."""
        params = request.sampling_params
        if params is None or params.structured_outputs is None or not self._leaves_drafts_whole:
            return
        if request.prompt_token_ids is not None and request.req_id not in self._grammars:
            self._grammars.start(request.req_id, params, request.prompt_token_ids)
            self._outputs[request.req_id] = []

    def _forget(self, req_id: str) -> None:
        super()._forget(req_id)
        self._grammars.remove(req_id)
        self._outputs.pop(req_id, None)

    def _remove_request(self, req_id: str) -> bool:
        # Preempted requests, too, which come back as new ones.
        self.controller.remove(req_id)
        return super()._remove_request(req_id)

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().finish_requests(scheduler_output)
        for req_id in scheduler_output.finished_req_ids:
            self._requests.pop(req_id, None)
            self._forget(req_id)

    # ---- step: match scheduled drafts with their trees

    def execute_model(
        self,
        scheduler_output: SchedulerOutput,
        intermediate_tensors: Any = None,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Any:
        if dummy_run:
            self._step = Step()
        else:
            self._step, scheduler_output = self._match_drafts(scheduler_output)
            self.counters.steps += bool(scheduler_output.total_num_scheduled_tokens)
        self._hand_to_builders(None)
        with CLOCK.span("execute_model"):
            return super().execute_model(
                scheduler_output, intermediate_tensors, dummy_run=dummy_run, **kwargs
            )

    # ---- step: inputs and attention

    def prepare_inputs(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> InputBatch:
        step = self._step
        if step.matched.tokens:
            self._place_drafts(step.matched.tokens)
        batch = super().prepare_inputs(scheduler_output, *args, **kwargs)
        if step.matched.tokens:
            step.trees = step.matched.trees_of(batch.req_ids)
            ends = batch.query_start_loc_np[1 : batch.num_reqs + 1].astype(np.int64)
            step.root_rows = ends - step.trees.num_nodes - 1
            self.scorer.trees = step.trees
            self.scorer.stops = self._batch_stops(batch, step.root_rows)
            self.scorer.follows = np.array([self._looks_back(r) for r in batch.req_ids])
            if not step.trees.is_chain.all():
                # vLLM sorts requests with drafts to the front; a chain among trees is a tree, too.
                step.num_masked_reqs = int((step.trees.num_nodes > 0).sum())
        return batch

    def _looks_back(self, req_id: str) -> bool:
        """Whether a request's tokens depend on what it has emitted, beside the model."""
        params = self._requests[req_id].sampling_params
        return params is not None and bool(
            params.bad_words_token_ids
            or params.thinking_token_budget is not None
            or params.repetition_penalty != 1.0
            or params.presence_penalty
            or params.frequency_penalty
        )

    def _batch_stops(self, batch: InputBatch, root_rows: Ints) -> Stops:
        """Where requests stop; only those with trees are asked for, whose roots are their latest tokens."""
        starts = batch.query_start_loc_np[: batch.num_reqs]
        num_tokens = batch.num_computed_tokens_np + (root_rows - starts) + 1
        states = self.req_states
        prompt_lens = states.prompt_len.np[batch.idx_mapping_np].astype(np.int64)

        def outputs_of(req: int) -> list[int]:
            state = batch.idx_mapping_np[req]
            return states.all_token_ids.gpu[state, prompt_lens[req] : num_tokens[req]].tolist()

        return self._stops(batch.req_ids, prompt_lens, num_tokens, outputs_of)

    def _place_drafts(self, verified: dict[str, list[int]]) -> None:
        """The nodes of each tree where vLLM reads a request's draft tokens."""
        tokens = np.zeros((len(verified), self.num_speculative_steps), dtype=np.int64)
        for row, nodes in enumerate(verified.values()):
            tokens[row, : len(nodes)] = nodes
        states = [self.req_states.req_id_to_index[req_id] for req_id in verified]
        at = torch.tensor(states, device=self.device)
        self.req_states.draft_tokens[at] = torch.from_numpy(tokens).to(self.device)

    def prepare_attn(
        self, input_batch: InputBatch
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Slots follow the row, as KV needs; positions, from here on, the depth."""
        prepared = super().prepare_attn(input_batch)
        step = self._step
        if step.num_masked_reqs:
            trees, count = step.attending(), step.num_masked_reqs
            context_lens = input_batch.num_computed_tokens_np[:count].astype(np.int64)
            placed = trees.placed(context_lens)
            num_tokens = placed.positions.size
            positions = torch.from_numpy(placed.positions)
            input_batch.positions[:num_tokens] = positions.to(self.device)
            self._hand_to_builders(
                StepTrees(
                    num_reqs=count,
                    num_tokens=num_tokens,
                    max_rows=int(trees.num_nodes.max()) + 1,
                    ancestor_mask=torch.from_numpy(placed.ancestor_mask).to(self.device),
                )
            )
        return prepared

    def _hand_to_builders(self, trees: StepTrees | None) -> None:
        for groups in getattr(self, "attn_groups", ()):
            for group in groups:
                builder = group.get_metadata_builder(0)
                if isinstance(builder, TreeBuilder):
                    builder.step_trees = trees

    # ---- step: verification

    def sample(self, hidden_states: torch.Tensor, input_batch: InputBatch, grammar_output: Any):
        step = self._step
        if grammar_output is not None and step.trees is not None:
            grammar_output = self._with_nodes(grammar_output, input_batch.req_ids, step.trees)
        with self.controller.sampling(), CLOCK.span("walk"):
            output = super().sample(hidden_states, input_batch, grammar_output)
            if step.trees is None:
                self._sampled = output[0].sampled_token_ids
                return output
            step.walked = self.scorer.walked
        assert step.root_rows is not None
        with CLOCK.span("compaction"):
            slots = self.block_tables.slot_mappings[self._target_gid, : input_batch.num_tokens]
            num_moves = self.scorer.compact(self._target_layers(), slots, step.root_rows)
        self.counters.record_walk(step.trees, step.walked, num_moves)
        self.controller.learn(step.trees, step.walked, self._kinds(input_batch))
        return output

    def _with_nodes(
        self, grammar: GrammarOutput, req_ids: list[str], trees: DraftTrees
    ) -> GrammarOutput:
        """The engine's masks of roots with ours of the nodes behind them, a row each, as vLLM reads a chain's."""
        structured = grammar.structured_output_request_ids
        masks = self._grammars.masks_of_trees(
            req_ids, trees, structured, np.asarray(grammar.grammar_bitmask)
        )
        first = np.cumsum(trees.num_nodes + 1) - trees.num_nodes - 1
        places = [req_ids.index(req_id) for req_id in structured]
        rows = [
            masks.bits[masks.of_row[first[p] : first[p] + trees.num_nodes[p] + 1]] for p in places
        ]
        acceptable = [int(trees.num_nodes[place]) for place in places]
        return GrammarOutput(structured, np.concatenate(rows), acceptable)

    def _target_layers(self) -> KVLayers:
        """The target's caches; one KV cache group, as hybrid targets are refused."""
        if self._layers is None:
            names = self.kv_cache_config.kv_cache_groups[self._target_gid].layer_names
            context = self.compilation_config.static_forward_context
            draft = self.speculator.draft_attn_layer_names
            self._layers = KVLayers.of([context[n].kv_cache for n in names if n not in draft])
        return self._layers

    def _kinds(self, input_batch: InputBatch) -> Ints:
        """[num_reqs] by temperature, rules and grammar."""
        assert self.sampler is not None
        temperature = self.sampler.sampling_states.temperature.np
        kinds = (temperature[input_batch.idx_mapping_np] > 0).astype(np.int64)
        for place, req_id in enumerate(input_batch.req_ids):
            if req_id in self._grammars:
                kinds[place] += CONSTRAINED
            elif self._looks_back(req_id):
                kinds[place] += RULED
        return kinds

    # ---- step: drafting

    def sample_tokens(self, grammar_output: Any) -> Any:
        self._drafts = None
        with CLOCK.span("sample_tokens"):
            output = super().sample_tokens(grammar_output)
        self._publish()
        return output

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        return self._drafts

    def _draft(
        self, input_batch: InputBatch, aux_hidden_states: list[torch.Tensor], wanted: bool
    ) -> None:
        """Called by the speculator in place of its own drafting."""
        req_ids = input_batch.req_ids
        starts = input_batch.query_start_loc_np[: len(req_ids) + 1].astype(np.int64)
        rows, num_tokens = accepted_rows(self._step, starts)
        computed = input_batch.num_computed_tokens_np.astype(np.int64)
        # A request whose prompt is not read to its end emits nothing yet.
        emits = computed + np.diff(starts) >= input_batch.prefill_len_np
        self._follow_grammars(req_ids, emits)
        true_lens = computed + num_tokens
        prompt_lens = self.req_states.prompt_len.np[input_batch.idx_mapping_np]
        demand = self._demand(
            req_ids,
            emits.tolist(),
            np.maximum(0, true_lens + 1 - prompt_lens).tolist(),
            np.maximum(0, input_batch.prefill_len_np - computed - np.diff(starts)),
        )
        fits = true_lens <= self.speculator.max_context()
        demand = demand.only(fits & wanted)
        tokens = self._accepted_tokens(input_batch, aux_hidden_states, rows, num_tokens, emits)
        with CLOCK.span("draft"):
            constraints = self._grammars if self._grammars.any_of(req_ids) else None
            output = StepOutput(req_ids, tokens, demand, self._kinds(input_batch), constraints)
            drafts = self.controller.draft(output, self._step.num_tokens)
        self._drafts = DraftTokenIds(req_ids, drafts)

    def _follow_grammars(self, req_ids: list[str], emits: Bools) -> None:
        """Brings grammars up to what was emitted. Where there is one the host waits for a plain step's tokens."""
        self._unready.clear()
        if not self._grammars.any_of(req_ids):
            return
        walked = self._step.walked
        if walked is None:
            assert self._sampled is not None
            emitted = self._sampled.tolist()
        else:
            counts = walked.num_emitted.tolist()
            emitted = [row[:n] for row, n in zip(walked.tokens.tolist(), counts, strict=True)]
        for place, req_id in enumerate(req_ids):
            if req_id not in self._grammars:
                continue
            if emits[place]:
                self._outputs[req_id].extend(emitted[place])
            if not self._grammars.follow(req_id, self._outputs[req_id]):
                self._unready.add(req_id)
                if self._grammars.failed(req_id) and self._reason(req_id) is None:
                    self._set_reason(req_id, "grammar")

    def _can_be_drafted(self, req_id: str) -> bool:
        return req_id not in self._unready

    def _accepted_tokens(
        self,
        input_batch: InputBatch,
        aux_hidden_states: list[torch.Tensor],
        rows: Ints,  # [num_accepted_tokens] of the step
        num_tokens: Ints,  # [num_reqs]
        emits: np.ndarray,  # [num_reqs] bool
    ) -> AcceptedTokens:
        states = input_batch.idx_mapping
        index = torch.from_numpy(rows).to(self.device)
        next_token_ids = torch.where(
            torch.from_numpy(emits).to(self.device),
            self.req_states.last_sampled_tokens[states, 0],
            self.req_states.next_prefill_tokens[0, states],
        )
        table = self.block_tables.input_block_tables[self.speculator.kv_cache_gid]
        return AcceptedTokens(
            token_ids=input_batch.input_ids[index],
            positions=input_batch.positions[index],
            features=torch.cat([hidden[index] for hidden in aux_hidden_states], dim=-1),
            num_tokens=num_tokens,
            next_token_ids=next_token_ids.int(),
            block_table=table[: input_batch.num_reqs],
            context_starts=np.zeros(input_batch.num_reqs, dtype=np.int64),
        )
