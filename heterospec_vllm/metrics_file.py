# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of the plugin, and the file that brings them from the worker to the server.

vLLM's worker may be another process than the one that answers ``/metrics``, and vLLM's own way from one to the other
has no free field. So the server's process makes a small file (:func:`new_metrics_file`), the worker writes all values
into it once a step (:class:`MetricsFile`), and a collector in the server's process reads it when Prometheus asks
(:func:`register_collector`). ``METRICS`` declares every metric once; the file's layout follows from it.

The file is a header and two slots, each one float64 for each label value of each metric under a checksum and a sequence
number: 0 until a worker opens the file, and 1 more after each write. The newest slot that is whole counts.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from heterospec_vllm.kernels import private_files
from heterospec_vllm.metrics import STEP_PARTS, StepCounters
from heterospec_vllm.strata import NUM_STRATA

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# A child of vLLM's logger, so that its handlers and levels apply.
logger = logging.getLogger("vllm.heterospec")

# The last value of a label that takes in what the others do not name.
OTHER = "other"
FALLBACK_REASONS = (
    "pooling",
    "prompt_embeds",
    "multimodal",
    "structured_output",
    "penalties",
    "bad_words",
    "thinking_token_budget",
    "switched_off",
)
MAX_DEPTH = 16  # the config's limit of max_depth


@dataclass(frozen=True)
class MetricRecord:
    """One metric: what Prometheus shows, and where its value lies in :class:`StepCounters`."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    field: str  # of StepCounters: a number, or a mapping for a metric with a label
    label: str | None = None
    keys: tuple[int | str, ...] = ()  # of the mapping, one for each value of the label

    def by_label(self, found: Mapping[Any, float]) -> list[float]:
        """The values of the field's mapping, in the order of ``keys``."""
        values = [found.get(key, 0) for key in self.keys]
        if self.keys[-1] == OTHER:
            values[-1] = sum(found.values()) - sum(values[:-1])
        return values


_STRATA = {"label": "stratum", "keys": tuple(range(NUM_STRATA))}


def _counter(name: str, field: str, help: str, **labels: Any) -> MetricRecord:
    return MetricRecord(f"heterospec_{name}_total", "counter", help, field, **labels)


def _gauge(name: str, field: str, help: str) -> MetricRecord:
    return MetricRecord(f"heterospec_{name}", "gauge", help, field)


METRICS = (
    _counter("steps", "steps", "Target steps."),
    _counter("eligible_steps", "eligible_steps", "Steps that verified drafts."),
    _counter(
        "tree_steps",
        "tree_steps",
        "Steps that verified drafts of which some was a tree rather than a chain.",
    ),
    _counter("draft_steps", "draft_steps", "Steps after which the head drafted."),
    _counter("head_passes", "head_passes", "Forward passes of the head."),
    _counter("drafted_nodes", "drafted_nodes", "Candidate nodes that the head proposed."),
    _counter("verified_nodes", "verified_nodes", "Draft nodes that the target verified."),
    _counter("verified_trees", "drafted_trees", "Drafts verified, one a request and step."),
    _counter("accepted_nodes", "accepted_nodes", "Draft nodes accepted."),
    _counter(
        "accepted_nodes_by_depth",
        "accepted_per_depth",
        "Draft nodes accepted, by their depth in the tree.",
        label="depth",
        keys=tuple(range(1, MAX_DEPTH + 1)),
    ),
    _counter(
        "accepted_non_first_child_nodes",
        "accepted_non_first_child",
        "Draft nodes accepted that were not the likeliest child of their parent.",
    ),
    _counter(
        "stratum_nodes",
        "nodes_by_stratum",
        "Draft nodes verified, by the stratum of their tree (0 is the least uncertain).",
        **_STRATA,
    ),
    _counter("stratum_trees", "trees_by_stratum", "Drafts verified, by stratum.", **_STRATA),
    _counter(
        "stratum_depth",
        "depth_by_stratum",
        "Sum of the depths of verified drafts, by stratum.",
        **_STRATA,
    ),
    _counter(
        "plain_requests",
        "fallbacks",
        "Requests that decode without speculation, by reason.",
        label="reason",
        keys=(*FALLBACK_REASONS, OTHER),
    ),
    _counter(
        "dropped_drafts", "dropped_drafts", "Scheduled drafts that matched no tree (padding)."
    ),
    _counter("moved_kv_rows", "moved_kv_rows", "KV rows moved to make accepted paths contiguous."),
    _counter(
        "in_place_steps",
        "steps_compacted_in_place",
        "Steps that verified drafts and had to move no KV row.",
    ),
    _counter(
        "caught_up_tokens",
        "caught_up_tokens",
        "Tokens that the head read later than in the step that emitted them.",
    ),
    _counter(
        "late_contexts",
        "late_contexts",
        "Requests of which the draft head read only the later tokens: drafts are worse, answers the same.",
    ),
    _counter(
        "unread_requests",
        "unread_requests",
        "Requests, summed over steps, that decoded plainly because the head's reading them would cost more than it "
        "could save (`marginal`).",
    ),
    _counter("probes", "probes", "Steps that drafted to measure while speculation was off."),
    _counter("pauses", "pauses", "Plain steps to measure while speculation was on."),
    _counter(
        "step_seconds",
        "seconds",
        "Seconds of target steps, by part; the parts add up to the whole.",
        label="part",
        keys=STEP_PARTS,
    ),
    _counter(
        "off_seconds",
        "seconds_off",
        "Seconds of steps with requests in which speculation was switched off.",
    ),
    _gauge(
        "budget_nodes",
        "budget",
        "Draft nodes that the last step verified, all requests together; 0 in a plain step.",
    ),
    _gauge(
        "price_of_time",
        "price_of_time",
        "Tokens that a second was worth when the last drafts were chosen (`marginal`); 0 where nothing was drafted.",
    ),
    _gauge(
        "expected_gain",
        "expected_gain",
        "Tokens a second with speculation, relative to plain decoding, in a batch of the present size, as measurements "
        "have corrected the prediction (`marginal`); speculation is off where it is low. 0 for other policies.",
    ),
    _gauge("max_verified_depth", "max_verified_depth", "Deepest draft verified so far."),
    _gauge("max_accepted_depth", "max_accepted_depth", "Deepest draft node accepted so far."),
)

# One call for all fields: the worker reads them in every step.
_fields_of = attrgetter(*(record.field for record in METRICS))


def flat_values(counters: StepCounters) -> list[float]:
    """The values of all metrics in the order of ``METRICS``."""
    values: list[float] = []
    for record, found in zip(METRICS, _fields_of(counters), strict=True):
        if record.label is None:
            values.append(found)
        else:
            values += record.by_label(found)
    return values


# The values lie in two slots that are written in turn. Python has no memory barriers and a writer may lose its CPU at
# any place, so a slot is as good as its checksum; while one is being written, the other holds the values before.
_HEADER = struct.Struct("@8sQ")  # magic, layout
_SLOT = struct.Struct("@QQ")  # checksum of what follows in the slot, sequence number
_VALUES = struct.Struct(f"@{sum(max(1, len(record.keys)) for record in METRICS)}d")
_SLOT_SIZE = _SLOT.size + _VALUES.size
_NUM_SLOTS = 2
_SIZE = _HEADER.size + _NUM_SLOTS * _SLOT_SIZE
# The layout tells apart the files of two versions of the plugin.
_START = _HEADER.pack(
    b"HSMETRIC", zlib.crc32(repr([(r.name, r.label, r.keys) for r in METRICS]).encode())
)

_READ_ATTEMPTS = 50
_RETRY_SECONDS = 1e-3  # only a reader that loses its CPU within one read meets two writes


class _Snapshot(NamedTuple):
    """What one slot holds; sequence number 0 is that of a new file."""

    sequence: int
    values: bytes

    def pack(self) -> bytes:
        checksum = zlib.crc32(self.values, self.sequence)
        return _SLOT.pack(checksum, self.sequence) + self.values


def _newest_snapshot(content: bytes) -> _Snapshot | None:
    """The newest whole slot, or None where both are being written."""
    whole = []
    for start in range(_HEADER.size, _SIZE, _SLOT_SIZE):
        slot = content[start : start + _SLOT_SIZE]
        snapshot = _Snapshot(_SLOT.unpack_from(slot)[1], slot[_SLOT.size :])
        if snapshot.pack() == slot:
            whole.append(snapshot)
    return max(whole, default=None)


def new_metrics_file() -> Path:
    """Makes an empty metrics file for one engine, in a private folder that this process removes when it exits.

    What a killed process left is removed here, too.
    """
    path = private_files.folder_of_process("heterospec-metrics-") / "metrics"
    content = _START + _NUM_SLOTS * _Snapshot(0, bytes(_VALUES.size)).pack()
    with open(private_files.open_file(path, os.O_WRONLY | os.O_CREAT), "wb") as file:
        file.write(content)
    return path


class MetricsFile:
    """The worker's end of a metrics file. A file has one writer."""

    def __init__(self, path: Path) -> None:
        """Raises OSError for a file that cannot be opened, ValueError for one of another layout."""
        with open(private_files.open_file(path, os.O_RDWR), "r+b") as file:
            content = file.read()
            _check(path, content)
            self._map = mmap.mmap(file.fileno(), _SIZE)
        newest = _newest_snapshot(content)
        self._sequence = newest.sequence if newest is not None else 0
        self.publish(StepCounters())

    def publish(self, counters: StepCounters) -> None:
        """Replaces all values; a reader sees all of them or those before."""
        self._sequence += 1
        snapshot = _Snapshot(self._sequence, _VALUES.pack(*flat_values(counters)))
        start = _HEADER.size + self._sequence % _NUM_SLOTS * _SLOT_SIZE
        # A slice, because struct.pack_into fills its target with zeros first.
        self._map[start : start + _SLOT_SIZE] = snapshot.pack()


def open_metrics_file(path: Path) -> MetricsFile | None:
    """The file for the worker to write, or None with a warning: no engine fails for want of metrics."""
    try:
        return MetricsFile(path)
    except (OSError, ValueError) as error:
        logger.warning("heterospec: Prometheus will not see the plugin's metrics: %s", error)
        return None


def read_values(path: Path) -> tuple[float, ...] | None:
    """The values of all metrics in the order of ``METRICS``, or None where no worker has opened the file yet.

    Raises OSError for a file that cannot be read, ValueError for one of another layout or one without a whole slot.
    """
    with open(private_files.open_file(path), "rb") as file:
        for _ in range(_READ_ATTEMPTS):
            content = os.pread(file.fileno(), _SIZE + 1, 0)
            _check(path, content)
            newest = _newest_snapshot(content)
            if newest is not None:
                return _VALUES.unpack(newest.values) if newest.sequence else None
            time.sleep(_RETRY_SECONDS)
    raise ValueError(f"{path}: found a write in progress at each of {_READ_ATTEMPTS} attempts")


def _check(path: Path, content: bytes) -> None:
    """Raises ValueError for a file that is not of this layout."""
    if len(content) != _SIZE or not content.startswith(_START):
        raise ValueError(
            f"{path}: found {len(content)} bytes that are no metrics file of this version"
        )


class MetricsCollector:
    """What ``prometheus_client`` asks for our metrics: those of the newest engine of this process.

    vLLM replaces its own metrics in the same way when a process builds another engine.
    """

    def __init__(self) -> None:
        self._paths: list[Path] = []
        self._logged: set[Path] = set()

    def add(self, path: Path) -> None:
        if path not in self._paths:
            self._paths.append(path)

    def describe(self) -> Iterator[Metric]:
        """Families without values: what the registry needs to know before an engine runs."""
        for record in METRICS:
            yield _family(record)

    def collect(self) -> Iterator[Metric]:
        values = self._newest_values()
        if values is None:
            return
        rest = iter(values)
        for record in METRICS:
            family = _family(record)
            for labels in [[str(key)] for key in record.keys] or [[]]:
                family.add_metric(labels, next(rest))
            yield family

    def _newest_values(self) -> tuple[float, ...] | None:
        """Those of the last file that a worker has opened: some configs are built but never run."""
        for path in reversed(self._paths):
            try:
                values = read_values(path)
            except (OSError, ValueError) as error:
                if path not in self._logged:
                    self._logged.add(path)
                    logger.warning("heterospec: no metrics of the plugin: %s", error)
                continue
            if values is not None:
                return values
        return None


def _family(record: MetricRecord) -> Any:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    family = CounterMetricFamily if record.kind == "counter" else GaugeMetricFamily
    return family(record.name, record.help, labels=[record.label] if record.label else [])


_collector: MetricsCollector | None = None


def register_collector(path: Path) -> None:
    """Shows a metrics file in this process's ``/metrics``; nothing happens for a file that is known."""
    global _collector
    if _collector is None:
        from prometheus_client import REGISTRY

        _collector = MetricsCollector()
        REGISTRY.register(_collector)
    _collector.add(path)
