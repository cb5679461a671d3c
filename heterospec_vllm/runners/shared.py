# SPDX-License-Identifier: Apache-2.0
"""What both model runners share: the policy and its switches, who is drafted for, which drafts are verified."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from vllm.config import ModelConfig, SchedulerConfig, VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput

from heterospec_vllm.arrays import Ints
from heterospec_vllm.config import (
    ConfigSource,
    HeteroSpecConfig,
    from_vllm_config,
    metrics_folder_of,
    parse,
)
from heterospec_vllm.draft.tree_drafter import TreeDrafter
from heterospec_vllm.engine.controller import Controller
from heterospec_vllm.engine.fallback import (
    Request,
    fallback_reason,
    is_worth_drafting,
    most_nodes,
    tokens_left,
)
from heterospec_vllm.engine.make_policy import make_policy
from heterospec_vllm.engine.step import Step, with_drafts
from heterospec_vllm.machine import machine_name
from heterospec_vllm.observe.counters import StepCounters
from heterospec_vllm.observe.metrics_folder import open_metrics
from heterospec_vllm.observe.reasons import REASONS
from heterospec_vllm.policy.base import Demand, DraftPolicy, PlainPolicy
from heterospec_vllm.policy.cost import StepCosts
from heterospec_vllm.policy.decisions import TreeShape
from heterospec_vllm.policy.profile import load_profile
from heterospec_vllm.replay.recorders import CostRecorder, TracePolicy, TraceRecorder
from heterospec_vllm.runners.measure import measure_costs
from heterospec_vllm.runners.reload import checked_kernel_weights, require_weights
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.verify.stops import Stops

logger = init_logger(__name__)

# Times a step of one token that a step of eight takes. Usual are 1 to 2.
HARDLY_PAYS = 4.0


class SpeculatingRunner:
    """The part of a model runner that does not depend on vLLM's version of it; subclasses are also vLLM's runner."""

    vllm_config: VllmConfig
    model_config: ModelConfig
    scheduler_config: SchedulerConfig
    max_model_len: int
    # Features of requests that this runner does not draft for (`fallback.REASONS`).
    _unsupported: frozenset[str]

    def start_speculation(self, vllm_config: VllmConfig, drafter: TreeDrafter) -> None:
        """To be called once, after vLLM's constructor."""
        config = from_vllm_config(vllm_config)
        assert config is not None
        self._config: HeteroSpecConfig = config
        self._drafter = drafter
        self.controller = Controller(drafter, PlainPolicy(TreeShape(1, 1, 1)))
        self._profile = None if config.profile is None else load_profile(Path(config.profile))
        self._costs: StepCosts | None = None
        # What a policy has learned outlives a switch to another one.
        self._policies: dict[HeteroSpecConfig, DraftPolicy] = {}
        self._plain_reasons: dict[str, str | None] = {}
        self._node_caps: dict[str, int] = {}
        self._logged_reasons: set[str] = set()
        self._step = Step()
        folder = metrics_folder_of(vllm_config)
        self._metrics = None if folder is None else open_metrics(folder)

    def _draws_trees(self) -> bool:
        """Whether attention over trees works here; without it chains are drafted."""
        raise NotImplementedError

    def _request(self, req_id: str) -> Request:
        """What vLLM knows of a request in the batch."""
        raise NotImplementedError

    @property
    def counters(self) -> StepCounters:
        return self.controller.counters

    def prepare_drafting(self) -> None:
        """What the first drafts would otherwise wait for; once, when the engine is warm."""
        self._drafter.prepare()

    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, Any]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """vLLM's, of weights that are looked at first: it stops at a bad one with the model half loaded."""
        if weights_iterator is not None and not is_checkpoint_format:
            model = self.get_model()  # type: ignore[attr-defined]
            weights_iterator = checked_kernel_weights(model, weights_iterator)
        elif weights_iterator is None:
            require_weights(self.vllm_config, weights_path)
        super().reload_weights(  # type: ignore[misc]
            weights_iterator=weights_iterator,
            weights_path=weights_path,
            is_checkpoint_format=is_checkpoint_format,
        )
        self.weights_changed()

    def weights_changed(self) -> None:
        """Weights of the target or the head were loaded again: what was made of them is made anew."""
        self._drafter.weights_changed()

    def start_policy(self) -> None:
        """The configured policy, once the engine is warm."""
        self.set_policy(self._config.policy)

    def set_policy(self, policy: str, **options: Any) -> None:
        """Switch what is drafted from the next step on; the options are those of the config."""
        # Without the profile's path: the profile was checked and loaded at start.
        given = {**self._config.model_dump(), "profile": None, "policy": policy, **options}
        config = parse(ConfigSource(given, None))
        most = self._drafter.most_children
        if config.top_k > most:
            raise ValueError(
                f"heterospec: top_k: found {config.top_k}, "
                f"allowed: at most {most}, the head's draft vocabulary"
            )
        if not self._draws_trees() and config.policy not in ("plain", "chain"):
            config = parse(ConfigSource({**given, "policy": "chain"}, None))
        if config not in self._policies:
            costs = self._measured_costs() if config.policy == "marginal" else None
            self._policies[config] = make_policy(
                config, self._config.num_lookahead_tokens, self._profile, costs
            )
        self.controller.policy = self._policies[config]

    def _measured_costs(self) -> StepCosts:
        """The profile's tables where it was made on this machine in this dtype, else a measurement of a few seconds."""
        if self._costs is None:
            profile = self._profile
            machine, dtype = machine_name(), str(self.model_config.dtype).removeprefix("torch.")
            if profile is not None and profile.has_costs_of(machine, dtype):
                self._costs = StepCosts.from_dict(profile.costs.model_dump())
            else:
                if profile is not None:
                    logger.info(
                        "heterospec: the profile was made on '%s' in %s, this is '%s' in %s: its strata "
                        "and survivals are used, costs are measured anew.",
                        profile.machine,
                        profile.dtype or "an unknown dtype",
                        machine,
                        dtype,
                    )
                self._costs = measure_costs(self, self._drafter)
            factor = self._costs.verify.at(8) / self._costs.verify.at(1)
            if factor > HARDLY_PAYS:
                logger.warning(
                    "heterospec: in %s a step of 8 tokens takes %.1f times a step of one here, so drafts "
                    "hardly pay; where a processor has no instructions for a dtype, --dtype float32 does better.",
                    dtype,
                    factor,
                )
        return self._costs

    def record_trace(self, on: bool) -> dict[str, Any] | None:
        """Start recording drafts (under the trace policy), or stop and return what was recorded."""
        controller = self.controller
        if on:
            config = self._config
            controller.recorder = TraceRecorder()
            controller.policy = TracePolicy(
                TreeShape(self._config.num_lookahead_tokens, config.max_depth, config.top_k)
            )
            return None
        recorder, controller.recorder = controller.recorder, None
        self.start_policy()
        return None if recorder is None else recorder.arrays()

    def record_costs(self, trees: list[tuple[int, int, int]]) -> None:
        """Draft trees of fixed (nodes, depth, top_k) in turns, 0 nodes for none, and note what everything costs."""
        most = self._drafter.most_children
        shapes = [TreeShape(n, depth, min(k, most)) if n else None for n, depth, k in trees]
        self.controller.policy = CostRecorder(shapes)

    def recorded_costs(self) -> dict[str, list] | None:
        """What was noted since :meth:`record_costs`; the configured policy is back afterwards."""
        policy = self.controller.policy
        self.start_policy()
        return policy.samples() if isinstance(policy, CostRecorder) else None

    def read_counters(self, reset: bool) -> dict[str, Any]:
        counters = self.counters.as_dict()
        if reset:
            self.controller.reset_counters()
        return counters

    def _match_drafts(self, scheduler_output: SchedulerOutput) -> tuple[Step, SchedulerOutput]:
        """What is verified of the scheduled drafts, written into a copy of the scheduler's output.

        In-process the scheduler reads its own object when it counts rejections, so that one is never changed.
        """
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        num_tokens = scheduler_output.total_num_scheduled_tokens
        matched = self.controller.match(
            scheduled, num_tokens, len(scheduler_output.num_scheduled_tokens)
        )
        if scheduled:
            scheduler_output = with_drafts(scheduler_output, matched.tokens)
        return Step(matched, scheduler_output.total_num_scheduled_tokens), scheduler_output

    def _publish(self) -> None:
        with CLOCK.span("publish"):
            if self._metrics is not None:
                self._metrics.publish(self.counters)

    def _stops(
        self,
        req_ids: list[str],
        num_prompt_tokens: Ints,  # [num_reqs]
        num_tokens: Ints,  # [num_reqs] of prompts and outputs, before the step
        outputs_of: Callable[[int], list[int]],
    ) -> Stops:
        """Where the requests of the step stop, in its order."""
        return Stops(
            params=[self._request(req_id).sampling_params for req_id in req_ids],
            num_outputs=num_tokens - num_prompt_tokens,
            num_tokens=num_tokens,
            max_model_len=self.max_model_len,
            outputs_of=outputs_of,
        )

    # ---- who is drafted for

    def _demand(
        self,
        req_ids: list[str],
        num_emitted: Iterable[int],  # [num_reqs] new tokens of each request
        num_outputs: Iterable[int],  # [num_reqs] tokens it has emitted in all
        prompt_left: Ints,  # [num_reqs] tokens of its prompt behind those of this step
        # [num_reqs] its latest one, where it is known on the host
        last_tokens: Iterable[int | None] = repeat(None),
    ) -> Demand:
        """What each request of the step could use."""
        # Trees may take half of a step's token budget; the rest is for prompts that wait.
        room = self.scheduler_config.max_num_batched_tokens // 2 // len(req_ids) - 1
        limit = max(0, min(self._config.num_lookahead_tokens, room))
        followed, limits, left = [], [], []
        for req_id, emitted, outputs, last in zip(
            req_ids, num_emitted, num_outputs, last_tokens, strict=False
        ):
            follow = self._reason(req_id) is None
            params = self._request(req_id).sampling_params
            drafted = follow and emitted and params is not None and self._can_be_drafted(req_id)
            if drafted and is_worth_drafting(params, outputs, last):
                limits.append(min(limit, self._node_caps[req_id]))
            else:
                limits.append(0)
            followed.append(follow)
            left.append(tokens_left(params, outputs) if follow and params else 0)
        return Demand(np.array(followed), np.array(limits), np.array(left), prompt_left)

    def _reason(self, req_id: str) -> str | None:
        """Why a request decodes plainly (decided once a request, logged once a reason, counted)."""
        if req_id not in self._plain_reasons:
            request = self._request(req_id)
            self._node_caps[req_id] = most_nodes(request)
            self._set_reason(req_id, fallback_reason(request, self._unsupported))
        return self._plain_reasons[req_id]

    def _can_be_drafted(self, req_id: str) -> bool:
        """Whether a request can be drafted for now; later it may be."""
        return True

    def _set_reason(self, req_id: str, reason: str | None) -> None:
        self._plain_reasons[req_id] = reason
        if reason is not None:
            self.counters.fallbacks[reason] += 1
            if reason not in self._logged_reasons:
                self._logged_reasons.add(reason)
                logger.info(
                    "heterospec: a request decodes without speculation (%s): %s",
                    reason,
                    REASONS[reason],
                )

    def _forget(self, req_id: str) -> None:
        """A request has left the engine."""
        self.controller.remove(req_id)
        self._plain_reasons.pop(req_id, None)
        self._node_caps.pop(req_id, None)
