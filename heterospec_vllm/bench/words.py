# SPDX-License-Identifier: Apache-2.0
"""The results in plain sentences. Losses are said as clearly as wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heterospec_vllm.bench.tables import (
    MARGINAL,
    CellSummary,
    Entry,
    Frame,
    Paired,
    named,
    sign_test,
    verdict,
    worst_gates,
)

RIVALS = {
    "plain": "plain decoding",
    "best chain": "the best chain (the fastest `eagle3` of each cell, chosen with hindsight)",
}
TIMED = {"offline": "tokens a second", "serving": "median end-to-end latency"}


@dataclass(frozen=True)
class Compared:
    """`marginal` against a rival in one cell."""

    summary: CellSummary
    paired: Paired

    @property
    def verdict(self) -> str:
        return verdict(self.paired.ratio, self.summary.noise)


def compared(cells: Sequence[CellSummary], rival: str) -> list[Compared]:
    """Of the cells in which both have a timing."""
    pairs = ((one, one.against(MARGINAL, named(one, rival))) for one in cells)
    return [Compared(one, pair) for one, pair in pairs if pair is not None]


def headlines(rows: Frame, cells: Sequence[CellSummary], mode: str = "offline") -> list[str]:
    """What the cells of a mode say about `marginal`."""
    if not any(MARGINAL in one.entries for one in cells):
        return [f"`{MARGINAL}` was not among the {mode} runs."] if cells else []
    sentences = []
    ours = [one.entries[MARGINAL] for one in cells if MARGINAL in one.entries]
    if not all(len(entry.speeds) for entry in ours):
        different = sum(entry.status == "different" for entry in ours)
        failed = sum(entry.status == "failed" for entry in ours)
        sentences.append(
            f"`{MARGINAL}` has no timing in {different + failed} of {_cells(len(ours))} ({mode}): its "
            f"answers differ in {different}, and {failed} failed."
        )
    for rival in RIVALS:
        sentences += _against(compared(cells, rival), rival, mode)
    better = compared(cells, "better")
    if better and mode == "offline":
        worst = min(better, key=lambda one: one.paired.ratio)
        near = sum(one.paired.ratio >= 0.98 for one in better)
        sentences.append(
            f"Against the better of plain and the best chain, cell by cell: at least 0.98x in "
            f"{near} of {_cells(len(better))}; the lowest is {times(worst.paired.ratio)} "
            f"({worst.summary.cell.label})."
        )
    return sentences


def _against(found: Sequence[Compared], rival: str, mode: str) -> list[str]:
    name = RIVALS[rival]
    if not found:
        return [f"Against {name}: no {mode} cell has a timing of both."]
    faster = [one for one in found if one.paired.ratio > 1]
    slower = [one for one in found if one.paired.ratio < 1]
    won, lost = sum(o.paired.won for o in found), sum(o.paired.lost for o in found)
    text = (
        f"`{MARGINAL}` against {name}, by {TIMED[mode]}, in {_cells(len(found))}: faster in {len(faster)} "
        f"({sum(o.verdict == 'win' for o in faster)} of them by more than plain's own rounds lie apart), "
        f"slower in {len(slower)} ({sum(o.verdict == 'loss' for o in slower)} by more than that); "
        f"{won} of {won + lost} paired rounds won (sign test p = {p_value(sign_test(won, lost))})."
    )
    apart = sum(one.paired.indirect for one in found)
    if apart:
        text += (
            f" In {apart} of them the two were not loaded together: each is taken over plain's "
            "rounds beside it."
        )
    worst = min(found, key=lambda one: one.paired.ratio)
    label = worst.summary.cell.label
    if worst.paired.ratio < 1:
        end = f"Worst loss against {rival}: {times(worst.paired.ratio)} ({label})."
    else:
        end = f"No cell is a loss against {rival}; the lowest is {times(worst.paired.ratio)} ({label})."
    return [text, end]


def gates(rows: Frame, num_unsafe: int) -> str:
    """How many answers were compared; `num_unsafe` cell and system pairs have no timing for it."""
    found = worst_gates(rows)
    if not found:
        return "No answers were compared with plain decoding's."
    same, ties = sum(g.same for g in found), sum(g.near_ties for g in found)
    different = sum(g.different for g in found)
    fine = [g.largest_gap for g in found if not g.different]
    gap = f", the largest gap {max(fine):.3f} nats" if ties and fine else ""
    end = "none differs otherwise."
    if different:
        end = f"{different} differ; the {num_unsafe} cell and system pairs they belong to show no timing."
    return (
        f"Greedy answers compared with plain decoding's: {same + ties + different} "
        f"(once a cell and system); {same} are the same, {ties} part at a near-tie and are "
        f"excused{gap}; {end}"
    )


def without_timing(cells: Sequence[CellSummary], status: str) -> list[str]:
    """A line for each cell and system whose rounds failed, or whose answers differ."""
    lines = []
    for one in cells:
        for entry in one.entries.values():
            partly = status == "failed" and entry.status == "ok" and bool(entry.reasons)
            if entry.status != status and not partly:
                continue
            rounds = f" (in some rounds; {len(entry.speeds)} are timed)" if partly else ""
            lines.append(f"{one.cell.label}: {entry.system}{rounds}: {'; '.join(entry.reasons)}")
    return lines


def differ(entry: Entry) -> str:
    return f"answers differ ({entry.num_different})"


def losses(cells: Sequence[CellSummary]) -> list[str]:
    """A sentence for each cell in which `marginal` is slower than plain or than the best chain, worst first."""
    found = []
    for one in cells:
        pairs = {name: one.against(MARGINAL, named(one, name)) for name in RIVALS}
        slower = {name: p for name, p in pairs.items() if p is not None and p.ratio < 1}
        if slower:
            worst = min(p.ratio for p in slower.values())
            found.append((worst, _loss(one, slower)))
    return [text for _, text in sorted(found, key=lambda one: one[0])]


def _loss(one: CellSummary, slower: dict[str, Paired]) -> str:
    parts = []
    for name, pair in slower.items():
        rival = named(one, name)
        entry = one.entries[rival] if rival else None
        shown = name if name == rival else f"{name} ({rival})"
        speed = f", {entry.speed:.1f} tok/s" if entry and entry.speed and is_offline(one) else ""
        within = verdict(pair.ratio, one.noise) == "noise"
        size = "within plain's own spread" if within else "beyond plain's own spread"
        size += "; compared through plain, not loaded together" if pair.indirect else ""
        parts.append(
            f"{times(pair.ratio)} of {shown}{speed} ({size}; {pair.won} of {pair.won + pair.lost} rounds won)"
        )
    ours = one.entries[MARGINAL].speed
    own = f" at {ours:.1f} tok/s" if ours and is_offline(one) else ""
    return f"{one.cell.label}: {MARGINAL}{own} is {' and '.join(parts)}."


def is_offline(one: CellSummary) -> bool:
    return one.cell.mode == "offline"


def times(ratio: float) -> str:
    """Three decimals near 1, where two would hide on which side of it a ratio is."""
    return f"{ratio:.3f}x" if 0.98 < ratio < 1.02 else f"{ratio:.2f}x"


def p_value(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else f"{p:.0e}"


def _cells(count: int) -> str:
    return f"{count} cell" if count == 1 else f"{count} cells"
