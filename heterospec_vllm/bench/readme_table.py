# SPDX-License-Identifier: Apache-2.0
"""The README's one table: a processor a row, requests at once to the right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from heterospec_vllm.bench.page import table
from heterospec_vllm.bench.rows import SPEC
from heterospec_vllm.bench.tables import MARGINAL, PLAIN, by_load, load, mean_against, summarise
from heterospec_vllm.bench.words import bold

SIZES = (1, 4, 16, 64)


def readme_table(folders: Sequence[Path]) -> str:
    """`marginal` at temperature 0: times plain vLLM, in brackets times the best chain.

    Rows are by machine, target and dtype, in the order of the folders. Of a cell that several folders hold, the last
    one counts: name older runs first.
    """
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for folder in folders:
        rows = load([folder])
        machine = str(rows["environment"].iloc[-1].machine)
        greedy = [one for one in summarise(rows) if not one.cell.temperature]
        for target in dict.fromkeys(one.cell.target for one in greedy):
            key = (re.sub(r", \d+ threads", "", machine), target, _dtype(folder))
            here = cells.setdefault(key, {})
            for label, group in by_load([o for o in greedy if o.cell.target == target]).items():
                ratio = mean_against(group, MARGINAL, PLAIN)
                if ratio is not None:
                    chain = mean_against(group, MARGINAL, "best chain")
                    here[label] = bold(ratio) + (f" ({bold(chain)})" if chain else "")
    columns = [f"{size} at once" for size in SIZES]
    lines = [[*key, *(found.get(name, "") for name in columns)] for key, found in cells.items()]
    return table(["processor", "target", "dtype", *columns], lines)


def _dtype(folder: Path) -> str:
    path = folder / SPEC
    spec = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return str(spec.get("dtype", "")) if isinstance(spec, dict) else ""
