# SPDX-License-Identifier: Apache-2.0
"""The results in plain sentences. Losses are said as clearly as wins."""

from __future__ import annotations

from collections.abc import Sequence

from heterospec_vllm.bench.tables import (
    MARGINAL,
    PLAIN,
    CellSummary,
    Entry,
    Frame,
    Paired,
    sign_test,
    verdict,
    worst_gates,
)

RIVALS = {
    PLAIN: "plain decoding",
    "best chain": "the best chain (the fastest `eagle3` of each cell, chosen with hindsight)",
}


def headlines(cells: Sequence[CellSummary], mode: str = "offline") -> list[str]:
    """What the cells of a mode say about `marginal`."""
    ours = [one.entries[MARGINAL] for one in cells if MARGINAL in one.entries]
    if not ours:
        return [f"`{MARGINAL}` was not among the {mode} runs."] if cells else []
    sentences = []
    different = sum(entry.status == "different" for entry in ours)
    failed = sum(entry.status == "failed" for entry in ours)
    if different + failed:
        sentences.append(
            f"`{MARGINAL}` has no timing in {different + failed} of {_cells(len(ours))} ({mode}): "
            f"its answers differ in {different}, and {failed} failed."
        )
    for rival in RIVALS:
        sentences += _against(cells, rival, mode)
    ratios = [pair.ratio for one in cells if (pair := one.against(MARGINAL, "better"))]
    if ratios:
        near = sum(ratio >= 0.98 for ratio in ratios)
        sentences.append(
            f"Against the better of plain and the best chain, cell by cell: at least 0.98x in "
            f"{near} of {_cells(len(ratios))}; the lowest is {times(min(ratios))}."
        )
    return sentences


def _against(cells: Sequence[CellSummary], rival: str, mode: str) -> list[str]:
    found = [(one, pair) for one in cells if (pair := one.against(MARGINAL, rival))]
    if not found:
        return [f"Against {RIVALS[rival]}: no {mode} cell has a timing of both."]
    won, lost = sum(pair.won for _, pair in found), sum(pair.lost for _, pair in found)
    verdicts = [verdict(pair.ratio, one.noise) for one, pair in found]
    timed = "tokens a second" if mode == "offline" else "median end-to-end latency"
    text = (
        f"`{MARGINAL}` against {RIVALS[rival]}, by {timed}, in {_cells(len(found))}: "
        f"faster in {sum(pair.ratio > 1 for _, pair in found)} "
        f"({verdicts.count('win')} of them by more than plain's own rounds lie apart), "
        f"slower in {sum(pair.ratio < 1 for _, pair in found)} "
        f"({verdicts.count('loss')} by more than that); {won} of {won + lost} paired rounds won "
        f"(sign test p = {sign_test(won, lost):.2g})."
    )
    one, worst = min(found, key=lambda pair: pair[1].ratio)
    start = f"Worst loss against {rival}:"
    if worst.ratio >= 1:
        start = f"No cell is a loss against {rival}; the lowest is"
    return [text, f"{start} {times(worst.ratio)} ({one.cell.label})."]


def gates(rows: Frame) -> str:
    """How many answers were compared."""
    found = worst_gates(rows)
    if not found:
        return "No answers were compared with plain decoding's."
    same, ties = sum(g.same for g in found), sum(g.near_ties for g in found)
    different = sum(g.different for g in found)
    fine = [g.largest_gap for g in found if not g.different]
    gap = f", the largest gap {max(fine):.3f} nats" if ties and fine else ""
    end = f"{different} differ: no timing there." if different else "none differs otherwise."
    return (
        f"Greedy answers compared with plain decoding's: {same + ties + different} "
        f"(once a cell and system); {same} are the same, {ties} part at a near-tie and are "
        f"excused{gap}; {end}"
    )


def without_timing(cells: Sequence[CellSummary]) -> list[str]:
    """A line for each cell and system whose rounds failed, or whose answers differ."""
    lines = []
    for one in cells:
        for entry in one.entries.values():
            if entry.reasons:
                different = entry.status == "different"
                what = "Answers differ, no timing" if different else "Failed"
                some = (
                    f" (in some rounds; {len(entry.timed)} are timed)" if len(entry.timed) else ""
                )
                why = "; ".join(entry.reasons)
                lines.append(f"{what}: {one.cell.label}: {entry.system}{some}: {why}")
    return lines


def losses(cells: Sequence[CellSummary]) -> list[str]:
    """A sentence for each cell where `marginal` is slower than plain or the best chain, worst first."""
    found = []
    for one in cells:
        pairs = {name: one.against(MARGINAL, name) for name in RIVALS}
        slower = {name: p for name, p in pairs.items() if p is not None and p.ratio < 1}
        if slower:
            parts = " and ".join(_loss(one, name, pair) for name, pair in slower.items())
            text = f"{one.cell.label}: {MARGINAL} at {speed(one, MARGINAL)} is {parts}."
            found.append((min(pair.ratio for pair in slower.values()), text))
    return [text for _, text in sorted(found)]


def _loss(one: CellSummary, name: str, pair: Paired) -> str:
    rival = one.named(name) or ""
    shown = name if name == rival else f"{name} ({rival})"
    size = "within" if verdict(pair.ratio, one.noise) == "noise" else "beyond"
    apart = "; compared through plain, not loaded together" if pair.indirect else ""
    return (
        f"{times(pair.ratio)} of {shown}, {speed(one, rival)} ({size} plain's own spread{apart}; "
        f"{pair.rounds} rounds won)"
    )


def speed(one: CellSummary, system: str) -> str:
    """Tokens a second; of servers the milliseconds behind the speed."""
    value = one.entries[system].speed
    assert value is not None
    return f"{value:.1f} tok/s" if one.cell.mode == "offline" else f"{1000 / value:.0f} ms"


def no_timing(entries: Sequence[Entry]) -> str:
    """Why a system has no ratio, nothing where it has one."""
    different = sum(entry.num_different for entry in entries if entry.status == "different")
    if different:
        return f"answers differ ({different})"
    return "failed" if any(entry.status == "failed" for entry in entries) else ""


def times(ratio: float) -> str:
    """Three decimals near 1, where two would hide on which side of it a ratio is."""
    return f"{ratio:.3f}x" if 0.98 < ratio < 1.02 else f"{ratio:.2f}x"


def bold(ratio: float | None) -> str:
    """Losses are bold."""
    if ratio is None:
        return "n/a"
    return f"**{times(ratio)}**" if ratio < 1 else times(ratio)


def _cells(count: int) -> str:
    return f"{count} cell" if count == 1 else f"{count} cells"
