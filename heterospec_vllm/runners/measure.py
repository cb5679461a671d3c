# SPDX-License-Identifier: Apache-2.0
"""Cost tables of the running engine, measured once at start-up; every step corrects them later."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from heterospec_vllm.arrays import Floats, Ints
from heterospec_vllm.draft.base import Drafter
from heterospec_vllm.policy.cost import ROW_KNOTS, TOKEN_KNOTS, StepCosts, table_from_samples

logger = init_logger(__name__)

TOKENS = (1, 4, 8, 16, 32, 64, 256)
ROWS = (1, 4, 8, 32, 128)
ROUNDS = 5
LEAST_SIZES, LEAST_ROUNDS = 3, 3
# Seconds after which no larger size is tried, and after which no further round is begun.
SIZES_SECONDS, MOST_SECONDS = 1.0, 4.0


def measure_costs(runner: Any, drafter: Drafter) -> StepCosts:
    """Times the target's forward pass with logits, and the head's, over a few batch sizes, on dummy inputs.

    Attention, sampling and host work are not in it: they show in the first real steps. Touches no KV. Of each size the
    fastest run counts: whatever else the machine does meanwhile adds time to some runs, and more to long ones.
    """
    start = time.perf_counter()
    most = min(runner.max_num_tokens, drafter.max_num_tokens)
    with torch.inference_mode():
        verify = _measure(partial(_target, runner, drafter), TOKENS, most)
        level = _measure(drafter.time_pass, ROWS, most)
    logger.info("heterospec: measured step costs in %.1f s", time.perf_counter() - start)
    return StepCosts(
        verify=table_from_samples(TOKEN_KNOTS, *verify, typical=np.min),
        first_pass=table_from_samples(ROW_KNOTS, *level, typical=np.min),
        level=table_from_samples(ROW_KNOTS, *level, typical=np.min),
    )


def _measure(run: Callable[[int], None], sizes: tuple[int, ...], most: int) -> tuple[Ints, Floats]:
    """(sizes, seconds) of single runs: as many sizes up to ``most`` as the time allows, from the smallest on.

    Sizes take turns. What a token adds is a difference of two times, and a machine whose clock or neighbours change
    while one size is measured after another would show that change instead.
    """
    start = time.perf_counter()
    sizes = tuple(n for n in sizes if n <= most) or (most,)
    warm = 0
    for n in sizes:
        run(n)
        warm += 1
        # Where a processor has no instructions for the dtype, tokens cost alike and many take long.
        if warm >= LEAST_SIZES and time.perf_counter() - start > SIZES_SECONDS:
            break
    samples: list[tuple[int, float]] = []
    for done in range(ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > MOST_SECONDS:
            break
        for n in sizes[:warm]:
            began = time.perf_counter()
            run(n)
            samples.append((n, time.perf_counter() - began))
    counts, seconds = zip(*samples, strict=True)
    return np.array(counts), np.array(seconds)


def _target(runner: Any, drafter: Drafter, num_tokens: int) -> None:
    with drafter.silent():
        hidden, _ = runner._dummy_run(num_tokens)
    logits = runner.model.compute_logits(hidden[:num_tokens])
    logits.argmax(dim=-1).cpu()  # waits for a GPU
