# SPDX-License-Identifier: Apache-2.0
"""Starts `driver.py` for a job and compares what two engines answered."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A first divergence counts as a near-tie where the target's two best logits are closer than this;
# float32 sums in another order move a logit by about 1e-5.
NEAR_TIE_GAP = 1e-4

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # One thread: a tiny model gains nothing from two, and a busy machine stalls their barriers.
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def run_engine(
    job: dict[str, Any], folder: Path, timeout: int = 1800, driver: Path | None = None
) -> dict[str, Any]:
    """The driver's results; on failure the end of its log is the assertion's message."""
    folder.mkdir(parents=True, exist_ok=True)
    job_file, out_file, log_file = folder / "job.json", folder / "out.json", folder / "log.txt"
    job_file.write_text(json.dumps(job))
    driver = driver or Path(__file__).with_name("driver.py")
    with log_file.open("w") as log:
        done = subprocess.run(
            [sys.executable, str(driver), str(job_file), str(out_file)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            timeout=timeout,
            check=False,
        )
    assert done.returncode == 0, log_file.read_text()[-6000:]
    return json.loads(out_file.read_text())


@dataclass(frozen=True)
class Divergence:
    """Where an answer first differs from the plain one."""

    prompt: int
    completion: int
    position: int


def divergences(plain: dict[str, Any], ours: dict[str, Any]) -> list[Divergence]:
    """Every completion whose tokens differ, at its first differing position."""
    found = []
    assert len(plain["answers"]) == len(ours["answers"])
    for p, (expected, got) in enumerate(zip(plain["answers"], ours["answers"], strict=True)):
        assert len(expected) == len(got)
        for c, (a, b) in enumerate(zip(expected, got, strict=True)):
            a, b = a["token_ids"], b["token_ids"]
            if a != b:
                same = next(
                    (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                    min(len(a), len(b)),
                )
                found.append(Divergence(p, c, same))
    return found


def assert_speculated(counters: dict[str, Any], min_nodes: float = 4, min_depth: int = 3) -> None:
    """The run really drafted, verified and accepted trees: a test that decodes plainly fails."""
    assert counters["fallbacks"] == {}, counters
    assert counters["eligible_steps"] > 0, counters
    assert counters["tree_steps"] > 0.9 * counters["eligible_steps"], counters
    assert counters["verified_nodes"] > min_nodes * counters["drafted_trees"], counters
    assert counters["max_verified_depth"] >= min_depth, counters
    assert counters["max_accepted_depth"] >= min_depth, counters
    assert counters["accepted_non_first_child"] > 0, counters
    assert counters["moved_kv_rows"] > 0, counters
