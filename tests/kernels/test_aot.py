# SPDX-License-Identifier: Apache-2.0
"""The ahead-of-time check: real targets of both vendors, and that it fails when it must.

What compiles runs in a process of its own: here Triton may be interpreting. The whole list is not run
here: it takes one to three minutes on one core, and `python -m heterospec_vllm.kernels.gpu.aot` is the check.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from triton.runtime.errors import OutOfResources

from heterospec_vllm.kernels.gpu import aot
from heterospec_vllm.kernels.gpu.aot_registry import AotConfig, all_configs, kernel_modules

MODULE = "heterospec_vllm.kernels.gpu.aot"
BROKEN = """
import sys
import triton
import triton.language as tl
from heterospec_vllm.kernels.gpu import aot
from heterospec_vllm.kernels.gpu.aot_registry import AotConfig

@triton.jit
def _spilling_kernel(x_ptr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    # Every value is needed after all of them have been loaded, by one warp.
    x = tl.load(x_ptr + lanes)
    tl.debug_barrier()
    tl.store(x_ptr + 1 + lanes, x)

@triton.jit
def _wrong_kernel(x_ptr):
    tl.store(x_ptr, undefined_name)

configs = [
    AotConfig(_spilling_kernel, "big", {"x_ptr": "*fp32"}, {"SIZE": 32768}, num_warps=1),
    AotConfig(_wrong_kernel, "", {"x_ptr": "*fp32"}, {}),
    AotConfig(_wrong_kernel, "arguments", {"y_ptr": "*fp32"}, {}),
]
sys.exit(aot.main(["--json", *sys.argv[1:]], configs))
"""


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )


@dataclass
class FakeKernel:
    __name__: str


def _config(name: str) -> AotConfig:
    return AotConfig(FakeKernel("_fake_kernel"), name, {}, {})


def test_compiles_a_kernel_for_both_vendors() -> None:
    arguments = ("-m", MODULE, "--kernel", "walk", "--target", "sm_90", "--target", "gfx942")
    done = _run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["target"] for row in rows] == ["sm_90", "gfx942"]
    for row in rows:
        assert set(row) == {"kernel", "config", "target", "registers", "spills", "shared_memory"}
        assert row["kernel"] == "_walk_kernel" and row["registers"] > 0 and row["spills"] == 0

    printed = _run(*arguments).stdout.splitlines()
    assert printed[0].split()[:4] == ["kernel", "config", "target", "registers"]
    assert [line.split()[2:5] for line in printed[1:]] == [
        [row["target"], str(row["registers"]), "0"] for row in rows
    ]


def test_finds_spills_and_kernels_that_do_not_compile(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    done = _run(str(script), "--target", "sm_80", "--target", "gfx942")
    assert done.returncode == 1, done.stderr
    rows = json.loads(done.stdout)
    for row in rows[:2]:
        assert row["spills"] > 0 and row["problem"] == f"spills {row['spills']} bytes"
    for row in rows[2:]:
        assert row["problem"].startswith("does not compile: ") and row["registers"] is None
    assert "undefined_name" in rows[2]["problem"] and "y_ptr" in rows[4]["problem"]
    assert "6 of 6 configurations failed" in done.stderr


@pytest.mark.parametrize(
    ("resources", "problem", "status"),
    [
        (aot.Resources(40, 0, 65536), None, 0),
        (aot.Resources(40, 0, 65537), "needs more shared memory than 65536 bytes", 1),
        (aot.Resources(255, 8, 0), "spills 8 bytes", 1),
        (OutOfResources(2, 1, "shared memory"), "does not compile: OutOfResources", 1),
    ],
)
def test_exit_status(capsys, resources, problem, status) -> None:
    """One good configuration does not hide a bad one."""

    def compile_one(config: AotConfig, target: aot.CompileTarget) -> aot.Resources:
        if config.name == "good":
            return aot.Resources(32, 0, 0)
        if isinstance(resources, Exception):
            raise resources
        return resources

    arguments = ["--json", "--target", "gfx942"]
    configs = [_config("bad"), _config("good")]
    assert aot.main(arguments, configs, compile_one) == status
    rows = json.loads(capsys.readouterr().out)
    assert rows[0].get("problem", "").startswith(problem or "")
    assert ("problem" in rows[0]) == (problem is not None) and "problem" not in rows[1]


def test_other_errors_are_not_hidden() -> None:
    """A bug of the check itself is not a kernel's failure."""

    def compile_one(config: AotConfig, target: aot.CompileTarget) -> aot.Resources:
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        aot.main([], [_config("any")], compile_one)


def test_refuses_what_makes_no_sense(capsys, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([], [_config("any")]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    assert (
        aot.main(["--kernel", "nothing"], [_config("any")], lambda c, t: aot.Resources(1, 0, 0))
        == 2
    )
    with pytest.raises(SystemExit) as stopped:
        aot.main(["--target", "sm_1"])
    assert stopped.value.code == 2


def test_every_kernel_is_in_the_registry() -> None:
    """A kernel without a configuration would never be compiled for a GPU before a user does it."""
    names = {config.kernel_name for config in all_configs()}
    defined = set()
    for module in kernel_modules():
        loaded = sys.modules[module]
        defined |= {
            name
            for name, value in vars(loaded).items()
            if name.endswith("_kernel") and getattr(value, "fn", None).__module__ == module
        }
    assert {"_walk_kernel", "_kv_compact_kernel"} <= defined <= names


def test_signatures_name_every_argument() -> None:
    for config in all_configs():
        given = [*config.signature, *config.constexprs]
        assert sorted(given) == sorted(config.kernel.arg_names), (config.kernel_name, config.name)
