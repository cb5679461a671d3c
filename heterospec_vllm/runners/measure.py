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
from heterospec_vllm.tree_drafter import TreeDrafter

logger = init_logger(__name__)

TOKENS = (1, 4, 8, 16, 32, 64, 256)
ROWS = (1, 4, 8, 32, 128)
REPEATS = 3


def measure_costs(runner: Any, proposer: TreeDrafter) -> StepCosts:
    """Times the target's forward pass with logits, and the head's, over a few batch sizes, on dummy inputs.

    Attention, sampling and host work are not in it: they show in the first real steps. Touches no KV.
    """
    start = time.perf_counter()
    most = min(runner.max_num_tokens, proposer.max_num_tokens)
    tokens = [n for n in TOKENS if n <= most] or [most]
    rows = [n for n in ROWS if n <= most] or [most]
    with torch.inference_mode():
        verify = [_median(partial(_target, runner, proposer, n)) for n in tokens]
        level = [_median(partial(proposer.time_pass, n)) for n in rows]
    logger.info("heterospec: measured step costs in %.1f s", time.perf_counter() - start)
    level_table = table_from_samples(ROW_KNOTS, np.array(rows), np.array(level))
    return StepCosts(
        verify=table_from_samples(TOKEN_KNOTS, np.array(tokens), np.array(verify)),
        first_pass=table_from_samples(ROW_KNOTS, np.array(rows), np.array(level)),
        level=level_table,
    )


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
