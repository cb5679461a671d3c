# SPDX-License-Identifier: Apache-2.0
"""What a step costs on this machine now: seconds by number of tokens, learned from every step.

Three tables: the target's step by the tokens it verifies, the head's pass over accepted tokens, and a draft level by
the nodes it expands. Each is piecewise linear between fixed knots and never falls. There are no built-in costs: values
come from a profile or from the measurement at start-up (``runners/measure.py``), and every step corrects them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from heterospec_vllm.arrays import Floats, Ints
from heterospec_vllm.compiled import compiled
from heterospec_vllm.policy.isotonic import isotonic

TOKEN_KNOTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
ROW_KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
DECODE_TOKENS = 256
DRIFT_RATE = 0.04  # of a measurement's surprise, how much is taken to be the machine's
LEAST_SHARE = 0.02  # of a measurement in a knot
MEASURED_TRUST = 4.0  # steps that a start-up measurement is worth: attention is not in it
TABLES = ("verify", "first_pass", "level")


@compiled("Tuple((i8, f8))(f8[::1], f8[::1], f8)")
def _on_line(knots, seconds, count):
    """The knot below a count and the seconds of the count; linear beyond the last knot."""
    count = max(count, knots[0])
    low = min(np.searchsorted(knots, count, side="right") - 1, knots.size - 2)
    rise = (seconds[low + 1] - seconds[low]) / (knots[low + 1] - knots[low])
    return low, seconds[low] + rise * (count - knots[low])


@compiled("f8[::1](f8[::1], f8[::1], f8[:], f8, f8)")
def _line(knots, seconds, counts, fixed, per_count):
    """See :meth:`CostTable.__call__`."""
    out = np.empty(counts.size, np.float64)
    for i in range(counts.size):
        _, at = _on_line(knots, seconds, counts[i])
        out[i] = at + fixed + per_count * counts[i]
    return out


@compiled("f8[::1](f8[::1], f8[::1], i8, i8, f8, f8)")
def _run(knots, seconds, first, size, fixed, per_count):
    """See :meth:`CostTable.run`."""
    counts = np.arange(first, first + size).astype(np.float64)
    return _line(knots, seconds, counts, fixed, per_count)


@compiled("void(f8[::1], f8[::1], f8[::1], f8, f8, f8)")
def _observe(
    knots,  # [num_knots]
    seconds,  # [num_knots], changed
    weight,  # [num_knots] measurements that each value is worth, changed
    count,
    measured,  # seconds
    floor,
):
    """See :meth:`CostTable.observe`."""
    last = knots.size - 1
    low, expected = _on_line(knots, seconds, count)
    if not math.isfinite(measured) or measured <= 0.0 or expected <= 0.0:
        return
    ratio = min(max(measured / expected, 0.5), 2.0)
    if count <= DECODE_TOKENS:  # a step of prompts says little about the others
        drift = 1.0 + DRIFT_RATE * (ratio - 1.0)
        seconds *= drift
        ratio /= drift
    # Beyond the last knot the same ratio is asked of that knot.
    share = (min(max(count, knots[0]), knots[last]) - knots[low]) / (knots[low + 1] - knots[low])
    error = (ratio - 1.0) * ((1.0 - share) * seconds[low] + share * seconds[low + 1])
    norm = share**2 + (1.0 - share) ** 2
    for knot, part in ((low, 1.0 - share), (low + 1, share)):
        rate = max(floor, 1.0 / (1.0 + weight[knot]))
        weight[knot] += part
        # Between steep knots the lower one's share of the error may be more than it holds.
        held = seconds[knot]
        seconds[knot] = max(held + rate * part / norm * error, 0.5 * held)
    # Knots beside the measured ones give way: the new values are the ones that were seen.
    if seconds[low] > seconds[low + 1]:
        seconds[low : low + 2] = (1.0 - share) * seconds[low] + share * seconds[low + 1]
    for knot in range(low + 2, knots.size):
        seconds[knot] = max(seconds[knot], seconds[knot - 1])
    for knot in range(low - 1, -1, -1):
        seconds[knot] = min(seconds[knot], seconds[knot + 1])


class CostTable:
    """Seconds as a non-decreasing, piecewise linear function of a number of tokens or rows."""

    def __init__(
        self,
        knots: tuple[int, ...],
        seconds: Floats,  # [num_knots]
        trust: float = 20.0,  # measurements that the given values are worth
    ) -> None:
        self.knots = np.asarray(knots, dtype=np.float64)
        self.seconds = np.maximum.accumulate(np.asarray(seconds, dtype=np.float64))
        self._weight = np.full(self.knots.size, trust, dtype=np.float64)
        self._x: list[float] = self.knots.tolist()
        self._y: list[float] = self.seconds.tolist()

    def at(self, count: float) -> float:
        """Seconds of one count; linear beyond the last knot. Many times faster than an array of one."""
        x, y = self._x, self._y
        if count <= x[0]:
            return y[0]
        low = min(bisect_right(x, count), len(x) - 1) - 1
        return y[low] + (y[low + 1] - y[low]) * (count - x[low]) / (x[low + 1] - x[low])

    def __call__(self, counts: Ints | Floats, fixed: float = 0.0, per_count: float = 0.0) -> Floats:
        """Seconds of some counts, linear beyond the last knot, and what else is ``fixed`` or grows with the count."""
        given = np.asarray(counts, dtype=np.float64)
        return _line(self.knots, self.seconds, given, fixed, per_count)

    def run(self, first: int, size: int, fixed: float = 0.0, per_count: float = 0.0) -> Floats:
        """[size] what a call says of ``first`` and the counts that follow."""
        return _run(self.knots, self.seconds, first, size, fixed, per_count)

    def observe(self, count: float, seconds: float, floor: float = LEAST_SHARE) -> None:
        """One measurement: moves the whole table a little and the two knots around ``count`` further.

        What slows a machine down (longer contexts, another process) slows every count down. Were only the measured
        knots to follow, the others would look cheap or dear by comparison until they are measured again, and whether
        speculation pays is such a comparison. A measurement counts for at most twice and at least half of what was
        expected, so that one interrupted step cannot undo many. ``floor``: its least share in a knot.
        """
        _observe(self.knots, self.seconds, self._weight, float(count), float(seconds), floor)
        self._y = self.seconds.tolist()

    def slope(self, count: float, width: float) -> float:
        """Seconds per further token over the next ``width`` tokens."""
        return (self.at(count + width) - self.at(count)) / width


@dataclass
class StepCosts:
    """The cost tables of a (target, head, machine).

    Beyond its tokens a step costs ``request_seconds`` for each request, and ``context_seconds`` for each row and token
    of context that the row attends to.
    """

    verify: CostTable
    first_pass: CostTable
    level: CostTable
    request_seconds: float = 0.0
    context_seconds: float = 0.0

    def step(self, num_tokens: float, num_reqs: int, context: float) -> float:
        """Seconds of a target step over ``num_tokens`` tokens."""
        fixed, per_row = self._extra(num_reqs, context)
        return self.verify.at(num_tokens) + fixed + per_row * num_tokens

    def plain_step(self, num_reqs: int, context: float) -> float:
        """Seconds of a step of plain decoding."""
        return self.step(num_reqs, num_reqs, context)

    def steps(self, num_tokens: Ints, num_reqs: int, context: float) -> Floats:
        """Seconds of target steps over each of several numbers of tokens."""
        return self.verify(num_tokens, *self._extra(num_reqs, context))

    def cycles(
        self, first: int, most: int, num_reqs: int, context: float, draft_seconds: float
    ) -> Floats:
        """[most + 1] seconds of a draft and of the step after it, with 0 to ``most`` tokens beyond the ``first``."""
        fixed, per_row = self._extra(num_reqs, context)
        return self.verify.run(first, most + 1, fixed + draft_seconds, per_row)

    def _extra(self, num_reqs: int, context: float) -> tuple[float, float]:
        """What requests and their contexts add to a step, and to each row: it attends to its own request's context."""
        per_row = self.context_seconds * context / max(num_reqs, 1)
        return self.request_seconds * num_reqs, per_row

    def observe_step(
        self,
        num_tokens: int,
        num_reqs: int,
        context: float,
        seconds: float,
        floor: float = LEAST_SHARE,
    ) -> None:
        fixed, per_row = self._extra(num_reqs, context)
        self.verify.observe(num_tokens, seconds - fixed - per_row * num_tokens, floor)

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
    typical: Callable[[Floats], float] = np.median,
) -> CostTable:
    """A table through what is typical of each measured count; knots between are interpolated, beyond them extended.

    Where those fall they are pooled, each with the weight of its measurements (isotonic regression).
    """
    where, sizes = np.unique(counts, return_counts=True)
    values = np.array([typical(seconds[counts == count]) for count in where])
    values = isotonic(values[None], sizes[None].astype(np.float64))[0]
    if where.size == 1:
        return CostTable(knots, np.full(len(knots), values[0]), MEASURED_TRUST)
    slope = (values[-1] - values[-2]) / (where[-1] - where[-2])
    x = np.asarray(knots, dtype=np.float64)
    extended = np.interp(x, where, values) + slope * np.maximum(x - where[-1], 0.0)
    return CostTable(knots, extended, MEASURED_TRUST)
