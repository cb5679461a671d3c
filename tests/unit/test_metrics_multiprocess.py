# SPDX-License-Identifier: Apache-2.0
"""Metrics of the worker as a server sees them that collects from the files of several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from heterospec_vllm.observe.metrics_file import METRICS
from heterospec_vllm.observe.metrics_multiprocess import open_multiprocess_metrics

WORKER = """
from heterospec_vllm.observe.counters import StepCounters
from heterospec_vllm.observe.metrics_multiprocess import open_multiprocess_metrics
metrics = open_multiprocess_metrics()
counters = StepCounters()
counters.steps, counters.budget = 3, 9
counters.accepted_per_depth[2] = 4
counters.seconds["draft"] = 0.5
metrics.publish(counters)
metrics.publish(counters)
counters.steps, counters.budget = 5, 6
metrics.publish(counters)
counters = StepCounters()  # a reset in Python
counters.steps = 2
metrics.publish(counters)
"""

SERVER = """
import json
from prometheus_client import CollectorRegistry, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(json.dumps([[s.name, s.labels, s.value] for f in registry.collect() for s in f.samples]))
"""


@pytest.fixture
def seen(tmp_path: Path) -> dict[str, float]:
    """What a server shows, by name and label value."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for code in (WORKER, SERVER):  # a process each: prometheus_client reads the variable once
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    samples = json.loads(done.stdout)
    found = {" ".join([name, *labels.values()]): value for name, labels, value in samples}
    assert len(found) == len(samples)
    return found


def test_another_process_sees_every_value(seen: dict[str, float]) -> None:
    assert seen["heterospec_steps_total"] == 7  # 3, then 5, then 2 after a reset
    assert seen["heterospec_accepted_nodes_by_depth_total 2"] == 4
    assert seen["heterospec_step_seconds_total draft"] == 0.5
    assert seen["heterospec_budget_nodes"] == 0


def test_every_label_value_is_there_from_the_start(seen: dict[str, float]) -> None:
    expected = {
        " ".join([record.name, *map(str, key)])
        for record in METRICS
        for key in ([[key] for key in record.keys] or [[]])
    }
    assert {name for name in seen if not name.endswith("_created")} == expected


def test_nothing_is_kept_where_one_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert open_multiprocess_metrics() is None
