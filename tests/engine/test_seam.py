# SPDX-License-Identifier: Apache-2.0
"""The config seam: what vLLM gets from our config, and that without it nothing changes."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_folders import write_head, write_target
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

from heterospec_vllm.config import METHOD, HeteroSpecConfig, from_vllm_config
from heterospec_vllm.plugin import register
from heterospec_vllm.plugin.wraps import CPU_WORKER


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    register()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `target`, `head` and a config file that names the head relative to itself."""
    folder = tmp_path_factory.mktemp("models")
    write_target(folder / "target")
    write_head(folder / "head")
    (folder / "heterospec.json").write_text(
        json.dumps({"method": METHOD, "model": "head", "max-depth": 2})
    )
    return folder


def engine_args(folder: Path, **changes: Any) -> EngineArgs:
    options = {"method": METHOD, "model": str(folder / "head")}
    arguments = {"model": str(folder / "target"), "speculative_config": options, **changes}
    return EngineArgs(**arguments)


@pytest.fixture(scope="module")
def vllm_config(folder: Path) -> VllmConfig:
    options = {
        "method": METHOD,
        "model": str(folder / "head"),
        "num_speculative_tokens": 20,
        "max_depth": 3,
        "top_k": 2,
    }
    return engine_args(folder, speculative_config=options).create_engine_config()


def test_vllm_gets_an_eagle3_config(vllm_config: VllmConfig, folder: Path) -> None:
    given = vllm_config.speculative_config
    assert given is not None
    assert given.method == "eagle3"
    assert given.model == str(folder / "head")
    # Two roots' children, then two nodes with two children each on two levels.
    assert given.num_speculative_tokens == 2 + 4 + 4
    assert given.num_speculative_tokens_per_batch_size == [(1, 1, 10)]
    assert given.disable_padded_drafter_batch
    assert given.disable_eagle_block_drop
    assert vllm_config.scheduler_config.async_scheduling is False
    assert vllm_config.parallel_config.worker_cls == CPU_WORKER


def test_config_reaches_another_process(vllm_config: VllmConfig, folder: Path) -> None:
    there = pickle.loads(pickle.dumps(vllm_config))
    ours = from_vllm_config(there)
    assert ours == from_vllm_config(vllm_config)
    assert ours is not None
    assert (ours.model, ours.num_speculative_tokens) == (str(folder / "head"), 20)
    assert there.compute_hash() == vllm_config.compute_hash()
    # The request checks work on the copy as well.
    SamplingParams(min_p=0.1)._validate_spec_decode(there.speculative_config)


def test_compile_hash_ignores_our_options_only(folder: Path) -> None:
    def compile_hash(additional_config: dict[str, Any], **changes: Any) -> str:
        options = {"method": METHOD, "model": str(folder / "head"), **changes}
        args = engine_args(folder, speculative_config=options, additional_config=additional_config)
        return args.create_engine_config().compute_hash()

    first = compile_hash({"mine": 1}, policy="static")
    assert compile_hash({"mine": 1}, policy="chain", num_speculative_tokens=3) == first
    assert compile_hash({"mine": 2}, policy="static") != first


def test_arguments_are_not_changed_and_can_be_used_again(folder: Path) -> None:
    options = {"method": METHOD, "model": str(folder / "head"), "policy": "chain"}
    additional = {"mine": {"nested": 1}}
    args = engine_args(folder, speculative_config=options, additional_config=additional)
    given = copy.deepcopy((options, additional))
    first, second = args.create_engine_config(), args.create_engine_config()
    assert (options, additional) == given
    assert args.speculative_config is options
    assert from_vllm_config(first) == from_vllm_config(second)
    carried = second.additional_config.pop(METHOD)
    assert carried == first.additional_config.pop(METHOD)
    assert second.additional_config == first.additional_config == additional


@pytest.mark.parametrize("form", ["--speculative-config", "--speculative_config", "-sc"])
def test_command_line_takes_a_path(
    folder: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", "target", form, "heterospec.json"])
    # Paths hold wherever the engine config is built, and again in every API server.
    monkeypatch.chdir("/")
    arguments.model = str(folder / "target")
    for _ in range(2):
        config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
        ours = from_vllm_config(config)
        assert ours is not None
        assert (ours.model, ours.max_depth) == (str(folder / "head"), 2)


def test_command_line_takes_json_and_dotted_keys(folder: Path) -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    text = json.dumps({"method": METHOD, "model": str(folder / "head")})
    whole = parser.parse_args(["--speculative-config", text])
    dotted = parser.parse_args(
        ["--speculative-config.method", METHOD, "--speculative-config.model", str(folder / "head")]
    )
    assert whole.speculative_config == dotted.speculative_config == json.loads(text)


def test_spec_flags_are_merged(folder: Path) -> None:
    args = engine_args(
        folder,
        speculative_config={"method": METHOD},
        spec_model=str(folder / "head"),
        spec_tokens=5,
    )
    for _ in range(2):
        ours = from_vllm_config(args.create_engine_config())
        assert ours is not None
        assert (ours.model, ours.num_speculative_tokens) == (str(folder / "head"), 5)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "architectures": ["Eagle3Speculator"],
            "model_type": None,
            "speculators_model_type": "eagle3",
            "speculators_config": {"algorithm": "eagle3"},
            "transformer_layer_config": {
                "model_type": "llama",
                "hidden_size": 128,
                "intermediate_size": 256,
                "vocab_size": 512,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "num_hidden_layers": 1,
                "head_dim": 64,
            },
        },
        {"architectures": ["LlamaForCausalLM"]},
        {"num_aux_hidden_states": 2, "eagle_aux_hidden_state_layer_ids": [1, 8]},
        {"draft_vocab_size": None},
    ],
    ids=["speculators", "unmarked", "two taps", "whole vocabulary"],
)
def test_heads_that_fit(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    head = write_head(tmp_path / "head", **changes)
    options = {"method": METHOD, "model": str(head)}
    config = engine_args(folder, speculative_config=options).create_engine_config()
    assert from_vllm_config(config) == HeteroSpecConfig(method=METHOD, model=str(head))


def test_requests_may_use_min_p_and_logit_bias(vllm_config: VllmConfig) -> None:
    SamplingParams(min_p=0.1, logit_bias={3: 1.0})._validate_spec_decode(
        vllm_config.speculative_config
    )


@pytest.mark.parametrize(
    ("extra_args", "parts"),
    [
        ({"heterospec": "maybe"}, ["vllm_xargs.heterospec", "'maybe'", "'on', 'off'"]),
        ({"heterospec": 1}, ["vllm_xargs.heterospec", "1 (int)"]),
        ({"heterospec_max_nodes": 64}, ["heterospec_max_nodes", "64", "from 0 to 63"]),
        ({"heterospec_max_nodes": "5"}, ["heterospec_max_nodes", "'5' (str)"]),
        ({"heterospec_nodes": 5}, ["unknown key 'heterospec_nodes'", "heterospec_max_nodes"]),
    ],
)
def test_request_options_are_checked(
    vllm_config: VllmConfig, extra_args: dict[str, Any], parts: list[str]
) -> None:
    params = SamplingParams(extra_args=extra_args)
    with pytest.raises(VLLMValidationError) as refused:
        params._validate_spec_decode(vllm_config.speculative_config)
    assert all(part in str(refused.value) for part in parts), str(refused.value)


def test_good_request_options_pass(vllm_config: VllmConfig) -> None:
    extra_args = {"heterospec": "off", "heterospec_max_nodes": 0, "session_id": "mine"}
    SamplingParams(extra_args=extra_args)._validate_spec_decode(vllm_config.speculative_config)


# Prints what vLLM makes of configs that are not ours, as JSON.
_OTHERS = """
import json, sys
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

target, head = sys.argv[1:]
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
options = [
    [action.option_strings, action.dest, repr(action.default), repr(action.choices),
     repr(action.nargs), action.help, getattr(action.type, "__name__", None)]
    for action in parser._actions
]
parsed = []
for value in ['{"method": "ngram"}', "None", ""]:
    parsed.append(parser.parse_args(["--speculative-config", value]).speculative_config)
for value in ["{bad", "nonsense"]:
    try:
        parser.parse_args(["--speculative-config", value])
    except SystemExit as error:
        parsed.append(error.code)

engines = {}
for name, config in {
    "none": None,
    "ngram": {"method": "ngram", "num_speculative_tokens": 2},
    "eagle3": {"method": "eagle3", "model": head, "num_speculative_tokens": 2},
}.items():
    args = EngineArgs(model=target, speculative_config=config)
    engine = args.create_engine_config()
    speculative = engine.speculative_config
    refused = []
    for params in (SamplingParams(min_p=0.1), SamplingParams(logit_bias={1: 1.0}),
                   SamplingParams(extra_args={"heterospec": "nonsense"})):
        try:
            params._validate_spec_decode(speculative)
            refused.append(None)
        except VLLMValidationError as error:
            refused.append(str(error))
    engines[name] = [
        engine.compute_hash(), engine.parallel_config.worker_cls, engine.additional_config,
        repr(args.additional_config), refused, sorted(args.speculative_config or {}),
        None if speculative is None else sorted(
            (key, repr(value)) for key, value in vars(speculative).items()
            if "config" not in key and not key.startswith("__")
        ),
    ]

try:
    EngineArgs(model=target, speculative_config={"method": "eagle3", "model": head, "tok_k": 1}
               ).create_engine_config()
    engines["unknown key"] = None
except ValueError as error:
    engines["unknown key"] = str(error).splitlines()[:2]
loaded = "heterospec_vllm.plugin.wraps" in sys.modules
print("RESULT " + json.dumps([loaded, {"options": options, "parsed": parsed, "engines": engines}]))
"""


def test_everything_else_is_as_without_the_plugin(folder: Path) -> None:
    """VLLM_PLUGINS names the plugins to load: an empty one is vLLM without ours."""

    def outcome(**environment: str) -> tuple[bool, dict[str, Any]]:
        kept = {key: value for key, value in os.environ.items() if key != "VLLM_PLUGINS"}
        done = subprocess.run(
            [sys.executable, "-c", _OTHERS, str(folder / "target"), str(folder / "head")],
            env={**kept, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
        loaded, result = json.loads(line.removeprefix("RESULT "))
        return loaded, result

    loaded, with_plugin = outcome()
    assert loaded, "the plugin is not installed in this environment"
    loaded, without_plugin = outcome(VLLM_PLUGINS="")
    assert not loaded
    # One choice more, the last, is all that the command line gains.
    [ours] = (one for one in with_plugin["options"] if "--spec-method" in one[0])
    assert ours[3].endswith(", 'heterospec']")
    ours[3] = ours[3].replace(", 'heterospec']", "]")
    for key, expected in without_plugin.items():
        assert with_plugin[key] == expected
    # The comparison looked at something: vLLM refuses both parameters for its own methods.
    refused = without_plugin["engines"]["ngram"][4]
    assert refused[0] and refused[1] and refused[2] is None
