# SPDX-License-Identifier: Apache-2.0
"""Plain decoding runs once beside every group of engines, and its several rounds of one number are no trouble."""

import pytest
from report_rows import make_row

from heterospec_vllm.bench.tables import rows_frame, speedups, summarise


def test_means_over_sets_where_groups_shared_a_round() -> None:
    rows = []
    for prompt_set, factor, rounds in (("alpaca", 1.0, 3), ("sum", 4.0, 2)):
        for round_ in range(rounds):
            for group, system, gain in ((1, "eagle3 k=1", 1.2), (2, "marginal", 1.5)):
                cell = {"prompt_set": prompt_set}
                speed = 10.0 * factor * (1 + 0.1 * group)  # engines of another group, another time
                rows.append(make_row(speed, "plain", round_, group, cell))
                rows.append(make_row(gain * speed, system, round_, group, cell))
    table = speedups(summarise(rows_frame(("folder", row) for row in rows))).set_index("system")
    for system, gain in (("plain", 1.0), ("eagle3 k=1", 1.2), ("marginal", 1.5)):
        assert table.loc[system, "ratio"] == pytest.approx(gain)
