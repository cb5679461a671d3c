# SPDX-License-Identifier: Apache-2.0
"""Drafting on Model Runner V1: after a step's tokens have left the engine, when it asks for the next drafts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from heterospec_vllm.arrays import Ints
from heterospec_vllm.draft.accepted_tokens import AcceptedTokens, gather_rows
from heterospec_vllm.draft.base import StepOutput
from heterospec_vllm.draft.eagle_v1 import EagleDrafterV1
from heterospec_vllm.engine.step import accepted_rows, prompt_left
from heterospec_vllm.runners.row_changes import RowChanger
from heterospec_vllm.runners.shared import SpeculatingRunner
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.verify.stops import repeats


@dataclass(frozen=True)
class _Undrafted:
    """What drafting needs of a step whose tokens have left."""

    scheduler_output: SchedulerOutput
    sampled_token_ids: list[list[int]]  # [num_reqs]
    aux_hidden_states: list[torch.Tensor]  # each [num_step_tokens, hidden_size]
    common_attn_metadata: CommonAttentionMetadata


class DraftingRunner(SpeculatingRunner, CPUModelRunner):
    """The half of the runner that follows a step; `v1.py` has the step."""

    drafter: EagleDrafterV1
    _row_changer: RowChanger
    _undrafted: _Undrafted | None = None
    # Requests whose grammar is still being compiled.
    _unready: frozenset[str] | set[str] = frozenset()

    def _kinds(self) -> Ints:
        """[num_reqs] by temperature, rules and grammar; in the order of the step's batch."""
        raise NotImplementedError

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
        """Nothing yet: drafting waits until the engine asks for the drafts (``take_draft_token_ids``)."""
        self.controller.end_step()
        # In one process the scheduler cuts the lists that it is given.
        sampled = [list(tokens) for tokens in sampled_token_ids]
        self._undrafted = _Undrafted(
            scheduler_output, sampled, aux_hidden_states, common_attn_metadata
        )
        return []

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """The engine asks once it has sent the step's tokens: no token waits for the next draft."""
        with CLOCK.span("take_draft_token_ids"):
            self._draft_next()
            return super().take_draft_token_ids()

    def _draft_next(self) -> None:
        """The next trees after the latest step, where they are still to be drafted."""
        if self._undrafted is None:
            return
        step, self._undrafted = self._undrafted, None
        with torch.inference_mode(), CLOCK.span("draft"):
            self._draft_token_ids = self._drafts_after(step)
        self._publish()

    def _drafts_after(self, step: _Undrafted) -> list[list[int]]:
        req_ids = self.input_batch.req_ids
        requests = [self.requests[req_id] for req_id in req_ids]
        outputs = [request.output_token_ids for request in requests]
        # No draft for a request that has just stopped: a session would keep it.
        emitted = [
            0 if repeats(request.sampling_params, request.output_token_ids) else len(tokens)
            for request, tokens in zip(requests, step.sampled_token_ids, strict=True)
        ]
        self._follow_grammars(req_ids, outputs)
        demand = self._demand(
            req_ids,
            emitted,
            [len(tokens) for tokens in outputs],
            self._prompt_left(),
            [tokens[-1] if tokens else None for tokens in outputs],
        )
        tokens = self._accepted_tokens(step)
        grammars = self._row_changer.grammars
        constraints = grammars if grammars.any_of(req_ids) else None
        output = StepOutput(req_ids, tokens, demand, self._kinds(), constraints)
        return self.controller.draft(output, self._step.num_tokens)

    def _follow_grammars(self, req_ids: list[str], outputs: list[list[int]]) -> None:
        """A request whose grammar is not ready is not drafted for; one whose grammar is lost never again."""
        self._unready = self._row_changer.unready(req_ids, outputs)
        for req_id in self._unready:
            if self._row_changer.grammars.failed(req_id) and self._reason(req_id) is None:
                self._set_reason(req_id, "grammar")

    def _can_be_drafted(self, req_id: str) -> bool:
        return req_id not in self._unready

    def _prompt_left(self) -> Ints:
        """[num_reqs] tokens of each prompt that are read after this step."""
        batch, num_reqs = self.input_batch, self.input_batch.num_reqs
        return prompt_left(
            batch.num_prompt_tokens[:num_reqs],
            batch.num_computed_tokens_cpu,
            self.query_start_loc.np,
        )

    def _accepted_tokens(self, step: _Undrafted) -> AcceptedTokens:
        """All rows of requests that verified nothing, the walked rows of the others."""
        num_reqs = self.input_batch.num_reqs
        next_token_ids = self.drafter.prepare_next_token_ids_cpu(
            step.sampled_token_ids,
            self.requests,
            self.input_batch,
            step.scheduler_output.num_scheduled_tokens,
        )
        starts = self.query_start_loc.np[: num_reqs + 1].astype(np.int64)
        rows, num_tokens = accepted_rows(self._step, starts)
        token_ids, positions = self.input_ids.np, self.positions.numpy()
        return AcceptedTokens(
            # Copies: vLLM's buffers are filled again.
            token_ids=torch.from_numpy(token_ids[rows]),
            positions=torch.from_numpy(positions[rows]),
            features=gather_rows(step.aux_hidden_states, rows),
            num_tokens=num_tokens,
            next_token_ids=next_token_ids,
            block_table=step.common_attn_metadata.block_table_tensor[:num_reqs],
            context_starts=np.zeros(num_reqs, dtype=np.int64),
        )
