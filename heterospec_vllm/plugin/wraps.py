# SPDX-License-Identifier: Apache-2.0
"""Every function of vLLM that the plugin wraps, each with its record (others in layers/linears_cpu.py and
plugin/head_loading.py).

A wrap calls the original. For configs that are not ours it passes arguments and result through.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heterospec_vllm import config
from heterospec_vllm.errors import one_line
from heterospec_vllm.patching import Wrap
from heterospec_vllm.plugin import checks, compat, head, head_weights

# A child of vLLM's logger, so that its handlers and levels apply.
logger = logging.getLogger("vllm.heterospec")

CPU_WORKER = "heterospec_vllm.runners.worker.HeteroSpecCPUWorker"
GPU_WORKER = "heterospec_vllm.runners.gpu_worker.HeteroSpecGPUWorker"

# Set on a SpeculativeConfig that this plugin made.
_MARKER = "_heterospec"


def apply_all() -> None:
    """Wraps what can be wrapped. What cannot is an error only once our config is used."""
    for wrap in WRAPS:
        if wrap.reason() is None:
            wrap.apply()


def _wrap_add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        action = parser._option_string_actions["--speculative-config"]
        action.type = functools.wraps(action.type)(
            functools.partial(config.recognise_path, action.type)
        )
        method = parser._option_string_actions["--spec-method"]
        method.choices = [*method.choices, config.METHOD]
        return parser

    return add_cli_args


def _wrap_create_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        source = config.find_source(
            self.speculative_config,
            {
                "method": self.spec_method,
                "model": self.spec_model,
                "num_speculative_tokens": self.spec_tokens,
            },
        )
        if source is None:
            return original(self, target_model_config, target_parallel_config)
        ours = _checked_config(source, self, target_model_config)
        given = self.speculative_config, self.spec_method, self.spec_model, self.spec_tokens
        self.speculative_config = _eagle3_config(ours)
        self.spec_method = self.spec_model = self.spec_tokens = None
        try:
            speculative_config = original(self, target_model_config, target_parallel_config)
        finally:
            # Other processes and a second call build the config from the same arguments again.
            self.speculative_config, self.spec_method, self.spec_model, self.spec_tokens = given
        setattr(speculative_config, _MARKER, True)
        # SchedulerConfig is built from it afterwards. Unset it becomes True on vLLM 0.33's V2, whose scheduler
        # then hands out placeholders in place of drafts; True was refused above.
        self.async_scheduling = False
        if self.scheduler_cls is None:
            self.scheduler_cls = config.WHOLE_DRAFTS_SCHEDULER
        from heterospec_vllm.observe import metrics_folder  # not at the top: it imports numpy

        folder = metrics_folder.metrics_folder()
        metrics_folder.show_metrics(folder)
        self.additional_config = {
            **self.additional_config,
            config.METHOD: config.ConfigCarrier(ours, str(folder)),
        }
        # ParallelConfig exists already, so engine_args.worker_cls would come too late.
        target_parallel_config.worker_cls = worker_class()
        logger.info("heterospec: %s", ours)
        return speculative_config

    return create_speculative_config


def worker_class() -> str:
    """The worker that vLLM starts on this platform."""
    return CPU_WORKER if compat.platform_name() == "cpu" else GPU_WORKER


def _checked_config(
    source: config.ConfigSource, engine_args: Any, model_config: Any
) -> config.HeteroSpecConfig:
    """Our config. Raises ValueError for anything unsupported."""
    reason = compat.version_reason(compat.vllm_version())
    if reason:
        raise ValueError(f"heterospec: {reason}")
    ours = config.parse(source)
    reasons = [wrap.reason() for wrap in WRAPS]
    if config.METHOD in engine_args.additional_config and not isinstance(
        engine_args.additional_config[config.METHOD], config.ConfigCarrier
    ):
        reasons.append(f"additional_config: found the key '{config.METHOD}', allowed: any other")
    facts = compat.engine_facts(engine_args, model_config)
    reasons.append(checks.unsupported_reason(facts))
    if not any(reasons):
        length, load_format = model_config.max_model_len, engine_args.load_format
        reasons.append(_head_reason(ours, facts, length, load_format))
    for reason in reasons:
        if reason:
            raise ValueError(f"heterospec: {one_line(reason)}")
    return _with_profile(ours, model_config.model)


def _head_reason(
    ours: config.HeteroSpecConfig, facts: checks.EngineFacts, max_model_len: int, load_format: str
) -> str | None:
    """Why the head cannot be loaded or draft for the target, or None."""
    try:
        found = head.load(ours.model)
    except ValueError as error:
        return str(error)
    reason = (
        head.misfit_reason(found, facts)
        or head.top_k_reason(found, ours.top_k)
        or head.positions_reason(found, max_model_len)
    )
    folder = head.folder_of(ours.model)
    if reason or folder is None or load_format not in head_weights.LOAD_FORMATS:
        return reason
    return head_weights.misfit_reason(folder, found, facts.target)


def _with_profile(ours: config.HeteroSpecConfig, target: str) -> config.HeteroSpecConfig:
    """The config with a profile that fits the pair. Raises ValueError for one that was made for another pair."""
    from heterospec_vllm.policy import profile  # not at the top: it imports numpy

    if ours.profile is None:
        shipped = profile.shipped_profile(target, ours.model)
        return ours if shipped is None else ours.model_copy(update={"profile": str(shipped)})
    reason = profile.misfit_reason(profile.load_profile(Path(ours.profile)), target, ours.model)
    if reason:
        raise ValueError(f"heterospec: {reason}")
    return ours


def _eagle3_config(ours: config.HeteroSpecConfig) -> dict[str, Any]:
    """What vLLM is told: an ordinary eagle3 method, so that its lookahead slots, aux hidden states and
    head loading work."""
    num_tokens = ours.num_lookahead_tokens
    return {
        "method": "eagle3",
        "model": ours.model,
        "num_speculative_tokens": num_tokens,
        # Draft token lists of uneven length.
        "disable_padded_drafter_batch": True,
        # Plain vLLM keeps the last block of a prefix hit; recomputing it would cost 128 tokens.
        "disable_eagle_block_drop": True,
        # With a schedule, even a constant one, the scheduler does not pad newly admitted
        # requests with draft rows of -1, for which there is no tree.
        "num_speculative_tokens_per_batch_size": [(1, 1, num_tokens)],
    }


def _wrap_validate_spec_decode(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.exceptions import VLLMValidationError

    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if not getattr(speculative_config, _MARKER, False):
            return original(self, speculative_config)
        try:
            config.RequestOptions.from_extra_args(self.extra_args)
        except ValueError as error:
            # What vLLM's servers answer with HTTP 400.
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
        return None

    return _validate_spec_decode


WRAPS = (
    Wrap(
        module="vllm.engine.arg_utils",
        owner="EngineArgs",
        name="add_cli_args",
        parameters=("parser",),
        why="--speculative-config takes JSON only; its type must let a path through, marked. --spec-method takes "
        "vLLM's own methods only.",
        remove_when="vLLM accepts a file for --speculative-config and lets a plugin register a method.",
        make=_wrap_add_cli_args,
    ),
    Wrap(
        module="vllm.engine.arg_utils",
        owner="EngineArgs",
        name="create_speculative_config",
        parameters=("self", "target_model_config", "target_parallel_config"),
        why="A speculative method and its worker cannot be registered. The wrapper validates our "
        "config, hands vLLM an eagle3 one, keeps ours in additional_config and sets the worker.",
        remove_when="vLLM lets a plugin register a speculative method with a worker class.",
        make=_wrap_create_speculative_config,
    ),
    Wrap(
        module="vllm.sampling_params",
        owner="SamplingParams",
        name="_validate_spec_decode",
        parameters=("self", "speculative_config"),
        why="It rejects min_p and logit_bias for every speculative method; our walk applies them. "
        "It is also where a request's own options can be refused with HTTP 400. It sees nothing "
        "but the SpeculativeConfig, so ours is told by an attribute that is set on the object: "
        "it survives pickling and deep copies, and no field of the class could hold it.",
        remove_when="vLLM supports both parameters with speculative decoding and lets a plugin "
        "validate vllm_xargs.",
        make=_wrap_validate_spec_decode,
    ),
)
