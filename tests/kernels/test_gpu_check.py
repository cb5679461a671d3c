# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check` under the interpreter: it compares every kernel, and it finds what is wrong."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
KERNELS = {"topk_entropy", "tree_verify", "kv_compact", "tree_attention", "strata_mask"}


def test_script_compares_every_kernel(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = subprocess.run(
        [
            sys.executable,
            str(TOOLS / "gpu_check.py"),
            "--interpret",
            "--no-tests",
            "--json",
            str(out),
        ],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert {row["kernel"] for row in found["kernels"]} == KERNELS
    for row in found["kernels"]:
        assert row["status"] == "ok" and row["launches"] >= 1
        assert row["microseconds"] > 0 and row["roofline_microseconds"] > 0
    assert "kernel tests: left out" in done.stdout and "of roofline" in done.stdout


def test_wrong_results_and_failures_are_told(
    monkeypatch: pytest.MonkeyPatch, device, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    import gpu_cases
    import gpu_check

    true = gpu_cases.topk_entropy_reference

    def wrong(*arguments):
        result = true(*arguments)
        return replace(result, log_probs=result.log_probs + 0.01)

    def broken(*arguments, **options):
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu_cases, "topk_entropy_reference", wrong)
    monkeypatch.setattr(gpu_cases, "kv_compact", broken)
    roof = gpu_check.Roof("none", 1e12, 1e12)
    rows = {row.kernel: row for row in gpu_check.compare_and_time(device, roof, small=True)}
    assert "not close" in rows["topk_entropy"].status
    assert rows["kv_compact"].status == "ValueError: no such kernel"
    assert rows["strata_mask"].status == "ok"
    assert "no such kernel" in gpu_check.table(list(rows.values()))


def test_the_suite_runs_on_a_checkout_that_nobody_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The package it makes is the one its tests import, kernels and what they are compared with."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import gpu_check

    gpu_check._make_package(tmp_path)
    where = "import heterospec_vllm.kernels as k, heterospec_vllm.tree.trees as t; print(k.__file__, t.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, text=True, capture_output=True, check=True
    )
    assert done.stdout.split() == [
        str(tmp_path / "heterospec_vllm" / part)
        for part in ("kernels/__init__.py", "tree/trees.py")
    ]
    only_gpu = gpu_check.gpu_tests(tmp_path)
    assert any("test_graph_replay" in name for name in only_gpu)
