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
from prometheus_client.parser import text_string_to_metric_families

from heterospec_vllm import metrics_file
from heterospec_vllm.config import HeteroSpecConfig, allowed_values
from heterospec_vllm.metrics import STEP_PARTS, StepCounters
from heterospec_vllm.metrics_file import (
    FALLBACK_REASONS,
    MAX_DEPTH,
    METRICS,
    MetricsCollector,
    MetricsFile,
    new_metrics_file,
    open_metrics_file,
    read_values,
    register_collector,
)

ROOT = Path(__file__).parents[2]
HEADER_SIZE = 16  # two slots of one size follow

# Writes snapshots in which some values always agree, until it is told to stop.
WRITER = """
import sys, threading
from pathlib import Path
from heterospec_vllm.metrics import StepCounters
from heterospec_vllm.metrics_file import MetricsFile

file, counters = MetricsFile(Path(sys.argv[1])), StepCounters()
stopped = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stopped.set())).start()
print("writing", flush=True)
while not stopped.is_set():
    counters.steps += 1
    counters.nodes_by_stratum[7] += 1
    counters.seconds["rest"] += 1.0
    counters.price_of_time = counters.max_accepted_depth = counters.steps
    file.publish(counters)
print(counters.steps)
"""

# The file outlives a forked child that runs its exit handlers, and ends with its creator.
CREATOR = """
import os, sys
from heterospec_vllm.metrics_file import new_metrics_file

path = new_metrics_file()
child = os.fork()
if child == 0:
    sys.exit()
os.waitpid(child, 0)
assert path.exists()
print(path)
"""


@pytest.fixture
def path() -> Iterator[Path]:
    path = new_metrics_file()
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the module logs; vLLM's logger does not hand its records to pytest."""
    found: list[str] = []
    monkeypatch.setattr(
        metrics_file.logger, "warning", lambda text, *args: found.append(text % args)
    )
    return found


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A fresh registry in place of the process's own, and no collector yet."""
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setattr(metrics_file, "_collector", None)
    yield registry


def samples(registry: Any) -> dict[str, float]:
    """The values of the text output by name and label value, such as ``heterospec_steps_total 7``."""
    text = prometheus_client.generate_latest(registry).decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = " ".join([sample.name, *sample.labels.values()])
            assert key not in found, "Prometheus refuses a page with the same sample twice"
            found[key] = sample.value
    return found


def collected(path: Path) -> dict[str, float]:
    collector = MetricsCollector()
    collector.add(path)
    registry = prometheus_client.CollectorRegistry()
    registry.register(collector)
    return samples(registry)


def break_slot(path: Path, slot: int) -> None:
    """Changes one byte of its values, as a writer does that lost its CPU in the middle of a write."""
    data = bytearray(path.read_bytes())
    slot_size = (len(data) - HEADER_SIZE) // 2
    data[HEADER_SIZE + (slot + 1) * slot_size - 1] ^= 1
    path.write_bytes(data)


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
    assert allowed_values(HeteroSpecConfig, "max_depth") == f"an integer from 1 to {MAX_DEPTH}"
    package = ROOT / "heterospec_vllm"
    returned = {
        node.value.value
        for node in ast.walk(ast.parse((package / "fallback.py").read_text()))
        if isinstance(node, ast.Return)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    for runner in (package / "runners").glob("*.py"):
        returned |= set(re.findall(r'fallbacks\["(\w+)"\]', runner.read_text()))
    assert len(returned) > 5 and returned <= set(FALLBACK_REASONS)


def test_counters_as_json() -> None:
    counters = StepCounters(budget=3, price_of_time=2.5)
    counters.nodes_by_stratum[2] += 4
    counters.seconds["target"] += 0.5
    counters.fallbacks["penalties"] += 0
    read = counters.as_dict()
    assert json.loads(json.dumps(read))["nodes_by_stratum"] == {"2": 4}
    assert read["nodes_by_stratum"] == {2: 4} and read["fallbacks"] == {}
    assert read["seconds"] == {**dict.fromkeys(STEP_PARTS, 0.0), "target": 0.5}
    counters.seconds["target"] += 1.0
    assert read["seconds"]["target"] == 0.5
    with pytest.raises(KeyError):
        counters.seconds["a part that is not declared"] += 1.0


def test_every_value_arrives(path: Path) -> None:
    file = MetricsFile(path)
    assert set(collected(path).values()) == {0.0}
    counters = filled_counters()
    file.publish(counters)
    expected = {}
    for record in METRICS:
        found = getattr(counters, record.field)
        if record.label is None:
            expected[record.name] = found
        else:
            expected |= {f"{record.name} {key}": found[key] for key in record.keys}
    assert collected(path) == pytest.approx(expected)


def test_another_process_writes_and_no_snapshot_is_torn(path: Path) -> None:
    MetricsFile(path).publish(filled_counters())
    values = read_values(path)
    assert values is not None
    # Where the values that agree lie, by the different values of every field.
    by_field = {record.field: number for number, record in enumerate(METRICS, start=1)}
    wanted = [
        by_field["steps"],
        by_field["nodes_by_stratum"] + 0.07,
        by_field["seconds"] + 0.04,
        by_field["price_of_time"],
        by_field["max_accepted_depth"],
    ]
    places = [values.index(value) for value in wanted]
    arguments = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(
        arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        seen = []
        for _ in range(2000):
            found = read_values(path)
            assert found is not None
            assert len({found[place] for place in places}) == 1
            seen.append(found[places[0]])
        last, _ = writer.communicate()
    assert seen == sorted(seen) and len(set(seen)) > 1
    assert collected(path)["heterospec_steps_total"] == int(last)


def test_while_one_slot_is_written_the_other_is_read(path: Path) -> None:
    file = MetricsFile(path)
    for steps in range(1, 5):
        file.publish(StepCounters(steps=steps))
        for slot in range(2):
            whole = path.read_bytes()
            break_slot(path, slot)
            # The newest snapshot, or the one before it: both slots are in use, each in its turn.
            is_newest = slot == (steps + 1) % 2
            assert collected(path)["heterospec_steps_total"] == steps - is_newest
            path.write_bytes(whole)


def test_without_a_whole_slot_nothing_is_read(path: Path, warnings: list[str]) -> None:
    MetricsFile(path).publish(filled_counters())
    for slot in range(2):
        break_slot(path, slot)
    with pytest.raises(ValueError, match="found a write in progress at each of 50 attempts"):
        read_values(path)
    collector = MetricsCollector()
    collector.add(path)
    for _ in range(2):
        assert list(collector.collect()) == []
    assert len(warnings) == 1
    # A worker that takes over the file makes it whole again.
    MetricsFile(path)
    assert len(list(collector.collect())) == len(METRICS)


def test_missing_file_is_logged_once(tmp_path: Path, registry: Any, warnings: list[str]) -> None:
    register_collector(tmp_path / "gone")
    for _ in range(2):
        assert prometheus_client.generate_latest(registry) == b""
    assert len(warnings) == 1 and "No such file or directory" in warnings[0]


@pytest.mark.parametrize("content", [b"", b"HSMETRIC", b"x" * 10_000])
def test_a_file_of_another_layout_is_left_alone(
    path: Path, warnings: list[str], content: bytes
) -> None:
    path.write_bytes(content)
    for access in (read_values, MetricsFile):
        with pytest.raises(ValueError, match="no metrics file of this version"):
            access(path)
    assert open_metrics_file(path) is None and len(warnings) == 1
    assert path.read_bytes() == content


def test_worker_goes_on_without_a_file(tmp_path: Path, warnings: list[str]) -> None:
    assert open_metrics_file(tmp_path / "gone") is None
    assert len(warnings) == 1 and "No such file or directory" in warnings[0]


def test_text_output_declares_every_metric(path: Path, registry: Any) -> None:
    register_collector(path)
    MetricsFile(path)
    lines = prometheus_client.generate_latest(registry).decode().splitlines()
    for record in METRICS:
        assert f"# HELP {record.name} {record.help}" in lines
        assert f"# TYPE {record.name} {record.kind}" in lines
    # The address parameter name[] of /metrics, which needs the names before values exist.
    chosen = registry.restricted_registry(["heterospec_steps_total"])
    assert samples(chosen) == {"heterospec_steps_total": 0.0}


def test_registered_once_and_the_newest_engine_is_shown(
    path: Path, registry: Any, warnings: list[str]
) -> None:
    register_collector(path)
    assert samples(registry) == {}  # the engine is still loading
    first = MetricsFile(path)
    first.publish(StepCounters(steps=1))
    second, unused = new_metrics_file(), new_metrics_file()
    for another in (path, second, unused, second):
        register_collector(another)
    assert samples(registry)["heterospec_steps_total"] == 1
    MetricsFile(second).publish(StepCounters(steps=2))
    first.publish(StepCounters(steps=3))
    assert samples(registry)["heterospec_steps_total"] == 2
    assert warnings == []


def test_unlisted_fallback_reason_counts_as_other(path: Path) -> None:
    counters = StepCounters()
    counters.fallbacks.update({"penalties": 2, "a new reason": 3, "another": 4})
    MetricsFile(path).publish(counters)
    found = collected(path)
    assert found["heterospec_plain_requests_total penalties"] == 2
    assert found["heterospec_plain_requests_total other"] == 7
    assert found["heterospec_plain_requests_total bad_words"] == 0


def test_file_is_private_and_ends_with_its_creator(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    created = subprocess.run(
        [sys.executable, "-c", CREATOR], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert not Path(created.stdout.strip()).parent.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another account's files")
def test_file_of_another_account_is_refused(path: Path, warnings: list[str]) -> None:
    os.chown(path, 12345, 12345)
    assert open_metrics_file(path) is None
    with pytest.raises(OSError, match="found a file of account 12345"):
        read_values(path)


def test_file_behind_a_link_is_refused(path: Path, tmp_path: Path, warnings: list[str]) -> None:
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert open_metrics_file(path) is None
    assert len(warnings) == 1 and f"{path}: found a link" in warnings[0]


def test_import_is_light() -> None:
    code = (
        "import sys, heterospec_vllm.metrics_file\n"
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
