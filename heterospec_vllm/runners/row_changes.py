# SPDX-License-Identifier: Apache-2.0
"""What changes rows of logits on Model Runner V1 before they are sampled: each request's rules and its grammar."""

from __future__ import annotations

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from heterospec_vllm.arrays import Ints
from heterospec_vllm.config import WHOLE_DRAFTS_SCHEDULER
from heterospec_vllm.policy.survival import CONSTRAINED, RULED
from heterospec_vllm.runners.grammars import Grammars
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify.rules import UNUSED, RequestRules, has_rules
from heterospec_vllm.verify.scorer_v1 import RowChanges


class RowChanger:
    """The rules and grammars of the requests in this worker."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.grammars = Grammars(vllm_config)
        self._rules: dict[str, RequestRules | None] = {}
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        scheduler = vllm_config.scheduler_config.scheduler_cls
        self.leaves_drafts_whole = scheduler == WHOLE_DRAFTS_SCHEDULER

    def start(self, new: NewRequestData) -> None:
        """Compiles a request's grammar for the nodes of its trees, where the scheduler leaves drafts whole."""
        params = new.sampling_params
        if params is None or params.structured_outputs is None or not self.leaves_drafts_whole:
            return
        if params.structured_outputs.all_constraints_none() or new.prompt_token_ids is None:
            return
        self.grammars.start(new.req_id, params, new.prompt_token_ids)

    def forget(self, req_id: str) -> None:
        """A request has left the engine, or goes on with other parameters."""
        self.grammars.remove(req_id)
        self._rules.pop(req_id, None)

    def put_kinds(
        self,
        req_ids: list[str],  # [num_reqs]
        kinds: Ints,  # [num_reqs] 0 greedy, 1 sampled; written
    ) -> None:
        """Adds what each request's rules and grammar say of its kind (`policy/survival.py`)."""
        for place, req_id in enumerate(req_ids):
            if req_id in self.grammars:
                kinds[place] += CONSTRAINED
            elif self._rules.get(req_id) is not None:
                kinds[place] += RULED

    def of_step(
        self,
        requests: list[CachedRequestState],  # [num_reqs] in the order of the batch
        trees: DraftTrees | None,  # [num_reqs]; None: nothing is verified
        grammar: GrammarOutput | None,  # the engine's masks
    ) -> RowChanges | None:
        """What penalties, grammars and the like make of a step's rows; None where no request has any."""
        rules = [self._rules_of(request) for request in requests]
        ruled = any(rules)
        if grammar is None and not ruled:
            return None
        packed = None
        if ruled:
            pairs = zip(rules, requests, strict=True)
            packed = b"".join(
                UNUSED if r is None else r.packed(q.output_token_ids) for r, q in pairs
            )
        if grammar is None:
            return RowChanges(packed, None)
        masks = self.grammars.masks_of_trees(
            [request.req_id for request in requests],
            DraftTrees.empty(len(requests)) if trees is None else trees,
            grammar.structured_output_request_ids,
            np.asarray(grammar.grammar_bitmask),
        )
        return RowChanges(packed, masks)

    def _rules_of(self, request: CachedRequestState) -> RequestRules | None:
        req_id, params = request.req_id, request.sampling_params
        if req_id not in self._rules:
            rules = None
            if params is not None and has_rules(params):
                rules = RequestRules(params, request.prompt_token_ids or (), self._vocab_size)
            self._rules[req_id] = rules
        return self._rules[req_id]

    def unready(
        self,
        req_ids: list[str],  # [num_reqs]
        outputs: list[list[int]],  # [num_reqs] all that each request has emitted
    ) -> set[str]:
        """Brings grammars up to what was emitted; the requests whose grammar is not ready, or lost."""
        if not self.grammars.any_of(req_ids):
            return set()
        pairs = zip(req_ids, outputs, strict=True)
        grammars = self.grammars
        return {r for r, tokens in pairs if r in grammars and not grammars.follow(r, tokens)}
