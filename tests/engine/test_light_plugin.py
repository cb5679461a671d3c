# SPDX-License-Identifier: Apache-2.0
"""What the plugin costs a vLLM process that does not use it: vLLM loads it in every one."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_folders import write_head, write_target

pytest.importorskip("vllm")

# What an engine that is not ours must not pay for.
HEAVY = ("numba", "llvmlite", "heterospec_vllm.kernels")

LOADED = """
import sys
heavy = lambda: sorted(m for m in sys.modules if m.startswith(tuple(sys.argv[1].split(","))))
"""


def run_python(code: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", LOADED + code, ",".join(HEAVY), *arguments]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_register_imports_what_it_wraps_and_nothing_of_the_engine() -> None:
    """Beyond vLLM's wrapped modules: neither numba nor a kernel, no runner, no policy."""
    code = """
import vllm.engine.arg_utils, vllm.sampling_params
before = set(sys.modules)
from heterospec_vllm.plugin import register
register()
print(sorted(set(sys.modules) - before))
"""
    loaded = ast.literal_eval(run_python(code))
    ours = [name for name in loaded if name.startswith("heterospec_vllm")]
    assert "heterospec_vllm.plugin.wraps" in ours
    assert not [name for name in loaded if name.startswith(HEAVY)]
    grounded = ("heterospec_vllm.plugin", "heterospec_vllm.config", "heterospec_vllm.errors")
    grounded += ("heterospec_vllm.input_files", "heterospec_vllm.patching")
    assert [name for name in ours[1:] if not name.startswith(grounded)] == []
    assert {name.split(".")[0] for name in loaded} <= {"heterospec_vllm", "difflib"}


def test_an_engine_config_that_is_not_ours_loads_nothing_more(tmp_path: Path) -> None:
    """No speculative config, vLLM's n-gram and its EAGLE-3, in one process with the plugin and one without."""
    target, head = write_target(tmp_path / "target"), write_head(tmp_path / "head")
    code = """
from vllm import EngineArgs
from vllm.plugins import load_general_plugins
load_general_plugins()
target, head = sys.argv[2:]
for speculative_config in (
    None,
    {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3},
    {"method": "eagle3", "model": head, "num_speculative_tokens": 2},
):
    EngineArgs(
        model=target, skip_tokenizer_init=True, max_model_len=128, speculative_config=speculative_config
    ).create_engine_config()
    print("loaded", heavy())
wrapped = EngineArgs.create_speculative_config
print("loaded", hasattr(wrapped, "__wrapped__"))
"""
    *with_plugin, wrapped = _loaded(run_python(code, str(target), str(head)))
    *without, bare = _loaded(run_python(code, str(target), str(head), VLLM_PLUGINS=""))
    assert (wrapped, bare) == ("loaded True", "loaded False")
    assert len(with_plugin) == 3 and with_plugin == without


def _loaded(printed: str) -> list[str]:
    """Without vLLM's log."""
    return [line for line in printed.splitlines() if line.startswith("loaded ")]
