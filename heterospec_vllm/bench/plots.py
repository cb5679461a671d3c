# SPDX-License-Identifier: Apache-2.0
"""The three plots of the page: speed-ups, what a step does, and a server's latencies.

Colours are of Okabe and Ito's set, which colour-blind readers can tell apart; markers repeat what they say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from heterospec_vllm.bench.tables import FAMILIES, MARGINAL, PLAIN, Frame, system_order
from heterospec_vllm.observe.counters import STEP_PARTS

SETTINGS: dict[Any, Any] = {"axes.grid": True, "axes.axisbelow": True, "grid.color": "#dddddd"}
PART_COLOURS = ("#4477AA", "#CCBB44", "#EE6677", "#228833", "#BBBBBB")  # in stacking order
OF_FAMILIES = ("#000000", "#999999", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#8C6D00")
COLOURS = {**dict(zip(FAMILIES, OF_FAMILIES, strict=True)), MARGINAL: "#D55E00"}
MARKERS = "osD^vP*X<>"
AT_ONCE = "requests at once"


def save(draw: Callable[[], Figure], path: Path) -> None:
    """Writes a PNG; the same picture for the same rows, so no version in the file."""
    with matplotlib.rc_context(SETTINGS):
        draw().savefig(path, metadata={"Software": None})


def speedup(frame: Frame) -> Figure:
    """Ratio to plain against concurrency; grey: plain's own spread."""
    parts = _by_place(frame)
    fig = _figure(5.2 * len(parts) + 2.3, 4.2)
    axes = fig.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    for axis, (title, part) in zip(axes, parts, strict=True):
        axis.axhline(1.0, color="black", linewidth=1.4)
        loads = sorted(set(part["concurrency"]))
        noise = part.groupby("concurrency")["noise"].max()
        axis.fill_between(range(len(loads)), 1 - noise, 1 + noise, color="#eeeeee")
        _lines(axis, part[part["system"] != PLAIN], "concurrency", loads, "ratio")
        axis.set(title=title, xlabel=AT_ONCE, ylabel="times plain decoding")
        # Panels share the axis: a limit from one of them would cut the others' points off.
        axis.set_ylim(0, 1.06 * max(1.0, frame["ratio"].max()))
    _legend(fig, axes)
    return fig


def steps(frame: Frame) -> Figure:
    """Tokens and draft nodes a step and request, and the milliseconds of `marginal`'s steps by part."""
    parts = _by_place(frame)
    fig = _figure(15.0, 3.6 * len(parts))
    grid = fig.subplots(len(parts), 3, squeeze=False)
    for row, (title, part) in zip(grid, parts, strict=True):
        loads = sorted(set(part["concurrency"]))
        _lines(row[0], part, "concurrency", loads, "tokens_per_step")
        _lines(row[1], part[part["system"] != "off"], "concurrency", loads, "nodes")
        ours = part[part["system"] == MARGINAL].set_index("concurrency").reindex(loads)
        _stack(row[2], ours, loads)
        labels = ("tokens a step and request", "draft nodes a step and request")
        for axis, label in zip(row, (*labels, f"{MARGINAL}: ms a step"), strict=True):
            axis.set(title=title, xlabel=AT_ONCE, ylabel=label)
    _legend(fig, list(grid[:, :2].flat))
    return fig


def _stack(axis: Axes, ours: Frame, loads: list[int]) -> None:
    bottom = ours["ms_target"].fillna(0) * 0
    for name, colour in zip(STEP_PARTS, PART_COLOURS, strict=True):
        heights = ours[f"ms_{name}"].fillna(0)
        axis.bar(range(len(loads)), heights, bottom=bottom, color=colour, label=name)
        bottom = bottom + heights
    axis.set_xticks(range(len(loads)), [f"{load:g}" for load in loads])
    axis.legend(fontsize="small")


def serving(frame: Frame) -> Figure:
    """Latencies in milliseconds (median above, p99 below) and requests a second, by load."""
    names = {"ttft": "time to first token, ms", "tpot": "time per output token, ms"}
    names["e2el"] = "end to end, ms"
    loads = list(dict.fromkeys(frame["load"]))
    fig = _figure(16.0, 7.0)
    grid = fig.subplots(2, 4)
    for row, which in zip(grid, ("p50", "p99"), strict=True):
        for axis, (name, label) in zip(row, names.items(), strict=False):
            _lines(axis, frame, "load", loads, f"{name}_{which}")
            axis.set(title=f"{label}, {which}", ylim=(0, None))
    for axis, column in zip(grid[:, 3], ("request_throughput", "goodput"), strict=True):
        _lines(axis, frame, "load", loads, column)
        axis.set(title=f"{column.replace('_', ' ')}, requests a second", ylim=(0, None))
    _legend(fig, list(grid.flat))
    return fig


def _figure(width: float, height: float) -> Figure:
    """Inches. Without pyplot: nothing global is left behind."""
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _by_place(frame: Frame) -> list[tuple[str, Frame]]:
    groups = frame.groupby(["target", "temperature"])
    return [(f"{target}, T={temperature:g}", part) for (target, temperature), part in groups]


def _lines(axis: Axes, frame: Frame, by: str, loads: Sequence[Any], column: str) -> None:
    """A line a system over loads, which are equally far apart."""
    for system in sorted(frame["system"].unique(), key=system_order):
        line = frame[(frame["system"] == system) & frame[column].notna()]
        places = sorted(
            (loads.index(load), value) for load, value in zip(line[by], line[column], strict=True)
        )
        if places:
            ours = system == MARGINAL
            number = sum(map(int, re.findall(r"\d+", system)))
            family = next((f for f in COLOURS if system.startswith(f)), "off")
            axis.plot(
                *zip(*places, strict=True), label=system, color=COLOURS[family],
                marker=MARKERS[number % len(MARKERS)], linewidth=3.2 if ours else 1.4,
                zorder=5 if ours else 2, linestyle="-" if family in (MARGINAL, "eagle3") else "--",
            )  # fmt: skip
    axis.set_xticks(range(len(loads)), [f"{n:g}" if by == "concurrency" else n for n in loads])


def _legend(fig: Figure, axes: Sequence[Axes]) -> None:
    """One for all panels, to their right, in the order of tables."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    names = sorted(found, key=system_order)
    fig.legend([found[name] for name in names], names, loc="outside right upper")
