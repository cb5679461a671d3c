# SPDX-License-Identifier: Apache-2.0
"""The way of the plugin's metrics from a worker process to Prometheus, without vLLM."""

import ast
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client")

import prometheus_client
from fake_drafter import batch_of

from heterospec_vllm.config import MAX_DEPTH
from heterospec_vllm.observe import metrics_folder
from heterospec_vllm.observe.counters import STEP_PARTS, StepCounters
from heterospec_vllm.observe.metrics import METRICS
from heterospec_vllm.observe.metrics_folder import (
    SHARED,
    MetricsCollector,
    MetricsWriter,
    open_metrics,
    show_metrics,
)
from heterospec_vllm.observe.reasons import REASONS
from heterospec_vllm.policy.decisions import TreeShape
from heterospec_vllm.policy.paper import PaperPolicy

ROOT = Path(__file__).parents[2]

WORKER = """
import sys
from pathlib import Path
from heterospec_vllm.observe.counters import StepCounters
from heterospec_vllm.observe.metrics_folder import open_metrics
metrics = open_metrics(Path(sys.argv[1]))
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

# One of several API servers: vLLM serves nothing but what lies in the shared folder.
SERVER = """
import json
from prometheus_client import CollectorRegistry, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(json.dumps([[s.name, s.labels, s.value] for f in registry.collect() for s in f.samples]))
"""

# The folder outlives a forked child that runs its exit handlers, and ends with its creator.
CREATOR = """
import os, sys
from heterospec_vllm.observe.metrics_folder import metrics_folder

folder = metrics_folder()
child = os.fork()
if child == 0:
    sys.exit()
os.waitpid(child, 0)
assert folder.exists()
print(folder)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(SHARED, raising=False)
    made = tmp_path / "metrics"
    made.mkdir()
    return made


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged as a warning."""
    messages: list[str] = []
    monkeypatch.setattr(
        metrics_folder.logger, "warning", lambda text, *args: messages.append(text % args)
    )
    return messages


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A registry of its own for the collector."""
    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setattr(metrics_folder, "_collector", None)
    yield registry


def samples(registry: Any) -> dict[str, float]:
    """What a server shows, by name and label value."""
    found = [s for family in registry.collect() for s in family.samples]
    shown = {" ".join([s.name, *s.labels.values()]): s.value for s in found}
    assert len(shown) == len(found)
    return shown


def collected(folder: Path) -> dict[str, float]:
    collector = MetricsCollector()
    collector.add(folder)
    return samples(collector)


def filled_counters() -> StepCounters:
    """A different value in every field that Prometheus shows."""
    counters = StepCounters()
    for number, record in enumerate(METRICS, start=1):
        if record.label is None:
            setattr(counters, record.field, number)
        else:
            getattr(counters, record.field).update(
                {key: number + i / 100 for i, key in enumerate(record.keys)}
            )
    return counters


def test_every_field_is_a_metric_and_every_metric_a_field() -> None:
    assert sorted(record.field for record in METRICS) == sorted(
        field.name for field in fields(StepCounters)
    )


def test_names_follow_the_conventions_of_prometheus() -> None:
    names = [record.name for record in METRICS]
    assert len(set(names)) == len(names)
    for record in METRICS:
        assert re.fullmatch(r"heterospec_[a-z_]+", record.name)
        assert record.name.endswith("_total") == (record.kind == "counter")
        assert record.help.endswith(".") and (record.label is None) == (record.keys == ())


def test_label_values_are_complete() -> None:
    deepest = PaperPolicy(TreeShape(16, MAX_DEPTH, 4), (), max_nodes=16)
    by_depth = next(m for m in METRICS if m.name == "heterospec_accepted_nodes_by_depth_total")
    assert by_depth.keys == tuple(range(1, deepest.plan(batch_of(1)).max_depth + 1))
    package = ROOT / "heterospec_vllm"
    given = {
        node.value.value
        for node in ast.walk(ast.parse((package / "engine" / "fallback.py").read_text()))
        if isinstance(node, ast.Return | ast.Yield)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    for runner in (package / "runners").glob("*.py"):
        given |= set(
            re.findall(r'(?:_set_reason|_decodes_plainly)\(req_id, "(\w+)"\)', runner.read_text())
        )
    assert given == set(REASONS)


def test_counters_as_json() -> None:
    counters = StepCounters(budget=3, price_of_time=2.5)
    counters.nodes_by_stratum[2] += 4
    counters.seconds["target"] += 0.5
    counters.fallbacks["multimodal"] += 0
    read = counters.as_dict()
    assert json.loads(json.dumps(read))["nodes_by_stratum"] == {"2": 4}
    assert read["nodes_by_stratum"] == {2: 4} and read["fallbacks"] == {}
    assert read["seconds"] == {**dict.fromkeys(STEP_PARTS, 0.0), "target": 0.5}
    counters.seconds["target"] += 1.0
    assert read["seconds"]["target"] == 0.5
    with pytest.raises(KeyError):
        counters.seconds["a part that is not declared"] += 1.0


def test_every_value_arrives(folder: Path) -> None:
    writer = MetricsWriter(folder)
    assert set(collected(folder).values()) == {0.0}
    counters = filled_counters()
    writer.publish(counters)
    expected = {}
    for record in METRICS:
        found = getattr(counters, record.field)
        if record.label is None:
            expected[record.name] = found
        else:
            expected |= {f"{record.name} {key}": found[key] for key in record.keys}
    assert collected(folder) == pytest.approx(expected)


def run(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def expect_worker(seen: dict[str, float]) -> None:
    assert seen["heterospec_steps_total"] == 7  # 3, then 5, then 2 after a reset
    assert seen["heterospec_accepted_nodes_by_depth_total 2"] == 4
    assert seen["heterospec_step_seconds_total draft"] == 0.5
    assert seen["heterospec_budget_nodes"] == 0
    expected = {
        " ".join([record.name, *map(str, key)])
        for record in METRICS
        for key in ([[key] for key in record.keys] or [[]])
    }
    assert set(seen) == expected


def test_another_process_sees_every_value(folder: Path) -> None:
    run(WORKER, str(folder))
    expect_worker(collected(folder))


def test_several_servers_show_what_lies_in_the_folder_they_share(folder: Path) -> None:
    run(WORKER, str(folder), **{SHARED: str(folder)})
    found = json.loads(run(SERVER, **{SHARED: str(folder)}))
    expect_worker({" ".join([name, *labels.values()]): value for name, labels, value in found})


def test_a_shared_folder_is_not_ours_and_shown_by_vllm_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, registry: Any
) -> None:
    monkeypatch.setenv(SHARED, str(folder))
    assert metrics_folder.metrics_folder() == folder
    MetricsWriter(folder)
    show_metrics(folder)
    assert samples(registry) == {}


def test_an_engine_after_another_goes_on_in_a_shared_folder(folder: Path) -> None:
    MetricsWriter(folder).publish(StepCounters(steps=3, budget=5))
    second = MetricsWriter(folder)
    assert collected(folder)["heterospec_steps_total"] == 3
    assert collected(folder)["heterospec_budget_nodes"] == 0
    second.publish(StepCounters(steps=2))
    assert collected(folder)["heterospec_steps_total"] == 5


def test_a_missing_folder_shows_nothing(tmp_path: Path, registry: Any) -> None:
    show_metrics(tmp_path / "gone")
    assert prometheus_client.generate_latest(registry) == b""


def test_a_damaged_file_is_logged_once(folder: Path, registry: Any, warnings: list[str]) -> None:
    show_metrics(folder)
    (folder / "counter_1.db").write_bytes(b"x" * 10_000)
    for _ in range(2):
        assert prometheus_client.generate_latest(registry) == b""
    assert len(warnings) == 1 and "no metrics of the plugin" in warnings[0]


def test_worker_goes_on_without_a_folder(tmp_path: Path, warnings: list[str]) -> None:
    assert open_metrics(tmp_path / "gone") is None
    assert len(warnings) == 1 and "No such file or directory" in warnings[0]


def test_text_output_declares_every_metric(folder: Path, registry: Any) -> None:
    show_metrics(folder)
    MetricsWriter(folder)
    lines = prometheus_client.generate_latest(registry).decode().splitlines()
    for record in METRICS:
        assert f"# HELP {record.name} {record.help}" in lines
        assert f"# TYPE {record.name} {record.kind}" in lines
    # The address parameter name[] of /metrics, which needs the names before values exist.
    chosen = registry.restricted_registry(["heterospec_steps_total"])
    assert samples(chosen) == {"heterospec_steps_total": 0.0}


def test_registered_once_and_the_newest_engine_is_shown(
    folder: Path, tmp_path: Path, registry: Any, warnings: list[str]
) -> None:
    show_metrics(folder)
    assert samples(registry) == {}  # the engine is still loading
    first = MetricsWriter(folder)
    first.publish(StepCounters(steps=1))
    second, unused = tmp_path / "second", tmp_path / "unused"
    for another in (folder, second, unused, second):
        another.mkdir(exist_ok=True)
        show_metrics(another)
    assert samples(registry)["heterospec_steps_total"] == 1
    MetricsWriter(second).publish(StepCounters(steps=2))
    first.publish(StepCounters(steps=3))
    assert samples(registry)["heterospec_steps_total"] == 2
    assert warnings == []


def test_unlisted_fallback_reason_counts_as_other(folder: Path) -> None:
    counters = StepCounters()
    counters.fallbacks.update({"multimodal": 2, "a new reason": 3, "another": 4})
    MetricsWriter(folder).publish(counters)
    found = collected(folder)
    assert found["heterospec_plain_requests_total multimodal"] == 2
    assert found["heterospec_plain_requests_total other"] == 7
    assert found["heterospec_plain_requests_total grammar"] == 0


def test_a_folder_is_private_and_ends_with_its_creator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SHARED, raising=False)
    folder = metrics_folder.metrics_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    created = run(CREATOR, TMPDIR=str(tmp_path)).strip()
    assert created.startswith(str(tmp_path)) and not Path(created).exists()


def test_import_is_light() -> None:
    code = (
        "import sys, heterospec_vllm.observe.metrics_folder\n"
        "heavy = {'prometheus_client', 'torch', 'vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_documentation_lists_every_metric() -> None:
    rows = []
    for record in METRICS:
        keys = ", ".join(str(key) for key in record.keys)
        if record.keys and isinstance(record.keys[0], int):
            keys = f"{record.keys[0]} to {record.keys[-1]}"
        label = f"`{record.label}`: {keys}" if record.label else ""
        rows.append(f"| `{record.name}` | {record.kind} | {label} | {record.help} |")
    lines = (ROOT / "docs" / "metrics.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| `heterospec_")] == rows
    mentioned = set(re.findall(r"heterospec_[a-z_]+", "\n".join(lines)))
    assert mentioned - {record.name for record in METRICS} == {"heterospec_counters"}
