# SPDX-License-Identifier: Apache-2.0
"""What a step costs on this machine now: seconds by number of tokens, learned from every step.

Three tables: the target's step by the tokens it verifies, the head's pass over true tokens, and a draft level by the
nodes it expands. Each is piecewise linear between fixed knots and never falls. There are no built-in costs: values come
from a profile or from the measurement at start-up (``runners/v1.py``), and every step corrects them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from heterospec_vllm.tree import Floats, Ints

TOKEN_KNOTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
ROW_KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TABLES = ("verify", "first_pass", "level")


class CostTable:
    """Seconds as a non-decreasing, piecewise linear function of a number of tokens or rows."""

    def __init__(
        self,
        knots: tuple[int, ...],
        seconds: Floats,  # [num_knots]
        trust: float = 4.0,  # measurements that the given values are worth
    ) -> None:
        self.knots = np.asarray(knots, dtype=np.float64)
        self.seconds = np.maximum.accumulate(np.asarray(seconds, dtype=np.float64))
        self._weight = np.full(self.knots.size, trust)

    def __call__(self, count: Any) -> Any:
        """Seconds of ``count`` (a number or an array); linear beyond the last knot."""
        x = np.asarray(count, dtype=np.float64)
        inside = np.interp(x, self.knots, self.seconds)
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.knots[-1] - self.knots[-2])
        return inside + slope * np.maximum(x - self.knots[-1], 0.0)

    def observe(self, count: float, seconds: float, floor: float = 0.04) -> None:
        """One measurement: moves the two knots around ``count``, and others as far as order requires.

        A measurement counts for at most twice and at least half of what was expected, so that one interrupted step
        cannot undo many. ``floor``: the least share that a new measurement has in a knot.
        """
        expected = float(self(count))
        if not np.isfinite(seconds) or seconds <= 0 or expected <= 0:
            return
        error = min(max(seconds, 0.5 * expected), 2.0 * expected) - expected
        count = min(max(count, self.knots[0]), self.knots[-1])
        low = min(int(np.searchsorted(self.knots, count, side="right")) - 1, self.knots.size - 2)
        share = (count - self.knots[low]) / (self.knots[low + 1] - self.knots[low])
        shares = np.array([1.0 - share, share])
        rate = np.maximum(floor, 1.0 / (1.0 + self._weight[low : low + 2]))
        self._weight[low : low + 2] += shares
        self.seconds[low : low + 2] += rate * shares / (shares @ shares) * error
        self._restore_order(low)

    def _restore_order(self, low: int) -> None:
        """Knots beside the measured ones give way: the new values are the ones that were seen."""
        values = self.seconds
        if values[low] > values[low + 1]:
            values[low : low + 2] = values[low : low + 2].mean()
        np.maximum.accumulate(values[low + 1 :], out=values[low + 1 :])
        values[: low + 1] = np.minimum.accumulate(values[: low + 1][::-1])[::-1]

    def slope(self, count: float, width: float) -> float:
        """Seconds per further token over the next ``width`` tokens."""
        return float(self(count + width) - self(count)) / width


@dataclass
class StepCosts:
    """The cost tables of a (target, head, machine).

    ``request_seconds`` and ``context_seconds`` are what a further request of the batch and a further token of context
    add to a step beyond its tokens.
    """

    verify: CostTable
    first_pass: CostTable
    level: CostTable
    request_seconds: float = 0.0
    context_seconds: float = 0.0

    def step(self, num_tokens: Any, num_reqs: int, context: float) -> Any:
        """Seconds of a target step over ``num_tokens`` (a number or an array) tokens."""
        extra = self.request_seconds * num_reqs + self.context_seconds * context
        return self.verify(num_tokens) + extra

    def observe_step(self, num_tokens: int, num_reqs: int, context: float, seconds: float) -> None:
        extra = self.request_seconds * num_reqs + self.context_seconds * context
        self.verify.observe(num_tokens, seconds - extra)

    def as_dict(self) -> dict[str, Any]:
        tables = {
            name: {
                "knots": [int(k) for k in getattr(self, name).knots],
                "seconds": [round(float(s), 7) for s in getattr(self, name).seconds],
            }
            for name in TABLES
        }
        return {
            **tables,
            "request_seconds": self.request_seconds,
            "context_seconds": self.context_seconds,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], trust: float = 50.0) -> StepCosts:
        """The tables of :meth:`as_dict`; the profile's own check has looked at the values."""
        tables = {
            name: CostTable(tuple(values[name]["knots"]), np.array(values[name]["seconds"]), trust)
            for name in TABLES
        }
        return cls(
            **tables,
            request_seconds=float(values["request_seconds"]),
            context_seconds=float(values["context_seconds"]),
        )


def table_from_samples(
    knots: tuple[int, ...],
    counts: Ints,  # [num_samples]
    seconds: Floats,  # [num_samples]
) -> CostTable:
    """A table through the medians of measured counts; knots between are interpolated, beyond them extended."""
    where = np.unique(counts)
    medians = np.array([np.median(seconds[counts == count]) for count in where])
    medians = np.maximum.accumulate(medians)
    if where.size == 1:
        return CostTable(knots, np.full(len(knots), medians[0]))
    slope = (medians[-1] - medians[-2]) / (where[-1] - where[-2])
    x = np.asarray(knots, dtype=np.float64)
    values = np.interp(x, where, medians) + slope * np.maximum(x - where[-1], 0.0)
    return CostTable(knots, values)
