# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/bench_growth.py` on a tiny engine: real steps, real counters, two points a sweep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ENVIRONMENT
from tiny_model import make_head, make_target

pytestmark = pytest.mark.engine
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_growth.py"


def test_every_point_is_measured_on_decoding_steps(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", 32)
    head = make_head(tmp_path / "head", target)
    command = [sys.executable, SCRIPT, "--target", target, "--head", head, "--dtype", "float32"]
    command += ["--nodes", "1", "12", "--requests", "1", "5", "--context", "16", "300"]
    command += ["--steps", "3", "--enforce-eager", "--json", tmp_path / "out.json"]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # A point whose trees had other nodes, by the engine's counters, ends the script.
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    points = json.loads((tmp_path / "out.json").read_text())
    assert [(one["sweep"], one[one["sweep"]]) for one in points] == [
        ("nodes", 1), ("nodes", 12), ("requests", 1), ("requests", 5),
        ("context", 16), ("context", 300),
    ]  # fmt: skip
    for one in points:
        assert 0 < one["plain_ms"] < one["ms"] < 1000
        assert one["spans_ms"]["target forward"] < one["spans_ms"]["execute_model"] < 2 * one["ms"]
        assert one["spans_ms"]["draft: levels"] > 0
        assert one["attention_ms"] > 0 and one["vllm_attention_ms"] > 0
