# SPDX-License-Identifier: Apache-2.0
"""`heterospec bench` with real engines in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from harness import ENVIRONMENT
from tiny_folders import write_target

from heterospec_vllm.bench import rows
from heterospec_vllm.bench.child import EngineFailed
from heterospec_vllm.bench.engines import Engine
from heterospec_vllm.bench.rows import Row

pytestmark = pytest.mark.engine

SPEC = """
systems: [plain, eagle3 k=1, off, marginal]
prompts: {ours: builtin}
rounds: 2
max_model_len: 512
cells:
  - {prompts: mix, concurrency: [1, 4], num_prompts: 2, output_len: 12, temperature: [0.0, 1.0]}
"""


def test_an_engine_that_does_not_start_says_why(tmp_path: Path, monkeypatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    target = write_target(tmp_path / "target")
    engine = Engine(model=str(target), max_model_len=4096, skip_tokenizer_init=True)
    with pytest.raises(EngineFailed, match="max_model_len"):
        engine.wait_until_loaded()
    engine.close()


def _start(folder: Path) -> subprocess.Popen:
    (folder / "spec.yaml").write_text(SPEC)
    command = [sys.executable, "-c", "from heterospec_vllm.cli.main import app; app()", "bench"]
    command += [str(folder / "spec.yaml"), "--output", str(folder / "out")]
    environment = {**os.environ, **ENVIRONMENT, "COLUMNS": "200"}
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _rows(folder: Path) -> list[Row]:
    return list(rows.read(folder / "out" / rows.ROWS, Row))


@pytest.mark.full
def test_interrupted_and_resumed_it_leaves_every_row_once(tmp_path: Path) -> None:
    first = _start(tmp_path)
    deadline = time.monotonic() + 1200
    while len(_rows(tmp_path)) < 5 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(1)
    children = psutil.Process(first.pid).children(recursive=True)
    assert children
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait(60) == 130, (tmp_path / "log.txt").read_text()[-3000:]
    assert not psutil.wait_procs(children, timeout=20)[1]
    before = _rows(tmp_path)
    assert 5 <= len(before) < 32
    second = _start(tmp_path)
    assert second.wait(1800) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    done = _rows(tmp_path)
    assert done[: len(before)] == before
    keys = [(r.system, r.cell, r.round) for r in done if r.system != "plain"]
    assert len(keys) == len(set(keys)) == 3 * 4 * 2
    assert all(r.status == "ok" and r.gate is not None and r.seconds for r in done)
    ours = [r for r in done if r.system == "marginal" and r.cell.concurrency == 1]
    assert all(r.counters and r.counters["verified_nodes"] > 0 for r in ours)
    chains = [r for r in done if r.system == "eagle3 k=1"]
    assert all(r.counters and r.counters["num_drafts"] > 0 for r in chains)
