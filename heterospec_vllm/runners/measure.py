# SPDX-License-Identifier: Apache-2.0
"""Cost tables of the running engine, measured once at start-up; every step corrects them later."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from heterospec_vllm.cost import ROW_KNOTS, TOKEN_KNOTS, StepCosts, table_from_samples
from heterospec_vllm.tree import Floats, Ints
from heterospec_vllm.tree_drafter import TreeDrafter

logger = init_logger(__name__)

TOKENS = (1, 4, 8, 16, 32, 64, 256)
ROWS = (1, 4, 8, 32, 128)
REPEATS = 3
LEAST_SIZES = 3
MOST_SECONDS = 3.0  # after which no larger size is begun


def measure_costs(runner: Any, proposer: TreeDrafter) -> StepCosts:
    """Times the target's forward pass with logits, and the head's, over a few batch sizes, on dummy inputs.

    Attention, sampling and host work are not in it: they show in the first real steps. Touches no KV.
    """
    start = time.perf_counter()
    most = min(runner.max_num_tokens, proposer.max_num_tokens)
    with torch.inference_mode():
        verify = _measure(partial(_target, runner, proposer), TOKENS, most)
        level = _measure(proposer.time_pass, ROWS, most)
    logger.info("heterospec: measured step costs in %.1f s", time.perf_counter() - start)
    return StepCosts(
        verify=table_from_samples(TOKEN_KNOTS, *verify),
        first_pass=table_from_samples(ROW_KNOTS, *level),
        level=table_from_samples(ROW_KNOTS, *level),
    )


def _measure(run: Callable[[int], None], sizes: tuple[int, ...], most: int) -> tuple[Ints, Floats]:
    """(sizes, seconds): as many sizes up to ``most`` as the time allows, from the smallest on."""
    start = time.perf_counter()
    sizes = tuple(n for n in sizes if n <= most) or (most,)
    seconds: list[float] = []
    for n in sizes:
        seconds.append(_median(partial(run, n)))
        # Where a processor has no instructions for the dtype, tokens cost alike and many take long.
        if len(seconds) >= LEAST_SIZES and time.perf_counter() - start > MOST_SECONDS:
            break
    return np.array(sizes[: len(seconds)]), np.array(seconds)


def _median(run: Callable[[], None]) -> float:
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _target(runner: Any, proposer: TreeDrafter, num_tokens: int) -> None:
    with proposer.silent():
        hidden, _ = runner._dummy_run(num_tokens)
    logits = runner.model.compute_logits(hidden[:num_tokens])
    logits.argmax(dim=-1)
