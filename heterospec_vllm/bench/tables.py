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
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import pandas as pd
from pydantic import ValidationError
from scipy.stats import binomtest, gmean

from heterospec_vllm.bench.rows import (
    GROWTH,
    PROMPTS,
    ROWS,
    Cell,
    Gate,
    GrowthRow,
    LoadName,
    Prompt,
    Row,
    Status,
    read,
)
from heterospec_vllm.bench.spec import PLAIN

MARGINAL = "marginal"
CHAIN_PREFIX = "eagle3"  # vLLM's own chains; n-grams and our `chain` are no candidates for "best"
RUN = ["folder", "group", "round"]  # systems are compared within one: engines loaded together
FAMILIES = (PLAIN, "off", CHAIN_PREFIX, "ngram", "chain", "static", "paper")  # order in tables

Verdict = Literal["win", "loss", "noise"]
Frame = Any  # pandas has no types here
R = TypeVar("R", Row, Prompt, GrowthRow)
_NOTHING = pd.Series([], index=pd.MultiIndex.from_arrays([[], [], []], names=RUN), dtype=float)


@dataclass(frozen=True)
class Results:
    """Everything that the folders hold; a row a record."""

    rows: Frame
    prompts: Frame
    growth: Frame
    superseded: int  # rows that a later row of the same round replaced


@dataclass(frozen=True)
class Paired:
    """A system against a rival over the rounds that both have."""

    ratio: float  # of the medians; above 1 is faster than the rival
    low: float  # the least ratio of a round
    high: float
    won: int  # rounds
    lost: int
    p: float  # two-sided sign test
    # The two were never loaded together: each is taken over plain's round beside it, then compared.
    indirect: bool


@dataclass(frozen=True)
class Entry:
    """One system in one cell."""

    system: str
    status: Status
    reasons: tuple[str, ...]  # of rounds that are not ok
    num_different: int  # answers, in the worst round
    speeds: Frame  # float Series by RUN, of the rounds that were timed; empty without a timing

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
        """None where one of the two has no timing."""
        if rival is None:
            return None
        together = paired(self.speeds(system), self.speeds(rival))
        if together is not None or PLAIN in (system, rival):
            return together
        return paired(self.relative(system), self.relative(rival), indirect=True)

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

    @property
    def better(self) -> str | None:
        """Plain or the best chain, whichever is faster; None where plain has no timing."""
        chain = self.against(self.best_chain, PLAIN) if self.best_chain else None
        if chain is not None and chain.ratio > 1:
            return self.best_chain
        return PLAIN if len(self.speeds(PLAIN)) else None


def load(folders: Sequence[Path]) -> Results:
    """Raises ValueError that names the folder or file which holds no results."""
    rows, prompts, growth = [], [], []
    for folder in folders:
        if not any((folder / name).is_file() for name in (ROWS, GROWTH)):
            raise ValueError(
                f"found no {ROWS} and no {GROWTH} in {folder}, allowed: result folders"
            )
        rows += [(str(folder), row) for row in _read(folder / ROWS, Row)]
        prompts += _read(folder / PROMPTS, Prompt)
        growth += _read(folder / GROWTH, GrowthRow)
    frame = rows_frame(rows)
    kept = without_superseded(frame)
    return Results(
        rows=kept,
        prompts=latest(_frame(prompts, Prompt), ["target", "prompt_set", "index"]),
        growth=latest(_frame(growth, GrowthRow), ["target", "sweep", "value"]),
        superseded=len(frame) - len(kept),
    )


def _read(path: Path, kind: type[R]) -> list[R]:
    try:
        return list(read(path, kind))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"{path}: {where}: {problem['msg']}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _frame(records: Sequence[R], kind: type[R]) -> Frame:
    return pd.DataFrame([dict(record) for record in records], columns=list(kind.model_fields))


def latest(frame: Frame, key: list[str]) -> Frame:
    """The last row of each key, in file order."""
    return frame.drop_duplicates(key, keep="last").reset_index(drop=True)


def without_superseded(rows: Frame) -> Frame:
    """A round that was run again counts once, by its last row. Plain runs once in every group of engines."""
    group = rows["group"].where(rows["system"] == PLAIN, 0)
    kept = latest(rows.assign(slot=group), ["folder", "cell", "system", "round", "slot"])
    again = kept.duplicated(["folder", "cell", "system", "round"], keep="last")
    return kept[~(again & (kept["status"] == "failed"))].drop(columns="slot").reset_index(drop=True)


def rows_frame(rows: Iterable[tuple[str, Row]]) -> Frame:
    """One line a (folder, row): the cell's fields, the row's, and its `speed`, NaN unless it is ok."""
    records = [
        {
            **dict(row.cell),
            **dict(row),
            "folder": folder,
            "speed": _speed(row),
        }
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


def holding(frame: Frame, column: str, kind: type) -> Frame:
    """The rows in which a column holds such a value."""
    return frame[np.array([isinstance(value, kind) for value in frame[column]], dtype=bool)]


def timed(rows: Frame) -> Frame:
    """Rows with a timing of cell and system pairs in which no round's answers differ."""
    if rows.empty:
        return rows
    worst = rows.groupby(["cell", "system"], sort=False)["status"].transform(
        lambda status: (status == "different").any()
    )
    return rows[rows["speed"].notna() & ~worst.astype(bool)]


def paired(ours: Frame, theirs: Frame, indirect: bool = False) -> Paired | None:
    """Two Series of speeds over the runs that both have; None without one."""
    runs = ours.index.intersection(theirs.index)
    if not len(runs):
        return None
    ours, theirs = ours[runs], theirs[runs]
    each = ours / theirs
    won, lost = int((each > 1).sum()), int((each < 1).sum())
    return Paired(
        ratio=float(ours.median() / theirs.median()),
        low=float(each.min()),
        high=float(each.max()),
        won=won,
        lost=lost,
        p=sign_test(won, lost),
        indirect=indirect,
    )


def sign_test(won: int, lost: int) -> float:
    """Two-sided p that a fair coin is as one-sided; ties are left out."""
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def verdict(ratio: float, noise: float | None) -> Verdict:
    """A win or a loss is farther from 1 than plain's own rounds lie apart; one round decides nothing."""
    if noise is None or abs(ratio - 1) <= noise:
        return "noise"
    return "win" if ratio > 1 else "loss"


def summarise(rows: Frame, mode: str = "offline") -> list[CellSummary]:
    """The cells of a mode, in the order of tables; prompt sets as they come in the file."""
    chosen = rows[rows["mode"] == mode]
    cells = [_summary(cell, part) for cell, part in chosen.groupby("cell", sort=False)]
    return sorted(cells, key=lambda one: cell_order(one.cell))


def cell_order(cell: Cell) -> tuple[Any, ...]:
    rate = -1.0 if cell.request_rate is None else cell.request_rate
    loads = get_args(LoadName)
    return (cell.target, cell.temperature, loads.index(cell.load), cell.concurrency, rate)


def _summary(cell: Cell, rows: Frame) -> CellSummary:
    entries = {
        system: _entry(system, rows[rows["system"] == system])
        for system in sorted(rows["system"].unique(), key=system_order)
    }
    return CellSummary(cell, entries)


def _entry(system: str, rows: Frame) -> Entry:
    speeds = timed(rows).set_index(RUN)["speed"]
    bad = rows[rows["status"] != "ok"]
    statuses = set(rows["status"])
    status: Status = "ok"
    if "different" in statuses:
        status = "different"
    elif not len(speeds):
        status = "failed"
    reasons = tuple(dict.fromkeys(reason or "no reason given" for reason in bad["reason"]))
    if status == "failed" and not reasons:
        reasons = ("nothing was timed",)
    gates = [gate for gate in rows["gate"] if isinstance(gate, Gate)]
    return Entry(system, status, reasons, max((g.different for g in gates), default=0), speeds)


def system_order(system: str) -> tuple[int, str]:
    """Plain first, `marginal` last, unknown ones before it; of a family the smaller numbers first."""
    name = re.sub(r"\d+", lambda digits: digits[0].zfill(4), system)
    if system == MARGINAL:
        return len(FAMILIES) + 1, name
    found = [i for i, family in enumerate(FAMILIES) if system.startswith(family)]
    return (found[0] if found else len(FAMILIES)), name


def speedups(cells: Sequence[CellSummary]) -> Frame:
    """Ratio to plain by target, temperature, concurrency and system, over the steady cells.

    `ratio` is the geometric mean over the prompt sets; `low` and `high` are the least and greatest such mean of a
    round (NaN where no round has every set). A system without a timing in every set that plain has gets no ratio.
    """
    records = []
    groups: dict[tuple[str, float, int], list[CellSummary]] = {}
    for one in cells:
        cell = one.cell
        if cell.load == "steady" and len(one.speeds(PLAIN)):
            groups.setdefault((cell.target, cell.temperature, cell.concurrency), []).append(one)
    for (target, temperature, concurrency), group in groups.items():
        systems = {name for one in group for name in one.entries}
        for system in sorted(systems, key=system_order):
            records.append(
                {
                    "target": target,
                    "temperature": temperature,
                    "concurrency": concurrency,
                    "system": system,
                    **_mean_ratio(group, system),
                }
            )
    columns = ["target", "temperature", "concurrency", "system", "ratio", "low", "high", "cells"]
    return pd.DataFrame(records, columns=columns)


def _mean_ratio(group: list[CellSummary], system: str) -> dict[str, float]:
    found = [one.against(system, PLAIN) for one in group]
    ratios = [one.ratio for one in found if one is not None]
    if len(ratios) < len(group):
        return {"ratio": np.nan, "low": np.nan, "high": np.nan, "cells": len(ratios)}
    each = pd.concat([one.relative(system) for one in group], axis=1).dropna()
    means = gmean(each, axis=1) if len(each) else np.array([np.nan])
    return {
        "ratio": float(gmean(ratios)),
        "low": float(means.min()),
        "high": float(means.max()),
        "cells": len(ratios),
    }


def mean_against(cells: Sequence[CellSummary], system: str, rival: str) -> float | None:
    """Geometric mean of ratios over cells, each a system, `best chain` or `better`; None unless every cell has it."""
    ratios = []
    for one in cells:
        name = named(one, system)
        pair = one.against(name, named(one, rival)) if name else None
        if pair is None:
            return None
        ratios.append(pair.ratio)
    return float(gmean(ratios)) if ratios else None


def named(cell: CellSummary, system: str) -> str | None:
    """The system that `best chain` or `better` means in a cell."""
    return {"best chain": cell.best_chain, "better": cell.better}.get(system, system)


def worst_gates(rows: Frame) -> list[Gate]:
    """The worst gate of each folder, system and set of greedy requests: no answer is counted twice.

    Rounds, temperatures and request rates of a cell share one gate; plain decoding is compared with nothing.
    """
    gated = holding(rows[rows["system"] != PLAIN], "gate", Gate)
    requests = [cell.greedy for cell in gated["cell"]]
    groups = gated.assign(requests=requests).groupby(["folder", "requests", "system"], sort=False)
    return [max(g, key=lambda one: (one.different, one.near_ties)) for _, g in groups["gate"]]
