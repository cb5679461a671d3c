# SPDX-License-Identifier: Apache-2.0
"""Speculation on or off: predicted rates start it, measured rates end it.

What a cost table says about steps that are not taken is a guess, and while speculation is on plain steps are not taken.
So now and then a step is decoded plainly, and the two rates of the same moment are compared. How far the prediction was
off is kept for every batch size and corrects the predictions that follow. While speculation is off, a small batch
drafts for a few cycles now and then and compares those with its plain steps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from heterospec_vllm.policy.base import Cycle, Scope
from heterospec_vllm.policy.decisions import hysteresis

# Speculative cycles that a mean speaks for, and the fewest that a plain step is compared with.
WINDOW, FEWEST = 32, 4
# Plain steps that their mean speaks for.
PLAIN_WINDOW = 16
# A plain step's surprise counts for at most this much (in logarithms): one interrupted step must not decide (a mean of
# several may say more).
MOST_SURPRISE = 0.7
# The trust in a correction that each probe takes away while speculation is off: it may not hold any more.
FORGOTTEN = 0.3


@dataclass
class _Size:
    """What was measured with batches of about one size, seconds relative to the reference."""

    seconds: float = 0.0  # mean of a speculative cycle
    tokens: float = 0.0  # mean tokens of a request in a speculative cycle
    num_cycles: int = 0  # in those means, at most WINDOW
    since_pause: int = 0
    num_pauses: int = 0
    steps_tried: int = 0
    error: float = 0.0  # mean logarithm of measured over predicted gain
    trust: float = 1.0  # in that mean: it falls while nothing is measured
    plain_seconds: float = 0.0  # mean of a plain step
    num_plain: int = 0  # in that mean, at most PLAIN_WINDOW

    @property
    def correction(self) -> float:
        """What a prediction is multiplied with."""
        return math.exp(self.trust * self.error)

    def add(self, seconds: float, tokens: float) -> None:
        """A speculative cycle."""
        if self.num_cycles >= FEWEST:
            seconds = min(seconds, 2.0 * self.seconds)
        rate = 1.0 / (self.num_cycles + 1)
        self.seconds += rate * (seconds - self.seconds)
        self.tokens += rate * (tokens - self.tokens)
        self.num_cycles = min(self.num_cycles + 1, WINDOW - 1)
        self.since_pause += 1

    def add_plain(self, seconds: float) -> None:
        """A step of plain decoding."""
        if self.num_plain >= FEWEST:
            seconds = min(seconds, 2.0 * self.plain_seconds)
        self.num_plain = min(self.num_plain + 1, PLAIN_WINDOW)
        self.plain_seconds += (seconds - self.plain_seconds) / self.num_plain

    def compare(self, plain_seconds: float, predicted: float, most: float = MOST_SURPRISE) -> None:
        """A step of plain decoding between speculative cycles, or the mean of those before them."""
        if self.num_cycles < FEWEST:
            return
        measured = self.tokens * plain_seconds / self.seconds
        surprise = math.log(measured / predicted) - self.error
        surprise = min(max(surprise, -most), most)
        self.error += max(1.0 / (self.num_pauses + 2), 0.1) * surprise
        self.trust = 1.0
        self.num_pauses += 1


class Switch:
    """Whether a step drafts. Gains are rates with speculation over rates of plain decoding."""

    start, stop = 1.03, 1.0
    # A size that was measured little is tried where the gain may be this much higher (in logarithms, after no
    # comparison, and less with each), for at most so many steps.
    doubt, trial_steps = 0.13, 64
    # Steps without speculation between two probes, the first and the longest wait.
    probe_after, probe_at_most = 64, 1024
    # A batch so small that a probe drafts for all of it is probed for some cycles in a row, which are compared with
    # plain steps; as rarely as the loss, if the prediction is right, is below ``probe_loss`` of the time.
    probe_cycles, probe_loss = 8, 0.01
    # Cycles between two plain steps while speculation is on: soon at first, then as rarely as the loss is below
    # ``pause_loss`` of the time.
    first_pauses, pause_soon, pause_after, pause_at_most = 4, 6, 16, 256
    pause_loss = 0.005

    def __init__(self, reference: Callable[[int, float], float], probe_requests: int = 4) -> None:
        """``reference``: seconds of a plain step by requests and context, right in its shape and never changing.

        ``probe_requests``: most requests that a probe drafts for.
        """
        self.on = True
        self._probe_requests = probe_requests
        self._probes_left = 0  # of those in a row
        self._reference = reference
        self._sizes: dict[int, _Size] = defaultdict(_Size)
        self._predicted = 1.0
        self._probe_wait = self.probe_after
        self._steps_off = 0

    def gain(self, num_reqs: int, predicted: float) -> float:
        """The predicted gain as measurements with batches of this size have corrected it."""
        return predicted * self._size(num_reqs).correction

    def scope(self, num_reqs: int, predicted: float) -> Scope:
        """What the next step drafts for."""
        size = self._size(num_reqs)
        gain = self.gain(num_reqs, predicted)
        if gain < self.start and self._tries(size, gain):
            gain = self.start
        self._predicted = predicted
        was_on = self.on
        self.on = hysteresis(was_on, gain, start=self.start, stop=self.stop)
        if self.on:
            if not was_on:
                size.num_cycles = size.since_pause = 0  # of another time
            self._steps_off = self._probes_left = 0
            if size.trust == 1.0 or not size.num_pauses:  # not only hoped for
                self._probe_wait = self.probe_after
            elif size.trust < 0.5:  # measure afresh
                size.trust, size.num_pauses, size.steps_tried = 1.0, 0, 0
            if size.since_pause < self._pause_wait(size, gain):
                return "all"
            size.since_pause = 0
            return "pause"
        in_a_row = num_reqs <= self._probe_requests
        if self._probes_left and in_a_row:
            self._probes_left -= 1
            return "probe"
        self._probes_left = 0
        self._steps_off += 1
        if self._steps_off < (self._wait_in_a_row(gain) if in_a_row else self._probe_wait):
            return "none"
        self._steps_off = 0
        self._probe_wait = min(2 * self._probe_wait, self.probe_at_most)
        size.trust *= 1.0 - FORGOTTEN
        if in_a_row:
            size.num_cycles = 0
            # What was compared before the wait may have been a bad moment: what comes now weighs as much.
            size.num_pauses = min(size.num_pauses, 1)
            self._probes_left = self.probe_cycles - 1
        return "probe"

    def observe(self, cycle: Cycle) -> None:
        """What a cycle took: of everybody's drafts, or plain."""
        size = self._size(cycle.num_reqs)
        seconds = cycle.seconds / self._reference(cycle.num_reqs, cycle.context)
        if cycle.speculated:
            size.add(seconds, cycle.num_tokens / cycle.num_reqs)
            if not (self.on or self._probes_left) and size.num_plain >= FEWEST:
                size.compare(size.plain_seconds, self._predicted, 2.0 * MOST_SURPRISE)
            return
        size.add_plain(seconds)
        if self.on:
            size.compare(seconds, self._predicted)

    def _tries(self, size: _Size, gain: float) -> bool:
        """Whether the gain may be high enough, as far as this size was measured."""
        hope = math.exp(self.doubt / math.sqrt(size.num_pauses + 1))
        if size.num_pauses >= self.first_pauses or gain * hope < self.start:
            return False
        size.steps_tried += 1
        return size.steps_tried <= self.trial_steps

    def _pause_wait(self, size: _Size, gain: float) -> int:
        if size.num_pauses < self.first_pauses or size.trust < 1.0:
            return self.pause_soon
        wait = (1.0 - 1.0 / gain) / self.pause_loss
        return int(min(max(wait, self.pause_after), self.pause_at_most))

    def _wait_in_a_row(self, gain: float) -> float:
        """Steps between probes of several cycles."""
        lost = self.probe_cycles * (1.0 / min(gain, 1.0) - 1.0)
        return max(self._probe_wait, lost / self.probe_loss)

    def _size(self, num_reqs: int) -> _Size:
        """Sizes 1, 2, 3-4, 5-8, ... share a record."""
        return self._sizes[(num_reqs - 1).bit_length()]
