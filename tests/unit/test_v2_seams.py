# SPDX-License-Identifier: Apache-2.0
"""What our V2 adapter overrides or calls by position still exists in this vLLM, with the parameters it relies on."""

import inspect

import pytest

pytest.importorskip("vllm.v1.worker.gpu.model_runner")

from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from heterospec_vllm.draft.eagle_v2 import EagleDrafterV2
from heterospec_vllm.runners.v2 import HeteroSpecGPUModelRunner
from heterospec_vllm.verify.scorer_v2 import DeviceScorer

# (function of vLLM, the parameters that it begins with)
SEAMS = [
    (GPUModelRunner.initialize_kv_cache, ("self", "kv_cache_config")),
    (GPUModelRunner.add_requests, ("self", "scheduler_output")),
    (GPUModelRunner.finish_requests, ("self", "scheduler_output")),
    (GPUModelRunner._remove_request, ("self", "req_id")),
    (
        GPUModelRunner.execute_model,
        ("self", "scheduler_output", "intermediate_tensors", "dummy_run"),
    ),
    (GPUModelRunner.prepare_inputs, ("self", "scheduler_output")),
    (GPUModelRunner.prepare_attn, ("self", "input_batch")),
    (GPUModelRunner.sample, ("self", "hidden_states", "input_batch", "grammar_output")),
    (GPUModelRunner.sample_tokens, ("self", "grammar_output")),
    (GPUModelRunner.take_draft_token_ids, ("self",)),
    (
        EagleSpeculator.propose,
        (
            "self",
            "input_batch",
            "attn_metadata",
            "slot_mappings",
            "last_hidden_states",
            "aux_hidden_states",
        ),
    ),
    (EagleSpeculator.init_cudagraph_manager, ("self", "cudagraph_mode")),
    (EagleSpeculator.capture, ("self",)),
    (
        RejectionSampler.__call__,
        ("self", "logits", "input_batch", "draft_logits", "invalid_drafts"),
    ),
    (
        Sampler.apply_sampling_params,
        (
            "self",
            "logits",
            "expanded_idx_mapping",
            "idx_mapping",
            "idx_mapping_np",
            "pos",
            "input_ids",
            "expanded_local_pos",
            "seq_lens_upper_bound_np",
        ),
    ),
    (
        get_num_sampled_and_rejected,
        ("num_sampled", "seq_lens", "cu_num_logits", "idx_mapping", "prefill_len"),
    ),
    (compute_topk_scores, ("logits", "num_logprobs", "sampled_token_ids", "cu_num_logits")),
]
OURS = {
    HeteroSpecGPUModelRunner: GPUModelRunner,
    EagleDrafterV2: EagleSpeculator,
}


@pytest.mark.parametrize(
    ("function", "parameters"), SEAMS, ids=[function.__qualname__ for function, _ in SEAMS]
)
def test_parameters(function, parameters: tuple[str, ...]) -> None:
    found = tuple(inspect.signature(inspect.unwrap(function)).parameters)
    assert found[: len(parameters)] == parameters


@pytest.mark.parametrize("ours", OURS, ids=[ours.__name__ for ours in OURS])
def test_every_override_is_in_the_table(ours: type) -> None:
    theirs = OURS[ours]
    overridden = {
        name
        for name, value in vars(ours).items()
        if inspect.isfunction(value) and hasattr(theirs, name) and name != "__init__"
    }
    # Called through with whatever arguments it gets.
    overridden -= {"load_model"}
    known = {function.__name__ for function, _ in SEAMS}
    assert overridden <= known, overridden - known


def test_scorer_is_called_as_vllms_rejection_sampler() -> None:
    ours = inspect.signature(DeviceScorer.__call__).parameters
    theirs = inspect.signature(RejectionSampler.__call__).parameters
    assert tuple(ours) == tuple(theirs)
