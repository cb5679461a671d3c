# SPDX-License-Identifier: Apache-2.0
"""Model Runner V1 with tree speculation: a thin adapter between vLLM's step and the proposer and scorer.

One step: ``execute_model`` matches the scheduled drafts with their trees -> ``_may_reorder_batch`` puts tree
requests first -> ``_prepare_inputs`` rewrites positions and hands the attention builders the tree rows -> target
forward -> ``_sample`` walks and compacts -> ``propose_draft_token_ids`` drafts the next trees.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
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
from heterospec_vllm.config import ConfigSource, HeteroSpecConfig, from_vllm_config, parse
from heterospec_vllm.drafter import HeteroSpecProposer, TrueTokens
from heterospec_vllm.fallback import awaits_min_tokens, fallback_reason, most_nodes
from heterospec_vllm.kernels.tree_attention_cpu import is_available
from heterospec_vllm.metrics import StepCounters
from heterospec_vllm.policy import TreeShape, tree_shape
from heterospec_vllm.scorer import TreeScorer
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree import DraftTrees, Ints
from heterospec_vllm.verify import Walk

logger = init_logger(__name__)


@dataclass(frozen=True)
class _Draft:
    """A request's place in the batch of trees that was drafted together."""

    trees: DraftTrees
    req: int
    tokens: list[int]


@dataclass
class _Step:
    """What the hooks of one step share: trees in batch order and where their rows lie."""

    num_scheduled: dict[str, int]  # verified draft nodes by request
    trees: DraftTrees | None = (
        None  # [num_reqs], in the order of the batch; None where nothing is verified
    )
    num_tree_reqs: int = 0  # leading requests that attend as trees
    root_rows: Ints | None = None  # [num_reqs] token row of each root
    walked: Walk | None = None


class HeteroSpecCPUModelRunner(CPUModelRunner):
    """vLLM's CPU runner; every override calls the original and adds what a tree needs."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        config = from_vllm_config(vllm_config)
        assert config is not None
        self._config: HeteroSpecConfig = config
        self._shape: TreeShape | None = None
        self.drafter = HeteroSpecProposer(vllm_config, device, self)
        self.scorer = TreeScorer(self.sampler)
        self.counters = StepCounters()
        self._drafts: dict[str, _Draft] = {}
        self._plain_reasons: dict[str, str | None] = {}
        self._node_caps: dict[str, int] = {}
        self._logged_reasons: set[str] = set()
        self._step = _Step({})
        self._kv_caches_of_target: list[torch.Tensor] = []
        # vLLM drops min_p and logit_bias as soon as a speculative config exists; the walk samples with vLLM's
        # own sampler row by row, so the full set is right for it.
        self.input_batch.logitsprocs = build_logitsprocs(
            _without_speculation(vllm_config),
            device,
            PIN_MEMORY,
            self.is_pooling_model,
            (),
        )
        self.set_policy(config.policy)

    def set_policy(self, policy: str, **bounds: int) -> None:
        """Switch what is drafted from the next step on.

        Requests in flight whose tokens the head has not seen (they were decoded under ``plain``) finish plainly.
        """
        options = {**self._config.model_dump(), "policy": policy, **bounds}
        config = parse(ConfigSource(options, None))
        limit = self.num_spec_tokens
        name = config.policy if config.policy == "plain" or is_available() else "chain"
        shape = tree_shape(
            name, min(config.num_speculative_tokens, limit), config.max_depth, config.top_k
        )
        if self._shape is None and shape is not None:
            for req_id in self.requests:
                self._plain_reasons[req_id] = "tokens_unseen_by_head"
            self.counters.fallbacks["tokens_unseen_by_head"] += len(self.requests)
        self._shape = shape

    def read_counters(self, reset: bool) -> dict[str, Any]:
        counters = self.counters.as_dict()
        if reset:
            self.counters = StepCounters()
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
            return super().sample_tokens(grammar_output)

    def _model_forward(self, *args, **kwargs):
        with CLOCK.span("target forward"):
            return super()._model_forward(*args, **kwargs)

    def _match_drafts(self, scheduler_output: SchedulerOutput) -> tuple[_Step, SchedulerOutput]:
        """Scheduled drafts that are a prefix of their request's tree stay; others (padding) are dropped.

        Dropping happens on a copy: in-process the scheduler reads its own object when it counts rejections.
        """
        num_nodes: dict[str, int] = {}
        dropped: dict[str, int] = {}
        for req_id, token_ids in scheduler_output.scheduled_spec_decode_tokens.items():
            draft = self._drafts.get(req_id)
            count = len(token_ids)
            if draft is not None and draft.tokens[:count] == token_ids:
                num_nodes[req_id] = count
            else:
                dropped[req_id] = count
        if dropped:
            self.counters.dropped_drafts += len(dropped)
            scheduler_output = _without_drafts(scheduler_output, dropped)
        return _Step(num_nodes), scheduler_output

    def _may_reorder_batch(self, scheduler_output: SchedulerOutput) -> None:
        """Requests that attend as trees first; chains need no mask and stay with vLLM's own kernel."""
        super()._may_reorder_batch(scheduler_output)
        step = self._step
        if not step.num_scheduled:
            return
        batch = self.input_batch
        trees = self._trees_in_batch_order()
        is_tree = ~trees.is_chain
        step.num_tree_reqs = int(is_tree.sum())
        if not is_tree[: step.num_tree_reqs].all():
            late = np.nonzero(is_tree[step.num_tree_reqs :])[0] + step.num_tree_reqs
            early = np.nonzero(~is_tree[: step.num_tree_reqs])[0]
            for i, j in zip(early.tolist(), late.tolist(), strict=True):
                batch.swap_states(i, j)
            trees = self._trees_in_batch_order()
        step.trees = trees

    def _trees_in_batch_order(self) -> DraftTrees:
        drafts = [
            self._drafts[req_id] if req_id in self._step.num_scheduled else None
            for req_id in self.input_batch.req_ids
        ]
        counts = np.array([self._step.num_scheduled.get(r, 0) for r in self.input_batch.req_ids])
        sources: list[DraftTrees] = []
        for draft in drafts:
            if draft is not None and not any(draft.trees is s for s in sources):
                sources.append(draft.trees)
        source = sources[0] if len(sources) == 1 else DraftTrees.concatenate(sources)
        offsets = dict(
            zip(
                map(id, sources),
                np.cumsum([0, *(s.num_reqs for s in sources)]).tolist(),
                strict=False,
            )
        )
        reqs = np.array([0 if d is None else offsets[id(d.trees)] + d.req for d in drafts])
        return source.take(reqs, counts)

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

    def _place_trees(self, step: _Step):
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
        return output

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
        for req_id in req_ids:
            self._drafts.pop(req_id, None)
        if self._shape is None:
            return [[] for _ in req_ids]
        max_nodes = self._max_nodes(sampled_token_ids)
        true_tokens = self._true_tokens(scheduler_output, sampled_token_ids)
        trees = self.drafter.propose_trees(
            self._shape,
            max_nodes,
            true_tokens,
            self.input_ids.gpu,
            self.positions,
            aux_hidden_states,
            common_attn_metadata,
        )
        self.counters.draft_steps += bool(max_nodes.any())
        drafts = [
            tokens[:count]
            for tokens, count in zip(trees.tokens.tolist(), trees.num_nodes.tolist(), strict=True)
        ]
        for i, (req_id, tokens) in enumerate(zip(req_ids, drafts, strict=True)):
            if tokens:
                self._drafts[req_id] = _Draft(trees, i, tokens)
        return drafts

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
            reason = fallback_reason(request)
            self._plain_reasons[req_id] = reason
            self._node_caps[req_id] = most_nodes(request)
            if reason is not None:
                self.counters.fallbacks[reason] += 1
                if reason not in self._logged_reasons:
                    self._logged_reasons.add(reason)
                    logger.info("Requests with %s decode without speculation.", reason)
        return self._plain_reasons[req_id]

    def _true_tokens(
        self, scheduler_output: SchedulerOutput, sampled_token_ids: list[list[int]]
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
        step = self._step
        if step.walked is None:
            rows = np.arange(starts[-1])
            return TrueTokens(torch.from_numpy(rows), np.diff(starts), next_token_ids)
        assert step.root_rows is not None
        walked = step.walked.rows
        before = step.root_rows - starts[:-1]  # rows before the root: prompt chunks
        width = int(before.max()) + walked.shape[1]
        column = np.arange(width)
        rows = np.where(column < before[:, None], starts[:-1, None] + column, -1)
        depth = column - before[:, None]
        on_path = (depth >= 0) & (depth < step.walked.num_emitted[:, None])
        path = np.take_along_axis(walked, np.clip(depth, 0, walked.shape[1] - 1), axis=1)
        rows = np.where(on_path, step.root_rows[:, None] + path, rows)
        num_tokens = before + step.walked.num_emitted
        return TrueTokens(torch.from_numpy(rows[rows >= 0]), num_tokens, next_token_ids)

    def _on_request_state_removed(self, req_id: str, req_state) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self._drafts.pop(req_id, None)
        self._plain_reasons.pop(req_id, None)
        self._node_caps.pop(req_id, None)


def _without_drafts(scheduler_output: SchedulerOutput, dropped: dict[str, int]) -> SchedulerOutput:
    """A copy of the scheduler's output in which some requests verify no drafts."""
    num_scheduled = dict(scheduler_output.num_scheduled_tokens)
    for req_id, count in dropped.items():
        num_scheduled[req_id] -= count
    drafts = scheduler_output.scheduled_spec_decode_tokens
    return replace(
        scheduler_output,
        num_scheduled_tokens=num_scheduled,
        total_num_scheduled_tokens=scheduler_output.total_num_scheduled_tokens
        - sum(dropped.values()),
        scheduled_spec_decode_tokens={r: t for r, t in drafts.items() if r not in dropped},
    )


def _without_speculation(vllm_config: VllmConfig) -> VllmConfig:
    """A shallow copy whose only use is to be asked whether speculation is configured."""
    plain = copy(vllm_config)
    plain.speculative_config = None
    return plain
