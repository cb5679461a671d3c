# SPDX-License-Identifier: Apache-2.0
"""Every bad config is one ValueError with the field, what was found and what is allowed.

All of it is raised while the engine config is built: no weights exist in these tests.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_folders import HEAD, write_head, write_target
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from heterospec_vllm.config import CONFIG_FILE_KEY, METHOD
from heterospec_vllm.plugin import compat, register
from heterospec_vllm.policy.survival import PROFILE_SHAPE


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    register()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_head(tmp_path_factory.mktemp("models") / "head")


def refusal(target: Path, speculative_config: Any, **engine_args: Any) -> str:
    """The message with which an engine config is refused."""
    with pytest.raises(ValueError) as refused:
        EngineArgs(
            model=str(target), speculative_config=speculative_config, **engine_args
        ).create_engine_config()
    return str(refused.value)


def options(head: Path, **changes: Any) -> dict[str, Any]:
    return {"method": METHOD, "model": str(head), **changes}


def assert_names(message: str, *parts: str) -> None:
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"
    # No pydantic report, no internals: one sentence.
    assert "\n" not in message and "validation error" not in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"polcy": "static"}, ["unknown key 'polcy'", "did you mean 'policy'?", "max_depth"]),
        ({"temperature": 1}, ["unknown key 'temperature'", "allowed: method, model"]),
        ({"policy": "eager"}, [".policy", "'eager'", "'plain', 'chain', 'static', 'paper'"]),
        ({"paper_first_index": 2}, [".paper_first_index", "found 2"]),
        ({"meta_path": "C"}, [".meta_path", "'C'", "'A', 'B'"]),
        ({"num_speculative_tokens": 0}, [".num_speculative_tokens", "found 0", "from 1 to 63"]),
        ({"num_speculative_tokens": 64}, [".num_speculative_tokens", "found 64", "from 1 to 63"]),
        ({"num_speculative_tokens": "6"}, [".num_speculative_tokens", "'6' (str)", "an integer"]),
        ({"num_speculative_tokens": 6.0}, [".num_speculative_tokens", "6.0 (float)"]),
        ({"num_speculative_tokens": True}, [".num_speculative_tokens", "True (bool)"]),
        ({"max_depth": 17}, [".max_depth", "found 17", "from 1 to 16"]),
        ({"max_depth": None}, [".max_depth", "found None", "from 1 to 16"]),
        ({"top_k": [4]}, [".top_k", "[4] (list)", "from 1 to 16"]),
        ({"model": ""}, [".model", "found ''", "EAGLE-3 head"]),
        ({"model": 3}, [".model", "found 3 (int)", "EAGLE-3 head"]),
        ({"profile": "none.json"}, [".profile", "no readable file", "none.json"]),
    ],
)
def test_option(target: Path, head: Path, changes: dict[str, Any], parts: list[str]) -> None:
    assert_names(refusal(target, options(head, **changes)), "speculative_config", *parts)


def test_missing_model(target: Path) -> None:
    message = refusal(target, {"method": METHOD})
    assert_names(message, "speculative_config.model", "found nothing", "EAGLE-3 head")


def _profile(**changes: Any) -> dict[str, Any]:
    """A whole profile, for weights that nobody has."""
    table = {"knots": [1, 64], "seconds": [0.01, 0.02]}
    survivals = np.full(PROFILE_SHAPE, 0.5).tolist()
    whole = {
        "version": 1,
        "target": "sha256:0",
        "head": "sha256:1",
        "machine": "elsewhere",
        "edges": [[0.5, 1.0]],
        "paper_depth": 2,
        "paper_edges": [0.5],
        "survivals": survivals,
        "costs": {
            "verify": table,
            "first_pass": table,
            "level": table,
            "request_seconds": 0.0,
            "context_seconds": 0.0,
        },
    }
    return {**whole, **changes}


COSTS = _profile()["costs"]
FALLING = {**COSTS, "verify": {"knots": [1, 64], "seconds": [0.02, 0.01]}}


@pytest.mark.parametrize(
    ("profile", "parts"),
    [
        (_profile(), ["another target", "sha256:0", "heterospec calibrate"]),
        (_profile(version=2), ["version 2", "allowed: 1"]),
        ({k: v for k, v in _profile().items() if k != "edges"}, ["nothing for edges"]),
        (_profile(edges=[[1.0, 0.5]]), ["edges.0", "rise"]),
        (_profile(paper_edges=[float("nan")]), ["paper_edges.0", "finite"]),
        (_profile(survivals=[[[[0.5]]]]), ["survivals"]),
        (_profile(costs=FALLING), ["costs.verify", "must not fall"]),
        (_profile(extra=1), ["extra"]),
        ([1], ["found [1] (list)"]),
    ],
)
def test_profile(target: Path, head: Path, tmp_path: Path, profile: Any, parts: list[str]) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile))
    message = refusal(target, options(head, profile=str(path)))
    assert_names(message, "speculative_config.profile", *parts)


def test_each_fault_is_one_line(target: Path, head: Path) -> None:
    message = refusal(target, options(head, top_k=0, max_depth=0, nodes=3))
    lines = message.splitlines()
    assert len(lines) == 3
    assert all("found" in line and "allowed:" in line for line in lines)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no readable file", "No such file"]),
        (b"", ["invalid JSON"]),
        (b"{'method': 1}", ["invalid JSON", "line 1 column 2"]),
        (b"[1, 2]", ["[1, 2] (list)", "a JSON object"]),
        (b'"heterospec"', ["(str)", "a JSON object"]),
        (b"\xff\xfe{}", ["not UTF-8"]),
        (b'{"method": "heterospec", "top_k": 1, "top_k": 2}', ["the key 'top_k' twice"]),
    ],
)
def test_config_file(target: Path, tmp_path: Path, content: bytes | None, parts: list[str]) -> None:
    file = tmp_path / "heterospec.json"
    if content is not None:
        file.write_bytes(content)
    message = refusal_on_the_command_line(target, file)
    assert_names(message, "speculative_config", str(file), *parts)


def test_config_file_is_a_folder(target: Path, tmp_path: Path) -> None:
    message = refusal_on_the_command_line(target, tmp_path)
    assert_names(message, "speculative_config", str(tmp_path), "Is a directory")


def test_config_file_of_another_method(target: Path, tmp_path: Path) -> None:
    file = tmp_path / "ngram.json"
    file.write_text(json.dumps({"method": "ngram", "model": "x"}))
    message = refusal_on_the_command_line(target, file)
    assert_names(message, "speculative_config.method", "'ngram'", "'heterospec'", str(file))


def test_fault_inside_a_file_names_the_file(target: Path, tmp_path: Path) -> None:
    file = tmp_path / "heterospec.json"
    file.write_text(json.dumps({"method": METHOD, "model": "x", "topk": 4}))
    message = refusal_on_the_command_line(target, file)
    assert_names(message, "unknown key 'topk'", "did you mean 'top_k'?", str(file))


def refusal_on_the_command_line(target: Path, file: Path) -> str:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", str(target), "--speculative-config", str(file)])
    with pytest.raises(ValueError) as refused:
        EngineArgs.from_cli_args(args).create_engine_config()
    return str(refused.value)


def test_not_an_object(target: Path) -> None:
    assert_names(refusal(target, [1]), "speculative_config", "[1] (list)", "a JSON object")


def test_key_set_twice(target: Path, head: Path) -> None:
    message = refusal(target, options(head), spec_model=str(head))
    assert_names(message, "speculative_config.model", "twice", "--spec-*")


def test_target_is_a_speculators_head(target: Path, tmp_path: Path) -> None:
    """vLLM then swaps MODEL for the head's verifier and changes method and model."""
    decoder = {**HEAD, "architectures": ["LlamaForCausalLM"]}
    head = write_head(
        tmp_path / "speculators",
        speculators_model_type="eagle3",
        transformer_layer_config=decoder,
        speculators_config={
            "proposal_methods": [{"speculative_tokens": 3}],
            "verifier": {"name_or_path": str(target)},
        },
    )
    message = refusal(head, {CONFIG_FILE_KEY: "heterospec.json"})
    assert_names(message, "speculative_config", "draft head", "heterospec.json", "the target")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": 256}, ["hidden size 256", "allowed: 128"]),
        ({"target_hidden_size": 64}, ["hidden size 64", "allowed: 128"]),
        ({"vocab_size": 640}, ["vocabulary of 640", "allowed: 512"]),
        ({"draft_vocab_size": 513}, ["draft vocabulary of 513", "at most 512"]),
        ({"draft_vocab_size": "many"}, ["'many'", "draft_vocab_size", "config.json"]),
        ({"hidden_size": None}, ["found nothing for hidden_size"]),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4]}, ["[2, 4]", "allowed: 3 layers"]),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4, 9]}, ["[2, 4, 9]", "from 0 to 8"]),
        ({"eagle_aux_hidden_state_layer_ids": [2, 2, 4]}, ["[2, 2, 4]", "rising layers"]),
        ({"eagle_aux_hidden_state_layer_ids": [4, 2, 5]}, ["[4, 2, 5]", "rising layers"]),
        ({"num_aux_hidden_states": 2}, ["[2, 4, 5]", "allowed: 2 layers"]),
        (
            {"eagle_config": {"use_aux_hidden_state": False}},
            ["use_aux_hidden_state", "aux hidden states"],
        ),
        ({"head_dim": 32}, ["head size 32", "64, 96, 128"]),
        (
            {"layer_types": ["sliding_attention"], "sliding_window": 64},
            ["layers of 'sliding_attention'", "allowed: full_attention"],
        ),
        ({"architectures": ["MedusaModel"]}, ["['MedusaModel']", "LlamaForCausalLMEagle3"]),
        (
            {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": None},
            ["['LlamaForCausalLM']", "LlamaForCausalLMEagle3"],
        ),
        ({"speculators_model_type": "dflash"}, ["'dflash'", "'eagle3'"]),
    ],
)
def test_head_that_does_not_fit(
    target: Path, tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    head = write_head(tmp_path / "head", **changes)
    assert_names(refusal(target, options(head)), "speculative_config.model", *parts)


def test_head_folder(target: Path, tmp_path: Path) -> None:
    def message(name: str) -> str:
        return refusal(target, options(tmp_path / name))

    assert_names(message("none"), "speculative_config.model", "no folder", str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert_names(message("empty"), "speculative_config.model", "config.json", "No such file")
    head = write_head(tmp_path / "weightless")
    (head / "model.safetensors").unlink()
    assert_names(message("weightless"), "speculative_config.model", "no weights", str(head))
    (head / "config.json").write_text("{")
    assert_names(message("weightless"), "speculative_config.model", "invalid JSON")


def test_head_that_no_hub_serves(target: Path) -> None:
    message = refusal(target, {"method": METHOD, "model": "nobody/no-such-head"})
    assert_names(message, "speculative_config.model", "'nobody/no-such-head'", "EAGLE-3 head")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"head_dim": 32}, ["LlamaForCausalLM", "head size 32", "64, 96, 128"]),
        (
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
            ["GPT2LMHeadModel", "no aux hidden states", "SupportsEagle3"],
        ),
        (
            {
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "sliding_window": 64,
            },
            ["MistralForCausalLM", "sliding window of 64", "--disable-sliding-window"],
        ),
        (
            {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "state_size": 16},
            ["MambaForCausalLM", "recurrent state"],
        ),
    ],
)
def test_target(head: Path, tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    target = write_target(tmp_path / "target", **changes)
    assert_names(refusal(target, options(head)), *parts)


@pytest.mark.parametrize(
    ("engine_args", "parts"),
    [
        ({"worker_cls": "my.Worker"}, ["worker_cls", "'my.Worker'", "allowed: none"]),
        ({"kv_cache_dtype": "fp8"}, ["kv_cache_dtype", "'fp8'", "auto, bfloat16"]),
        ({"async_scheduling": True}, ["async_scheduling", "True", "False"]),
        ({"enable_lora": True}, ["enable_lora", "True", "False"]),
        ({"data_parallel_size": 2}, ["data_parallel_size", "found 2", "allowed: 1"]),
        ({"tensor_parallel_size": 2}, ["tensor_parallel_size", "found 2", "allowed: 1"]),
        ({"kv_offloading_size": 1.0}, ["KV connector", "allowed: none"]),
        ({"additional_config": {METHOD: 1}}, ["additional_config", "'heterospec'"]),
    ],
)
def test_engine_arguments(
    target: Path, head: Path, engine_args: dict[str, Any], parts: list[str]
) -> None:
    assert_names(refusal(target, options(head), **engine_args), "heterospec: ", *parts)


def test_vllm_version(target: Path, head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.31.0")
    message = refusal(target, options(head))
    assert_names(message, "heterospec", "version 0.31.0", "0.32.0 or 0.33.0")
    # Everybody else's engine still starts on that version.
    EngineArgs(
        model=str(target),
        speculative_config={"method": "ngram", "num_speculative_tokens": 2},
    ).create_engine_config()
