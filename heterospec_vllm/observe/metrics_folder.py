# SPDX-License-Identifier: Apache-2.0
"""How metrics come from the worker to whoever answers ``/metrics``: prometheus_client's own multiprocess files.

vLLM's worker may be another process than the server, and there may be several servers. With several, vLLM names a
folder in ``PROMETHEUS_MULTIPROC_DIR`` and serves what prometheus_client keeps there. With one, the server's process
makes such a folder for itself (mode 0700) and shows what is in it. The worker writes the same files in both cases.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heterospec_vllm.kernels import private_files
from heterospec_vllm.observe.counters import StepCounters
from heterospec_vllm.observe.metrics import METRICS, MetricRecord, flat_values

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# A child of vLLM's logger, so that its handlers and levels apply.
logger = logging.getLogger("vllm.heterospec")

SHARED = "PROMETHEUS_MULTIPROC_DIR"


def metrics_folder() -> Path:
    """The folder for one engine's files: the one that vLLM shares among its servers, or a new private one.

    This process removes a private folder when it exits; what killed processes left goes now.
    """
    shared = os.environ.get(SHARED)
    return Path(shared) if shared else private_files.folder_of_process("heterospec-metrics-")


class MetricsWriter:
    """The worker's end: one file for counters and one for gauges, brought up to date once a step."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError where the folder cannot be written."""
        from prometheus_client.mmap_dict import MmapedDict

        process = os.getpid()
        files = {
            "counter": MmapedDict(str(folder / f"counter_{process}.db")),
            "gauge": MmapedDict(str(folder / f"gauge_mostrecent_{process}.db")),
        }
        self._places = [(files[record.kind], key) for record in METRICS for key in _keys(record)]
        self._counts = [record.kind == "counter" for record in METRICS for _ in _keys(record)]
        self._seen = [0.0] * len(self._places)  # what the step counters said last
        # An earlier engine of this process may have written the same file: counters go on, gauges start anew.
        self._written = [
            file.read_value(key)[0] if counts else 0.0
            for (file, key), counts in zip(self._places, self._counts, strict=True)
        ]
        now = time.time()
        for (file, key), value in zip(self._places, self._written, strict=True):
            file.write_value(key, value, now)

    def publish(self, counters: StepCounters) -> None:
        """Counters that start again from zero go on from where they were: Prometheus sees no restart."""
        values = flat_values(counters)
        if values == self._seen:
            return
        now = time.time()
        for i, (value, before) in enumerate(zip(values, self._seen, strict=True)):
            if value == before:
                continue
            if self._counts[i]:
                value = self._written[i] + (value - before if value > before else value)
            file, key = self._places[i]
            file.write_value(key, value, now)
            self._written[i] = value
        self._seen = values


def _keys(record: MetricRecord) -> list[str]:
    """prometheus_client's names for the values of a metric, one for each label value."""
    from prometheus_client.mmap_dict import mmap_key

    # A counter's family goes without the suffix that its samples have.
    family = record.name.removesuffix("_total")
    names = [record.label] if record.label else []
    values = [[str(key)] for key in record.keys] or [[]]
    return [mmap_key(family, record.name, names, value, record.help) for value in values]


def open_metrics(folder: Path) -> MetricsWriter | None:
    """For the worker: None with a warning where it cannot write. No engine fails for want of metrics."""
    try:
        return MetricsWriter(folder)
    except OSError as error:
        logger.warning("heterospec: Prometheus will not see the plugin's metrics: %s", error)
        return None


class MetricsCollector:
    """What prometheus_client asks for our metrics: those of the newest engine of this process.

    vLLM replaces its own metrics in the same way when a process builds another engine.
    """

    def __init__(self) -> None:
        self._folders: list[Path] = []
        self._logged: set[Path] = set()

    def add(self, folder: Path) -> None:
        if folder not in self._folders:
            self._folders.append(folder)

    def describe(self) -> Iterator[Metric]:
        """Families without values: what the registry needs to know before an engine runs."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for record in METRICS:
            family: Any = CounterMetricFamily if record.kind == "counter" else GaugeMetricFamily
            yield family(record.name, record.help, labels=[record.label] if record.label else [])

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.multiprocess import MultiProcessCollector

        for folder in reversed(self._folders):  # some configs are built but never run
            try:
                if any(folder.glob("*.db")):
                    return iter(list(MultiProcessCollector(None, path=str(folder)).collect()))
            except (OSError, ValueError, RuntimeError) as error:
                if folder not in self._logged:
                    self._logged.add(folder)
                    logger.warning("heterospec: no metrics of the plugin: %s", error)
        return iter(())


_collector: MetricsCollector | None = None


def show_metrics(folder: Path) -> None:
    """Shows an engine's files in this process's ``/metrics``; nothing to do where vLLM shows a shared folder itself."""
    global _collector
    if os.environ.get(SHARED):
        return
    if _collector is None:
        from prometheus_client import REGISTRY

        _collector = MetricsCollector()
        REGISTRY.register(_collector)
    _collector.add(folder)
