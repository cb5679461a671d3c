# SPDX-License-Identifier: Apache-2.0
"""Array types that every part shares, and the index that stands for "none"."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NO_ROW = -1  # no parent, no row, padding

Bools = NDArray[np.bool_]

Ints = NDArray[np.int64]
Ints32 = NDArray[np.int32]
Floats = NDArray[np.floating]
