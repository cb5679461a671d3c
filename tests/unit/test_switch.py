# SPDX-License-Identifier: Apache-2.0
"""Speculation on or off, on a machine whose true rates are known."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from heterospec_vllm.policy.base import Cycle
from heterospec_vllm.policy.switch import FEWEST, MOST_SURPRISE, Switch

PROBE_REQUESTS = 4


def plain_seconds(num_reqs: int, context: float) -> float:
    return 0.02 + 0.001 * num_reqs + 1e-7 * context


@dataclass
class Machine:
    """Cycles whose speculative rate is ``gain`` times plain decoding's, times noise."""

    gain: float
    noise: float = 0.0
    tokens: float = 1.6  # of a request in a speculative cycle
    speed: float = 1.0  # of everything
    num_reqs: int = 4
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    seconds: float = 0.0
    emitted: int = 0

    def cycle(self, switch: Switch, predicted: float) -> str:
        scope = switch.scope(self.num_reqs, predicted)
        speculated = scope == "all" or (scope == "probe" and self.num_reqs <= PROBE_REQUESTS)
        tokens = self.num_reqs
        seconds = plain_seconds(self.num_reqs, 100.0) / self.speed
        if speculated:
            tokens = self.num_reqs + int(self.rng.poisson((self.tokens - 1) * self.num_reqs))
            seconds *= self.tokens / self.gain
        seconds *= self.rng.lognormal(0.0, self.noise) if self.noise else 1.0
        self.seconds += seconds
        self.emitted += tokens
        if speculated or scope != "probe":
            switch.observe(Cycle(speculated, self.num_reqs, 100.0, tokens, seconds))
        return scope

    def run(self, switch: Switch, predicted: float, num_cycles: int) -> Counter[str]:
        return Counter(self.cycle(switch, predicted) for _ in range(num_cycles))

    @property
    def relative_rate(self) -> float:
        """To plain decoding's."""
        return self.emitted / self.seconds * plain_seconds(self.num_reqs, 100.0) / self.num_reqs


@pytest.mark.parametrize("num_reqs", [PROBE_REQUESTS, PROBE_REQUESTS + 1])
def test_a_prediction_that_flatters_is_found_out(num_reqs: int) -> None:
    switch, machine = Switch(plain_seconds), Machine(gain=0.9, noise=0.05, num_reqs=num_reqs)
    first = machine.run(switch, 1.2, switch.first_pauses * (switch.pause_soon + 1) + 60)
    assert not switch.on and first["pause"] == switch.first_pauses
    later = machine.run(switch, 1.2, 4000)
    assert later["all"] < 0.03 * 4000 and later["probe"] >= 4


def test_a_gain_that_is_real_stays_on_and_costs_little_to_watch() -> None:
    switch, machine = Switch(plain_seconds), Machine(gain=1.3, noise=0.05)
    scopes = machine.run(switch, 1.3, 4000)
    assert scopes["none"] == scopes["probe"] == 0
    assert machine.relative_rate > 1.3 * 0.985


def test_a_prediction_that_belittles_is_found_out_by_a_trial() -> None:
    switch, machine = Switch(plain_seconds), Machine(gain=1.2, noise=0.05)
    assert machine.run(switch, 0.92, 4000)["all"] > 0.9 * 4000
    hopeless = Machine(gain=1.2)
    assert hopeless.run(Switch(plain_seconds), 0.7, 100)["all"] == 0


@pytest.mark.parametrize(("predicted", "gain"), [(0.75, 1.3), (0.5, 1.5), (0.3, 2.0)])
def test_a_small_batch_finds_out_what_costs_measured_in_a_bad_moment_deny(predicted, gain) -> None:
    """Another process ran while the engine started: drafts look like a loss, and nothing else would ever show them."""
    small = Machine(gain=gain, noise=0.05, num_reqs=1)
    assert small.run(Switch(plain_seconds), predicted, 8000)["all"] > 0.6 * 8000
    large = Machine(gain=gain, noise=0.05, num_reqs=16)
    assert large.run(Switch(plain_seconds), predicted, 8000)["all"] == 0


@pytest.mark.parametrize("predicted", [0.2, 0.4, 0.75, 0.9])
@pytest.mark.parametrize("num_cycles", [250, 4000])
def test_probes_of_a_small_batch_cost_little_where_the_prediction_is_right(predicted, num_cycles):
    machine = Machine(gain=predicted, noise=0.02, num_reqs=1)
    machine.run(Switch(plain_seconds), predicted, num_cycles)
    assert machine.relative_rate > 0.98


def test_a_trial_that_fails_is_short() -> None:
    """One comparison that says what a loss it is ends it: a burst of thirty steps must not be all trial."""
    machine = Machine(gain=0.8, noise=0.02, num_reqs=16)
    assert machine.run(Switch(plain_seconds), 0.98, 60)["all"] <= 2 * Switch.pause_soon


@pytest.mark.parametrize("gain", [0.8, 0.9, 0.97, 1.0, 1.1, 1.2, 1.6])
@pytest.mark.parametrize("predicted", [0.95, 1.1, 1.4])
def test_little_is_lost_whatever_was_predicted(gain: float, predicted: float) -> None:
    machine = Machine(gain=gain, noise=0.08)
    machine.run(Switch(plain_seconds), predicted, 6000)
    assert machine.relative_rate > 0.965 * max(1.0, gain)


def test_sizes_are_measured_apart() -> None:
    switch = Switch(plain_seconds)
    large, small = Machine(gain=0.8, num_reqs=16), Machine(gain=1.4, num_reqs=1)
    large.run(switch, 1.2, 100)
    assert large.run(switch, 1.2, 30)["none"] == 30
    assert small.run(switch, 1.2, 200)["all"] > 180
    assert large.run(switch, 1.2, 30)["none"] == 30
    # 9 to 16 requests share what is known.
    assert Machine(gain=0.8, num_reqs=9).run(switch, 1.2, 30)["none"] == 30


def test_a_machine_that_slows_down_changes_nothing() -> None:
    switch, machine = Switch(plain_seconds), Machine(gain=1.15, noise=0.03)
    scopes: Counter[str] = Counter()
    for n in range(60):
        machine.speed = 1.0 if n % 2 else 0.7
        scopes += machine.run(switch, 1.15, 50)
    assert scopes["all"] > 0.9 * 3000


def test_better_drafts_bring_it_back() -> None:
    switch = Switch(plain_seconds)
    Machine(gain=0.9).run(switch, 1.1, 200)
    assert not switch.on
    better = Machine(gain=1.3)
    assert better.run(switch, 1.6, 100)["all"] > 80


def test_what_was_measured_long_ago_is_tried_again() -> None:
    switch = Switch(plain_seconds)
    Machine(gain=0.9).run(switch, 1.05, 200)
    assert not switch.on
    changed = Machine(gain=1.2)
    assert changed.run(switch, 1.05, 40_000)["all"] > 10_000


@pytest.mark.parametrize("num_reqs", [1, 16])
def test_a_bad_moment_does_not_last(num_reqs: int) -> None:
    """Another process takes half of every cycle that drafts, and none of the plain ones: the worst that can be met."""
    switch = Switch(plain_seconds)
    Machine(gain=0.6, num_reqs=num_reqs).run(switch, 1.35, 60)
    assert not switch.on
    quiet = Machine(gain=1.35, noise=0.1, num_reqs=num_reqs)
    assert quiet.run(switch, 1.35, 1500)["all"] > 0.5 * 1500


def test_an_unsteady_machine_rarely_hides_a_gain() -> None:
    """Single steps differ by two fifths, so that comparisons err by more than the gain; probes must mend them."""
    shares = []
    for seed in range(20):
        machine = Machine(gain=1.2, noise=0.4, num_reqs=1, rng=np.random.default_rng(seed))
        shares.append(machine.run(Switch(plain_seconds), 1.3, 2000)["all"] / 2000)
    assert np.mean(shares) > 0.8 and min(shares) > 0.2


def test_one_interrupted_step_does_not_decide() -> None:
    switch, machine = Switch(plain_seconds), Machine(gain=1.3)
    machine.run(switch, 1.3, 1000)
    before = switch.gain(4, 1.3)
    while switch.scope(4, 1.3) != "pause":
        switch.observe(Cycle(True, 4, 100.0, 6, plain_seconds(4, 100.0) * 1.5 / 1.3))
    switch.observe(Cycle(False, 4, 100.0, 4, 50 * plain_seconds(4, 100.0)))
    assert abs(np.log(switch.gain(4, 1.3) / before)) <= 0.1 * MOST_SURPRISE + 0.03


def test_a_plain_step_with_nothing_to_compare_says_nothing() -> None:
    switch = Switch(plain_seconds)
    for _ in range(FEWEST - 1):
        switch.observe(Cycle(True, 1, 100.0, 1, 0.5))
    switch.observe(Cycle(False, 1, 100.0, 1, 0.02))
    assert switch.gain(1, 1.2) == 1.2


def test_without_clean_cycles_there_are_no_pauses() -> None:
    """Steps with prompts compare with nothing: pausing there would cost and teach nothing."""
    switch = Switch(plain_seconds)
    assert {switch.scope(4, 1.3) for _ in range(1000)} == {"all"}
