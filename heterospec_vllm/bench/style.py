# SPDX-License-Identifier: Apache-2.0
"""How every plot looks: one colour and marker a system, panels by target and temperature, the legend beside them.

Colours are of Okabe and Ito's and Paul Tol's sets, which colour-blind readers can tell apart; markers and dashes repeat
what they say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from heterospec_vllm.bench.tables import MARGINAL, Frame, system_order

DPI = 110
SETTINGS: dict[Any, Any] = {
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
}
# Parts of a step, in the order they are stacked.
PART_COLOURS = ("#4477AA", "#CCBB44", "#EE6677", "#228833", "#BBBBBB", "#AA3377", "#66CCEE")
SET_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#D55E00")
MARKERS = "osD^vP*X<>"


@dataclass(frozen=True)
class Look:
    """Of one system in every plot."""

    colour: str
    marker: str
    dashes: str
    width: float = 1.6
    above: int = 2  # the drawing order


_EAGLE = {
    "eagle3 k=1": ("#9CCBEB", "o"),
    "eagle3 k=2": ("#56B4E9", "s"),
    "eagle3 k=3": ("#0072B2", "D"),
    "eagle3 k=5": ("#004A7C", "^"),
    "eagle3 tuned": ("#001F3F", "X"),
}
_FAMILY = {
    "plain": Look("#000000", "o", "-"),
    "off": Look("#999999", "o", "--"),
    "eagle3": Look("#3F8FC4", "v", "-"),
    "ngram": Look("#E69F00", "s", "--"),
    "chain": Look("#CC79A7", "D", "--"),
    "static": Look("#009E73", "P", "-."),
    "paper": Look("#8C6D00", "v", ":"),
    "oracle": Look("#000000", "*", ":"),
}


def look(system: str) -> Look:
    """The same for a system wherever it is drawn; `marginal` stands out."""
    if system == MARGINAL:
        return Look("#D55E00", "o", "-", width=3.2, above=5)
    if system in _EAGLE:
        return Look(*_EAGLE[system], "-")
    if system.startswith(MARGINAL):
        return Look("#F0A070", "o", ":", width=2.0, above=4)
    for family, one in _FAMILY.items():
        if system.startswith(family):
            numbers = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", system)}
            size = numbers.get("nodes", numbers.get("k"))
            marker = one.marker if size is None else MARKERS[size % len(MARKERS)]
            return Look(_shade(one.colour, numbers.get("depth")), marker, one.dashes)
    return Look("#7F7F7F", "<", "-.")


def _shade(colour: str, depth: int | None) -> str:
    """Of a family's members those with a marker in common differ in depth: the deeper, the darker."""
    if depth is None:
        return colour
    towards = 0.55 - 0.25 * min(depth - 1, 5)  # of white where positive, else of black
    end = 1.0 if towards > 0 else 0.0
    red, green, blue = (part + abs(towards) * (end - part) for part in to_rgb(colour))
    return to_hex((red, green, blue))


def figure(width: float, height: float) -> Figure:
    """Inches. Without pyplot: nothing global is left behind."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(draw: Callable[[], Figure], path: Path) -> None:
    """Draws with the common settings and writes a PNG."""
    with matplotlib.rc_context(SETTINGS):
        # The same picture for the same rows: no version in the file.
        draw().savefig(path, metadata={"Software": None})


@dataclass(frozen=True)
class Panels:
    """A grid of panels: targets downwards, temperatures to the right."""

    figure: Figure
    axes: dict[tuple[str, float], Axes]


def panels(
    frame: Frame, width: float = 5.0, height: float = 3.7, legend: float = 2.3, **shared: Any
) -> Panels:
    """One for each target and temperature of a frame; sizes of a panel and of the legend's room in inches.

    Panels share the y axis, so that they compare; ``shared`` is passed on to ``Figure.subplots``.
    """
    places = sorted(set(zip(frame["target"], frame["temperature"], strict=True)))
    targets = list(dict.fromkeys(target for target, _ in places))
    temperatures = sorted({temperature for _, temperature in places})
    fig = figure(width * len(temperatures) + legend, height * len(targets))
    grid = fig.subplots(
        len(targets), len(temperatures), squeeze=False, **{"sharey": True, **shared}
    )
    axes = {}
    for i, target in enumerate(targets):
        for j, temperature in enumerate(temperatures):
            if (target, temperature) in places:
                axes[target, temperature] = grid[i][j]
                grid[i][j].set_title(f"{target}, T={temperature:g}")
            else:
                grid[i][j].axis("off")
    return Panels(fig, axes)


def of_place(frame: Frame, place: tuple[str, float]) -> Frame:
    target, temperature = place
    return frame[(frame["target"] == target) & (frame["temperature"] == temperature)]


def system_line(axis: Axes, x: Any, y: Any, system: str) -> None:
    one = look(system)
    axis.plot(
        x,
        y,
        color=one.colour,
        marker=one.marker,
        linestyle=one.dashes,
        linewidth=one.width,
        markersize=7.5 if system == MARGINAL else 5.5,
        zorder=one.above,
        label=system,
    )


def log2_axis(axis: Axes, values: Sequence[float], label: str) -> None:
    """Doublings are equally far apart; each value that was measured is a tick."""
    ticks = sorted(set(values))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_xlabel(label)


def log_y(axis: Axes, values: Sequence[float]) -> None:
    """Plain numbers at 1, 2 and 5 of each power of ten; more of them where the range is small."""
    low, high = min(values), max(values)
    axis.set_yscale("log")
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), [n / 10 for n in range(10, 100)]):
        found = [step * 10.0**power for power in range(-4, 8) for step in steps]
        ticks = [tick for tick in found if low / 1.1 <= tick <= high * 1.1]
        if len(ticks) >= 3:
            break
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylim(low / 1.15, high * 1.15)


def legend_beside(fig: Figure, axes: Sequence[Axes], title: str | None = None) -> None:
    """One legend for all panels, to their right, in the order of tables."""
    found = handles_of(axes)
    names = sorted(found, key=system_order) if title is None else list(found)
    fig.legend([found[n] for n in names], names, loc="outside right upper", title=title)


def handles_of(axes: Sequence[Axes]) -> dict[str, Any]:
    """What a legend shows, by label."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return found
