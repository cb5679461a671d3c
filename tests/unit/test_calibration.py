# SPDX-License-Identifier: Apache-2.0
"""Cost tables recover what simulated steps were made of."""

import numpy as np
import pytest

from heterospec_vllm.replay.calibration import fit_costs


def _samples(interrupted: float) -> dict[str, list]:
    rng = np.random.default_rng(0)
    steps = []
    for requests in (1, 2, 4, 8, 16, 32, 64):
        for nodes in (0, 2, 4, 8):
            for _ in range(20):
                context = requests * rng.uniform(50, 800)
                tokens = requests * (1 + nodes)
                seconds = 0.012 + 0.0006 * tokens + 0.0001 * requests + 1e-6 * context * (1 + nodes)
                seconds *= rng.normal(1, 0.03) * (5 if rng.random() < interrupted else 1)
                steps.append((tokens, requests, context, seconds))
    return {
        "steps": steps,
        "first_passes": [(1, 0.003), (8, 0.004), (8, 0.07)],
        "levels": [(1, 0.002), (16, 0.003)],
    }


@pytest.mark.parametrize("interrupted", [0.0, 0.05])
def test_costs_are_told_apart(interrupted: float) -> None:
    costs = fit_costs([_samples(interrupted)])
    assert costs.context_seconds == pytest.approx(1e-6, rel=0.15)
    assert costs.request_seconds == pytest.approx(1e-4, rel=0.5)
    for tokens in (1, 4, 16, 64, 256):
        assert costs.verify.at(tokens) == pytest.approx(0.012 + 0.0006 * tokens, rel=0.06)
    assert (np.diff(costs.verify.seconds) >= 0).all()


def test_beyond_what_was_timed_the_last_slope_goes_on() -> None:
    costs = fit_costs([_samples(0.0)])
    assert costs.verify.slope(2048, 1000) > 0.0003
