# SPDX-License-Identifier: Apache-2.0
"""Isotonic regression: the rising sequence nearest to given values."""

from __future__ import annotations

import numpy as np

from heterospec_vllm.arrays import Floats


def isotonic(
    values: Floats,  # [num_rows, size]
    weights: Floats,  # [num_rows, size], > 0
) -> Floats:
    """[num_rows, size] the rising sequence nearest to each row in weighted squares.

    By the max-min formula: at every place the highest over starts of the lowest mean over ends.
    """
    num_rows, size = values.shape
    start = np.zeros((num_rows, 1))
    total = np.concatenate([start, np.cumsum(weights, axis=1)], axis=1)
    weighted = np.concatenate([start, np.cumsum(weights * values, axis=1)], axis=1)
    inside = np.triu(np.ones((size, size), dtype=np.bool_))  # [start, end]
    width = np.where(inside, total[:, None, 1:] - total[:, :-1, None], 1.0)
    mean = np.where(inside, (weighted[:, None, 1:] - weighted[:, :-1, None]) / width, np.inf)
    lowest = np.minimum.accumulate(mean[..., ::-1], axis=2)[..., ::-1]
    return np.where(inside, lowest, -np.inf).max(axis=1)
