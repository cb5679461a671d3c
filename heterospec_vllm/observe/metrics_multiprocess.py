# SPDX-License-Identifier: Apache-2.0
"""The plugin's metrics where Prometheus collects them from several processes.

With several API servers vLLM serves a registry of what ``prometheus_client`` itself keeps in the folder
``PROMETHEUS_MULTIPROC_DIR``, files of each process, and nothing else. There the worker keeps such files, too, beside
the one that a single server reads (``metrics_file.py``).
"""

from __future__ import annotations

import os
from typing import Any

from heterospec_vllm.observe.counters import StepCounters
from heterospec_vllm.observe.metrics_file import METRICS, MetricRecord, flat_values


class MultiprocessMetrics:
    """One instrument of ``prometheus_client`` for every value of ``METRICS``, brought up to date once a step."""

    def __init__(self) -> None:
        self._instruments = [one for record in METRICS for one in _instruments_of(record)]
        self._values = [0.0] * len(self._instruments)

    def publish(self, counters: StepCounters) -> None:
        """Counters that start again from zero go on from where they were: Prometheus sees no restart."""
        values = flat_values(counters)
        for (add, instrument), value, before in zip(
            self._instruments, values, self._values, strict=True
        ):
            if value == before:
                continue
            if add:
                instrument.inc(value - before if value > before else value)
            else:
                instrument.set(value)
        self._values = values


def _instruments_of(record: MetricRecord) -> list[tuple[bool, Any]]:
    """(whether it counts, instrument) of each label value; in no registry, since this process serves none."""
    from prometheus_client import Counter, Gauge

    labels = [record.label] if record.label else []
    if record.kind == "counter":
        instrument: Any = Counter(record.name, record.help, labels, registry=None)
    else:
        instrument = Gauge(
            record.name, record.help, labels, registry=None, multiprocess_mode="mostrecent"
        )
        instrument.set(0)  # one that was never set is not shown
    found = [instrument.labels(str(key)) for key in record.keys] or [instrument]
    return [(record.kind == "counter", one) for one in found]


def open_multiprocess_metrics() -> MultiprocessMetrics | None:
    """For the worker: None where one server answers for all."""
    return MultiprocessMetrics() if "PROMETHEUS_MULTIPROC_DIR" in os.environ else None
