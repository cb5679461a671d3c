# SPDX-License-Identifier: Apache-2.0
"""The Prometheus metrics of the plugin: each declared once, read out of :class:`StepCounters`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from heterospec_vllm.config import MOST_LEVELS
from heterospec_vllm.observe.counters import STEP_PARTS, StepCounters
from heterospec_vllm.observe.reasons import REASONS
from heterospec_vllm.policy.strata import NUM_STRATA

# The last value of a label that takes in what the others do not name.
OTHER = "other"


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
        keys=tuple(range(1, MOST_LEVELS + 1)),
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
        keys=(*tuple(REASONS), OTHER),
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
        "nothing_accepted",
        "nothing_accepted",
        "1 while next to no draft node is accepted, over 400 drafts: the head may be another model's. Otherwise 0.",
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
