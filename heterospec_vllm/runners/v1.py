# SPDX-License-Identifier: Apache-2.0
"""Model Runner V1 with tree speculation: a thin adapter between vLLM's step and the proposer and scorer.

One step: ``execute_model`` matches the scheduled drafts with their trees -> ``_may_reorder_batch`` puts tree
requests first -> ``_prepare_inputs`` rewrites positions and hands the attention builders the tree rows -> target
forward -> ``_sample`` walks and compacts -> ``propose_draft_token_ids`` drafts the next trees.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from heterospec_vllm.attention.cpu import HeteroSpecCPUAttentionMetadataBuilder
from heterospec_vllm.catch_up import HeadProgress
from heterospec_vllm.config import (
    ConfigSource,
    HeteroSpecConfig,
    from_vllm_config,
    metrics_file_of,
    parse,
)
from heterospec_vllm.controller import Controller
from heterospec_vllm.cost import StepCosts
from heterospec_vllm.drafter import HeteroSpecProposer
from heterospec_vllm.fallback import awaits_min_tokens, fallback_reason, most_nodes
from heterospec_vllm.kernels.tree_attention_cpu import is_available
from heterospec_vllm.marginal import make_policy
from heterospec_vllm.metrics import StepCounters
from heterospec_vllm.metrics_file import open_metrics_file
from heterospec_vllm.policies import DraftPolicy, PlainPolicy
from heterospec_vllm.policy import TreeShape
from heterospec_vllm.profile import load_profile, machine_name
from heterospec_vllm.runners.measure import measure_costs
from heterospec_vllm.runners.step import Step, true_rows, with_drafts, without_speculation
from heterospec_vllm.scorer import TreeScorer
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.trace import (
    CostRecorder,
    TracePolicy,
    TraceRecorder,
)
from heterospec_vllm.tree import Ints
from heterospec_vllm.true_tokens import TrueTokens

logger = init_logger(__name__)


class HeteroSpecCPUModelRunner(CPUModelRunner):
    """vLLM's CPU runner; every override calls the original and adds what a tree needs."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        config = from_vllm_config(vllm_config)
        assert config is not None
        self._config: HeteroSpecConfig = config
        self.drafter = HeteroSpecProposer(vllm_config, device, self)
        self.scorer = TreeScorer(self.sampler)
        self.controller = Controller(self.drafter, PlainPolicy(TreeShape(1, 1, 1)))
        self._profile = None if config.profile is None else load_profile(Path(config.profile))
        self._costs: StepCosts | None = None
        # What a policy has learned outlives a switch to another one.
        self._policies: dict[HeteroSpecConfig, DraftPolicy] = {}
        self._plain_reasons: dict[str, str | None] = {}
        self._node_caps: dict[str, int] = {}
        self._logged_reasons: set[str] = set()
        self._step = Step({})
        self._kv_caches_of_target: list[torch.Tensor] = []
        path = metrics_file_of(vllm_config)
        self._metrics_file = open_metrics_file(path) if path is not None else None
        # vLLM drops min_p and logit_bias as soon as a speculative config exists; the walk samples with vLLM's
        # own sampler row by row, so the full set is right for it.
        self.input_batch.logitsprocs = build_logitsprocs(
            without_speculation(vllm_config),
            device,
            PIN_MEMORY,
            self.is_pooling_model,
            (),
        )

    @property
    def counters(self) -> StepCounters:
        return self.controller.counters

    def start_policy(self) -> None:
        """The configured policy, once the engine is warm."""
        self.set_policy(self._config.policy)

    def set_policy(self, policy: str, **options: Any) -> None:
        """Switch what is drafted from the next step on; the options are those of the config."""
        # Without the profile's path: the profile was checked and loaded at start.
        given = {**self._config.model_dump(), "profile": None, "policy": policy, **options}
        config = parse(ConfigSource(given, None))
        if not is_available() and config.policy not in ("plain", "chain"):
            config = parse(ConfigSource({**given, "policy": "chain"}, None))
        if config not in self._policies:
            costs = self._measured_costs() if config.policy == "marginal" else None
            self._policies[config] = make_policy(config, self.num_spec_tokens, self._profile, costs)
        self.controller.policy = self._policies[config]

    def _measured_costs(self) -> StepCosts:
        """The profile's tables where it was made on this machine, else a measurement of a few seconds, made once."""
        if self._costs is None:
            profile = self._profile
            if profile is not None and profile.machine == machine_name():
                self._costs = StepCosts.from_dict(profile.costs.model_dump())
            else:
                if profile is not None:
                    logger.info(
                        "heterospec: the profile was made on '%s', this is '%s': its strata and "
                        "survivals are used, costs are measured anew.",
                        profile.machine,
                        machine_name(),
                    )
                self._costs = measure_costs(self, self.drafter)
        return self._costs

    def record_trace(self, on: bool) -> dict[str, Any] | None:
        """Start recording drafts (under the trace policy), or stop and return what was recorded."""
        controller = self.controller
        if on:
            config = self._config
            controller.recorder = TraceRecorder()
            controller.policy = TracePolicy(
                TreeShape(self.num_spec_tokens, config.max_depth, config.top_k)
            )
            return None
        recorder, controller.recorder = controller.recorder, None
        self.start_policy()
        return None if recorder is None else recorder.arrays()

    def record_costs(self, trees: list[tuple[int, int, int]]) -> None:
        """Draft trees of fixed (nodes, depth, top_k) in turns, 0 nodes for none, and note what everything costs."""
        shapes = [TreeShape(*tree) if tree[0] else None for tree in trees]
        self.controller.policy = CostRecorder(shapes)

    def recorded_costs(self) -> dict[str, list] | None:
        """What was noted since :meth:`record_costs`; the configured policy is back afterwards."""
        policy = self.controller.policy
        self.start_policy()
        return policy.samples() if isinstance(policy, CostRecorder) else None

    def read_counters(self, reset: bool) -> dict[str, Any]:
        counters = self.counters.as_dict()
        if reset:
            self.controller.counters = StepCounters()
        return counters

    # ---- step: match scheduled drafts with their trees

    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors=None):
        with CLOCK.span("execute_model"):
            with CLOCK.span("match drafts"):
                self._step, scheduler_output = self._match_drafts(scheduler_output)
            self.counters.steps += bool(scheduler_output.total_num_scheduled_tokens)
            return super().execute_model(scheduler_output, intermediate_tensors)

    def sample_tokens(self, grammar_output):
        with CLOCK.span("sample_tokens"):
            output = super().sample_tokens(grammar_output)
        if self._metrics_file is not None:
            self._metrics_file.publish(self.counters)
        return output

    def _model_forward(self, *args, **kwargs):
        with CLOCK.span("target forward"):
            return super()._model_forward(*args, **kwargs)

    def _match_drafts(self, scheduler_output: SchedulerOutput) -> tuple[Step, SchedulerOutput]:
        """What is verified of the scheduled drafts, written into a copy of the scheduler's output.

        In-process the scheduler reads its own object when it counts rejections, so that one is never changed.
        """
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        num_tokens = scheduler_output.total_num_scheduled_tokens
        verified = self.controller.match(
            scheduled, num_tokens, len(scheduler_output.num_scheduled_tokens)
        )
        if scheduled:
            scheduler_output = with_drafts(scheduler_output, verified)
        return Step(verified, scheduler_output.total_num_scheduled_tokens), scheduler_output

    def _may_reorder_batch(self, scheduler_output: SchedulerOutput) -> None:
        """Requests that attend as trees first; chains need no mask and stay with vLLM's own kernel."""
        super()._may_reorder_batch(scheduler_output)
        step = self._step
        if not step.verified:
            return
        batch = self.input_batch
        trees = self.controller.trees_for(batch.req_ids)
        is_tree = ~trees.is_chain
        step.num_tree_reqs = int(is_tree.sum())
        if not is_tree[: step.num_tree_reqs].all():
            late = np.nonzero(is_tree[step.num_tree_reqs :])[0] + step.num_tree_reqs
            early = np.nonzero(~is_tree[: step.num_tree_reqs])[0]
            for i, j in zip(early.tolist(), late.tolist(), strict=True):
                batch.swap_states(i, j)
            trees = self.controller.trees_for(batch.req_ids)
        step.trees = trees

    # ---- step: inputs and attention

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        step = self._step
        rows = None
        if step.trees is not None:
            num_reqs = self.input_batch.num_reqs
            ends = self.query_start_loc.np[1 : num_reqs + 1].astype(np.int64)
            step.root_rows = ends - step.trees.num_nodes - 1
            if step.num_tree_reqs:
                with CLOCK.span("tree layout"):
                    rows = self._place_trees(step)
        for builder in self._builders():
            builder.step_trees = rows
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

    def _place_trees(self, step: Step):
        """Positions follow the depth (slots were computed from the row index, which is what KV needs)."""
        assert step.trees is not None and step.root_rows is not None
        count = step.num_tree_reqs
        trees = step.trees.take(np.arange(count), step.trees.num_nodes[:count])
        context_lens = self.input_batch.num_computed_tokens_cpu[:count].astype(np.int64)
        real = np.arange(trees.max_nodes + 1) <= trees.num_nodes[:, None]
        positions = context_lens[:, None] + trees.depths
        num_tokens = int(trees.num_nodes.sum()) + count
        self.positions[:num_tokens] = torch.from_numpy(positions[real])
        block_table = self.input_batch.block_table[self.drafter.kv_cache_gid].get_device_tensor(
            count
        )
        return self.scorer.attention_rows(trees, context_lens, block_table)

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
        if step.trees is None:
            assert logits is not None
            return self.scorer.sample_plain(logits, metadata)
        assert step.root_rows is not None and logits is not None
        with CLOCK.span("walk"):
            step.walked, output = self.scorer.walk(step.trees, logits, metadata)
        slot_mapping = self.input_batch.block_table[self.drafter.kv_cache_gid].slot_mapping.gpu
        with CLOCK.span("compaction"):
            moves = self.scorer.compact(
                step.walked, step.root_rows, slot_mapping, self._target_kv_caches()
            )
        with CLOCK.span("counters"):
            self.counters.record_walk(step.trees, step.walked, moves.num_moves)
        with CLOCK.span("learn"):
            self.controller.learn(step.trees, step.walked, self._temperatures())
        return output

    def _temperatures(self) -> Ints:
        """[num_reqs] 0 for greedy requests, 1 for sampled ones."""
        return (self.input_batch.temperature_cpu[: self.input_batch.num_reqs] > 0).astype(np.int64)

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

    def _target_kv_caches(self) -> list[torch.Tensor]:
        if not self._kv_caches_of_target:
            draft_layers = self.drafter._draft_attn_layer_names
            context = self.compilation_config.static_forward_context
            names = [n for g in self.kv_cache_config.kv_cache_groups for n in g.layer_names]
            self._kv_caches_of_target = [
                context[n].kv_cache for n in names if n not in draft_layers
            ]
        return self._kv_caches_of_target

    def initialize_kv_cache(self, *args, **kwargs) -> None:
        self._kv_caches_of_target = []
        super().initialize_kv_cache(*args, **kwargs)
        block_size = self.input_batch.block_table[self.drafter.kv_cache_gid].block_size
        self.controller.progress = HeadProgress(self.kv_cache_config.num_blocks, block_size)

    # ---- step: drafting

    def _input_fits_in_drafter(self, common_attn_metadata) -> bool:
        """Each request is bounded on its own; one long request never stops the others' drafts."""
        return common_attn_metadata is not None

    def propose_draft_token_ids(
        self,
        scheduler_output,
        sampled_token_ids,
        sampling_metadata,
        hidden_states,
        sample_hidden_states,
        aux_hidden_states,
        spec_decode_metadata,
        common_attn_metadata,
        slot_mappings,
    ) -> list[list[int]]:
        req_ids = self.input_batch.req_ids
        limits = self._max_nodes(sampled_token_ids)
        followed = np.array([self._reason(req_id) is None for req_id in req_ids])
        tokens = self._true_tokens(
            scheduler_output, sampled_token_ids, aux_hidden_states, common_attn_metadata
        )
        with CLOCK.span("draft"):
            return self.controller.draft(
                req_ids,
                tokens,
                limits,
                followed,
                self._temperatures(),
                self._step.num_tokens,
            )

    def _max_nodes(self, sampled_token_ids: list[list[int]]) -> Ints:
        """[num_reqs] nodes each request may get: none without a new token or for one that decodes plainly."""
        # Trees may take half of a step's token budget; the rest is for prompts that wait.
        room = self.scheduler_config.max_num_batched_tokens // 2 // self.input_batch.num_reqs - 1
        limit = max(0, min(self.num_spec_tokens, room))
        caps = []
        for req_id, emitted in zip(self.input_batch.req_ids, sampled_token_ids, strict=True):
            if not emitted or self._reason(req_id) is not None:
                caps.append(0)
                continue
            caps.append(
                0
                if awaits_min_tokens(self.requests[req_id])
                else min(limit, self._node_caps[req_id])
            )
        return np.array(caps)

    def _reason(self, req_id: str) -> str | None:
        """Why a request decodes plainly (decided once a request, logged once a reason, counted)."""
        if req_id not in self._plain_reasons:
            request = self.requests[req_id]
            self._node_caps[req_id] = most_nodes(request)
            self._set_reason(req_id, fallback_reason(request))
        elif self._plain_reasons[req_id] is None and self.controller.progress is not None:
            lost = self.controller.progress.lost(req_id)
            if lost is not None:
                self._set_reason(req_id, lost)
        return self._plain_reasons[req_id]

    def _set_reason(self, req_id: str, reason: str | None) -> None:
        self._plain_reasons[req_id] = reason
        if reason is not None:
            self.counters.fallbacks[reason] += 1
            if reason not in self._logged_reasons:
                self._logged_reasons.add(reason)
                logger.info("Requests with %s decode without speculation.", reason)

    def _true_tokens(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: list[list[int]],
        aux_hidden_states: list[torch.Tensor],
        common_attn_metadata,
    ) -> TrueTokens:
        """All rows of requests that verified nothing, the walked rows of the others."""
        num_reqs = self.input_batch.num_reqs
        next_token_ids = self.drafter.prepare_next_token_ids_cpu(
            sampled_token_ids,
            self.requests,
            self.input_batch,
            scheduler_output.num_scheduled_tokens,
        )
        starts = self.query_start_loc.np[: num_reqs + 1].astype(np.int64)
        rows, num_tokens = true_rows(self._step, starts)
        index = torch.from_numpy(rows)
        return TrueTokens(
            token_ids=self.input_ids.gpu[index],
            positions=self.positions[index],
            features=torch.cat([hidden[index] for hidden in aux_hidden_states], dim=-1),
            num_tokens=num_tokens,
            next_token_ids=next_token_ids,
            block_table=common_attn_metadata.block_table_tensor[:num_reqs],
        )

    def _on_request_state_removed(self, req_id: str, req_state) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self.controller.remove(req_id)
        self._plain_reasons.pop(req_id, None)
        self._node_caps.pop(req_id, None)
