# SPDX-License-Identifier: Apache-2.0
"""From benchmark rows to cells, ratios and tests. Pure: reads folders, draws and writes nothing.

Speeds are tokens a second of offline cells; of serving cells 1000 / (median end-to-end latency in ms), so that a ratio
above 1 is faster in both. Rows whose answers differ lose their speed here, before anything else sees them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from scipy.stats import binomtest, gmean

from heterospec_vllm.bench.rows import Cell, Gate, LoadName, Row, Status, rows_of
from heterospec_vllm.bench.spec import MIX, PLAIN

MARGINAL = "marginal"
CHAIN_PREFIX = "eagle3"  # vLLM's own chains; n-grams and our `chain` are no candidates for "best"
RUN = ["folder", "group", "round"]  # systems are compared within one: engines loaded together
FAMILIES = (PLAIN, "off", CHAIN_PREFIX, "ngram", "chain", "static", "paper")  # order in tables

Verdict = Literal["win", "loss", "noise"]
Frame = Any  # pandas has no types here
_NOTHING = pd.Series([], index=pd.MultiIndex.from_arrays([[], [], []], names=RUN), dtype=float)


# ---- rows


def load(folders: Sequence[Path]) -> Frame:
    """The rows that count. Raises ValueError that names the folder or file which holds no results."""
    found = [(str(folder), row) for folder in folders for row in rows_of(folder)]
    return without_superseded(rows_frame(found))


def rows_frame(rows: Iterable[tuple[str, Row]]) -> Frame:
    """One line a (folder, row): the cell's fields, the row's, and its `speed`, NaN unless it is ok."""
    records = [
        {**dict(row.cell), **dict(row), "folder": folder, "speed": _speed(row)}
        for folder, row in rows
    ]
    columns = [*Cell.model_fields, *Row.model_fields, "folder", "speed"]
    return pd.DataFrame(records, columns=columns).astype({"speed": float})


def _speed(row: Row) -> float | None:
    if row.status != "ok":
        return None
    if row.cell.mode == "serving":
        return 1000 / row.serving.e2el_p50 if row.serving and row.serving.e2el_p50 else None
    return row.tokens_per_second


def without_superseded(rows: Frame) -> Frame:
    """A round that was run again counts once, by its last row. Plain runs once in every group of engines."""
    slot = rows["group"].where(rows["system"] == PLAIN, 0)
    key = ["folder", "cell", "system", "round"]
    kept = rows.assign(slot=slot).drop_duplicates([*key, "slot"], keep="last")
    again = kept.duplicated(key, keep="last")
    return kept[~(again & (kept["status"] == "failed"))].drop(columns="slot").reset_index(drop=True)


def holding(frame: Frame, column: str, kind: type) -> Frame:
    """The rows in which a column holds such a value."""
    return frame[np.array([isinstance(value, kind) for value in frame[column]], dtype=bool)]


def timed(rows: Frame) -> Frame:
    """Rows with a timing of cell and system pairs in which no round's answers differ."""
    if rows.empty:
        return rows
    bad = rows["status"] == "different"
    different = bad.groupby([rows["cell"], rows["system"]], sort=False)
    return rows[rows["speed"].notna() & ~different.transform("any")]


def worst_gates(rows: Frame) -> list[Gate]:
    """The worst gate of each folder, system and set of greedy requests: no answer is counted twice.

    Rounds, temperatures and request rates of a cell share one gate; plain decoding is compared with nothing.
    """
    gated = holding(rows[rows["system"] != PLAIN], "gate", Gate)
    requests = [cell.greedy for cell in gated["cell"]]
    groups = gated.assign(requests=requests).groupby(["folder", "requests", "system"], sort=False)
    return [max(g, key=lambda one: (one.different, one.near_ties)) for _, g in groups["gate"]]


# ---- two systems


@dataclass(frozen=True)
class Paired:
    """A system against a rival over the rounds that both have."""

    ratio: float  # of the medians; above 1 is faster than the rival
    won: int  # rounds
    lost: int
    # The two were never loaded together: each is taken over plain's round beside it, then compared.
    indirect: bool

    @property
    def p(self) -> float:
        return sign_test(self.won, self.lost)

    @property
    def rounds(self) -> str:
        return f"{self.won} of {self.won + self.lost}"


def paired(ours: Frame, theirs: Frame, indirect: bool = False) -> Paired | None:
    """Two Series of speeds over the runs that both have; None without one."""
    runs = ours.index.intersection(theirs.index)
    if not len(runs):
        return None
    ours, theirs = ours[runs], theirs[runs]
    ratio = float(ours.median() / theirs.median())
    return Paired(ratio, int((ours > theirs).sum()), int((ours < theirs).sum()), indirect)


def sign_test(won: int, lost: int) -> float:
    """Two-sided p that a fair coin is as one-sided; ties are left out."""
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def verdict(ratio: float, noise: float | None) -> Verdict:
    """A win or a loss is farther from 1 than plain's own rounds lie apart; one round decides nothing."""
    if noise is None or abs(ratio - 1) <= noise:
        return "noise"
    return "win" if ratio > 1 else "loss"


# ---- cells


@dataclass(frozen=True)
class Entry:
    """One system in one cell."""

    system: str
    status: Status
    reasons: tuple[str, ...]  # of rounds that are not ok
    num_different: int  # answers, in the worst round
    timed: Frame  # rows of the rounds that were timed; empty without a timing

    @cached_property
    def speeds(self) -> Frame:
        """Float Series by RUN."""
        return self.timed.set_index(RUN)["speed"]

    @property
    def speed(self) -> float | None:
        return float(self.speeds.median()) if len(self.speeds) else None


@dataclass(frozen=True)
class CellSummary:
    """All systems of one cell."""

    cell: Cell
    entries: dict[str, Entry]  # by system, in the order of tables

    def speeds(self, system: str) -> Frame:
        return self.entries[system].speeds if system in self.entries else _NOTHING

    def relative(self, system: str) -> Frame:
        """Speeds over plain's of the same run; Series by folder and round, which plain has once for every group."""
        ratios = (self.speeds(system) / self.speeds(PLAIN)).dropna()
        return ratios.groupby(level=["folder", "round"]).median()

    def against(self, system: str, rival: str | None) -> Paired | None:
        """The rival is a system, `best chain` or `better`. None where one of the two has no timing."""
        rival = self.named(rival)
        if rival is None:
            return None
        together = paired(self.speeds(system), self.speeds(rival))
        if together is not None or PLAIN in (system, rival):
            return together
        return paired(self.relative(system), self.relative(rival), indirect=True)

    def named(self, rival: str | None) -> str | None:
        """The system that `best chain`, or `better`: that or plain, means here."""
        if rival == "best chain":
            return self.best_chain
        if rival != "better":
            return rival
        chain = self.against(self.best_chain, PLAIN) if self.best_chain else None
        return self.best_chain if chain is not None and chain.ratio > 1 else PLAIN

    @cached_property
    def noise(self) -> float | None:
        """(max - min) / median of plain's rounds, in the group where it is largest; None without two rounds."""
        groups = self.speeds(PLAIN).groupby(level=["folder", "group"])
        spreads = [(g.max() - g.min()) / g.median() for _, g in groups if len(g) > 1]
        return float(max(spreads)) if spreads else None

    @cached_property
    def best_chain(self) -> str | None:
        """The fastest `eagle3`, with hindsight."""
        chains = [name for name in self.entries if name.startswith(CHAIN_PREFIX)]
        over_plain = {name: pair.ratio for name in chains if (pair := self.against(name, PLAIN))}
        return max(over_plain, key=lambda name: over_plain[name]) if over_plain else None


def summarise(rows: Frame, mode: str = "offline") -> list[CellSummary]:
    """The cells of a mode, in the order of tables; prompt sets as they come in the file."""
    chosen = rows[rows["mode"] == mode]
    cells = [_summary(cell, part) for cell, part in chosen.groupby("cell", sort=False)]
    return sorted(cells, key=lambda one: _cell_order(one.cell))


def _cell_order(cell: Cell) -> tuple[Any, ...]:
    rate = -1.0 if cell.request_rate is None else cell.request_rate
    loads = get_args(LoadName)
    return (cell.target, cell.temperature, loads.index(cell.load), cell.concurrency, rate)


def _summary(cell: Cell, rows: Frame) -> CellSummary:
    systems = sorted(rows["system"].unique(), key=system_order)
    return CellSummary(cell, {name: _entry(name, rows[rows["system"] == name]) for name in systems})


def _entry(system: str, rows: Frame) -> Entry:
    kept = timed(rows)
    bad = rows[rows["status"] != "ok"]
    status: Status = "ok" if len(kept) else "failed"
    if (rows["status"] == "different").any():
        status = "different"
    reasons = tuple(dict.fromkeys(reason or "no reason given" for reason in bad["reason"]))
    if status == "failed" and not reasons:
        reasons = ("nothing was timed",)
    gates = [gate for gate in rows["gate"] if isinstance(gate, Gate)]
    return Entry(system, status, reasons, max((g.different for g in gates), default=0), kept)


def system_order(system: str) -> tuple[int, str]:
    """Plain first, `marginal` last, unknown ones before it; of a family the smaller numbers first."""
    name = re.sub(r"\d+", lambda digits: digits[0].zfill(4), system)
    if system == MARGINAL:
        return len(FAMILIES) + 1, name
    found = [i for i, family in enumerate(FAMILIES) if system.startswith(family)]
    return (found[0] if found else len(FAMILIES)), name


# ---- several cells


def column_of(cell: Cell) -> str:
    """The load of a cell, as a column of the table."""
    rate = cell.request_rate
    size = f"{cell.concurrency} at once" if rate is None else f"{rate:g} requests/s"
    return size if cell.load == "steady" else f"{size}, {cell.load}"


def by_load(cells: Sequence[CellSummary]) -> dict[str, list[CellSummary]]:
    """The cells of one target and temperature, by column: all prompt sets, or the mix where that was run."""
    mixed = {column_of(one.cell) for one in cells if one.cell.prompt_set == MIX}
    found: dict[str, list[CellSummary]] = {}
    for one in cells:
        label = column_of(one.cell)
        if label in mixed and one.cell.prompt_set != MIX:
            label += f", {one.cell.prompt_set}"
        found.setdefault(label, []).append(one)
    return found


def by_place(cells: Sequence[CellSummary]) -> dict[tuple[str, float], list[CellSummary]]:
    """By target and temperature."""
    found: dict[tuple[str, float], list[CellSummary]] = {}
    for one in cells:
        found.setdefault((one.cell.target, one.cell.temperature), []).append(one)
    return found


def speedups(cells: Sequence[CellSummary]) -> Frame:
    """Ratio to plain by target, temperature, concurrency and system, over the steady cells.

    `ratio` is the geometric mean over the prompt sets, NaN without a timing in every set that plain has; `noise` the
    largest of plain's spreads.
    """
    steady = [one for one in cells if one.cell.load == "steady" and len(one.speeds(PLAIN))]
    keys = ["target", "temperature", "concurrency", "system", "ratio", "noise"]
    values: list[tuple[Any, ...]] = []
    for place, here in by_place(steady).items():
        for label, group in by_load(here).items():
            size, noise = group[0].cell.concurrency, max(one.noise or 0.0 for one in group)
            for system in systems_of(group) if label == f"{size} at once" else []:
                values.append((*place, size, system, mean_against(group, system, PLAIN), noise))
    return pd.DataFrame(values, columns=keys).astype({"ratio": float})


def systems_of(cells: Sequence[CellSummary]) -> list[str]:
    return sorted({name for one in cells for name in one.entries}, key=system_order)


def mean_against(cells: Sequence[CellSummary], system: str, rival: str) -> float | None:
    """Geometric mean of ratios over cells; the rival as in `against`. None unless every cell has one."""
    pairs = [one.against(system, rival) for one in cells]
    ratios = [pair.ratio for pair in pairs if pair is not None]
    return float(gmean(ratios)) if ratios and len(ratios) == len(pairs) else None
