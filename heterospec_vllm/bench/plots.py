# SPDX-License-Identifier: Apache-2.0
"""The plots of what offline cells measured. Each function takes a frame with rows and returns a figure."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from heterospec_vllm.bench.style import (
    MARKERS,
    PART_COLOURS,
    SET_COLOURS,
    figure,
    handles_of,
    legend_beside,
    log2_axis,
    log_y,
    look,
    of_place,
    panels,
    system_line,
)
from heterospec_vllm.bench.tables import MARGINAL, PLAIN, Frame, system_order
from heterospec_vllm.observe.counters import STEP_PARTS

AT_ONCE = "requests at once"
SPLIT_COLUMNS = 5  # of a page's width


def speedup(frame: Frame) -> Figure:
    """Ratio to plain against concurrency, bars from the least to the greatest round for `marginal`."""
    grid = panels(frame, width=5.2, height=4.2)
    for place, axis in grid.axes.items():
        part = of_place(frame, place)
        axis.axhline(1.0, color="black", linewidth=1.4, zorder=3)
        for system in _systems(part):
            if system != PLAIN:
                _ratio_line(axis, part[part["system"] == system], system)
        log2_axis(axis, part["concurrency"], AT_ONCE)
        axis.set_ylabel("times plain decoding")
        axis.set_ylim(0, 1.06 * max(1.0, frame["high"].max(), frame["ratio"].max()))
    legend_beside(grid.figure, list(grid.axes.values()))
    return grid.figure


def _ratio_line(axis: Axes, line: Frame, system: str) -> None:
    line = line[line["ratio"].notna()].sort_values("concurrency")
    if line.empty:
        return
    system_line(axis, line["concurrency"], line["ratio"], system)
    if system == MARGINAL:
        below, above = line["ratio"] - line["low"], line["high"] - line["ratio"]
        axis.errorbar(
            line["concurrency"],
            line["ratio"],
            # The mean of medians may lie outside the means of rounds by a hair.
            yerr=[below.clip(lower=0), above.clip(lower=0)],
            fmt="none",
            ecolor=look(system).colour,
            elinewidth=1.6,
            capsize=5,
            zorder=look(system).above,
        )


def counters(frame: Frame) -> Figure:
    """Tokens a step, draft nodes a step and head passes a drafting step; a row a target and temperature."""
    places = sorted(set(zip(frame["target"], frame["temperature"], strict=True)))
    fig = figure(14.0, 3.4 * len(places))
    grid = fig.subplots(len(places), 3, squeeze=False)
    columns = {
        "tokens_per_step": "tokens a step and request",
        "nodes": "draft nodes a step and request",
        "levels": "head passes a drafting step",
    }
    for row, place in zip(grid, places, strict=True):
        part = of_place(frame, place)
        for axis, (column, label) in zip(row, columns.items(), strict=True):
            for system in _systems(part):
                line = part[(part["system"] == system) & part[column].notna()]
                if len(line) and not (system == "off" and column == "nodes"):
                    line = line.sort_values("concurrency")
                    system_line(axis, line["concurrency"], line[column], system)
            axis.set_title(f"{place[0]}, T={place[1]:g}")
            axis.set_ylabel(label)
            most = part[column].max()
            least = 1.0 if column == "tokens_per_step" else 0.0
            axis.set_ylim(least - 0.03, most + 0.06 * (most - least) if most > least else None)
            log2_axis(axis, part["concurrency"], AT_ONCE)
    legend_beside(fig, list(grid.flat))
    return fig


def step_split(frame: Frame, place: tuple[str, float]) -> Figure:
    """Milliseconds of a step by part (above) and their shares (below); a column a system."""
    part = of_place(frame, place)
    systems = _systems(part)
    columns = min(len(systems), SPLIT_COLUMNS)
    lines = -(-len(systems) // columns)
    fig = figure(2.4 * columns + 1.5, 6.0 * lines)
    grid = fig.subplots(2 * lines, columns, squeeze=False)
    parts = [f"ms_{name}" for name in STEP_PARTS]
    sizes = sorted(set(part["concurrency"]))  # every system has a place for each
    names = [f"{size:g}" for size in sizes]
    highest = part[parts].sum(axis=1).max()
    for number in range(lines * columns):
        above, below = (grid[2 * (number // columns) + i][number % columns] for i in (0, 1))
        if number >= len(systems):
            above.axis("off")
            below.axis("off")
            continue
        of = part[part["system"] == systems[number]].set_index("concurrency").reindex(sizes)
        _stack(above, names, of[parts], STEP_PARTS)
        _stack(below, names, of[parts].div(of[parts].sum(axis=1), axis=0) * 100, STEP_PARTS)
        above.set_ylim(0, 1.03 * highest)
        below.set_ylim(0, 100)
        above.set_title(_broken(systems[number]), fontsize=9.5)
        for axis, label in ((above, "milliseconds a step"), (below, "share of a step, %")):
            axis.set_xticks(range(len(sizes)), names)
            axis.set_xlim(-0.6, len(sizes) - 0.4)  # bars of NaN leave no room
            axis.set_xlabel(AT_ONCE)
            if number % columns == 0:
                axis.set_ylabel(label)
            else:
                axis.tick_params(labelleft=False)
    _part_legend(fig, grid[0][0])
    fig.suptitle(f"{place[0]}, T={place[1]:g}", fontweight="bold")
    return fig


def _stack(axis: Axes, names: list[str], values: Frame, parts: tuple[str, ...]) -> None:
    bottom = None
    for column, part, colour in zip(values.columns, parts, PART_COLOURS, strict=False):
        heights = values[column].to_numpy()
        axis.bar(names, heights, bottom=bottom, color=colour, label=part, width=0.75)
        bottom = heights if bottom is None else bottom + heights
    axis.grid(axis="x", visible=False)


def _part_legend(fig: Figure, axis: Axes) -> None:
    """In the order in which the parts are stacked."""
    handles, labels = axis.get_legend_handles_labels()
    fig.legend(handles[::-1], labels[::-1], loc="outside right upper")


def oracle(frame: Frame) -> Figure:
    """The simulated share of the oracle's speed by batch."""
    fig = figure(8.2, 4.4)
    axis = fig.subplots()
    each = frame.drop_duplicates(["batch", "policy"])
    for policy in sorted(set(each["policy"]) - {"oracle"}, key=system_order):
        line = each[each["policy"] == policy].sort_values("batch")
        system_line(axis, line["batch"], 100 * line["share"], policy)
    axis.axhline(100, color="black", linewidth=1.4)
    axis.set_ylabel("speed as a share of the oracle's, %")
    axis.set_ylim(0, 105)
    log2_axis(axis, each["batch"], AT_ONCE)
    legend_beside(fig, [axis])
    return fig


def simulated(frame: Frame) -> Figure:
    """Simulated against measured ratios, a panel a batch; one filled point a target."""
    known = frame[frame["measured"].notna() & (frame["policy"] != PLAIN)]
    policies = sorted(known["policy"].unique(), key=system_order)[::-1]
    batches = sorted(known["batch"].unique())
    fig = figure(2.2 + 3.7 * len(batches), 1.5 + 0.42 * len(policies))
    axes = fig.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    for axis, batch in zip(axes, batches, strict=True):
        axis.axvline(1.0, color="black", linewidth=1.4)
        for y, policy in enumerate(policies):
            points = known[(known["batch"] == batch) & (known["policy"] == policy)]
            colour, rows = look(policy).colour, [y] * len(points)
            axis.plot(points["measured"], rows, "o", color=colour, markersize=8)
            axis.plot(points["simulated"], rows, "|", color="black", markersize=17, mew=2.6)
        axis.set_yticks(range(len(policies)), policies)
        axis.set_ylim(-0.6, len(policies) - 0.4)
        axis.set_title(f"{batch} at once")
        axis.set_xlabel("times plain decoding")
    return fig


def entropy_halves(frame: Frame) -> Figure:
    """Speed-up of the prompts with low (filled) and with high (open) entropy, a line a system."""
    systems = sorted(frame["system"].unique(), key=system_order)[::-1]
    grid = panels(frame, height=1.2 + 0.3 * len(systems), sharex=True)
    for place, axis in grid.axes.items():
        part = of_place(frame, place).set_index("system").reindex(systems)
        axis.axvline(1.0, color="black", linewidth=1.4)
        for y, system in enumerate(systems):
            low, high = part.loc[system, "low"], part.loc[system, "high"]
            one = look(system)
            axis.plot([low, high], [y, y], color=one.colour, linewidth=one.width)
            for x, face in ((low, one.colour), (high, "white")):
                axis.plot(x, y, "o", mfc=face, mec=one.colour, mew=1.8, markersize=8)
        axis.set_yticks(range(len(systems)), systems)
        axis.set_xlabel("times plain decoding")
    return grid.figure


def entropy_scatter(frame: Frame) -> Figure:
    """`marginal`'s speed-up of every prompt against its entropy, coloured by prompt set."""
    ours = frame[frame["system"] == MARGINAL]
    grid = panels(ours)
    sets = list(dict.fromkeys(ours["prompt_set"]))
    for place, axis in grid.axes.items():
        part = of_place(ours, place)
        axis.axhline(1.0, color="black", linewidth=1.4)
        for i, name in enumerate(sets):
            points = part[part["prompt_set"] == name]
            axis.scatter(
                points["entropy"],
                points["ratio"],
                s=38,
                alpha=0.85,
                color=SET_COLOURS[i % len(SET_COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                label=name,
            )
        axis.axvline(part["entropy"].median(), color="#888888", linestyle=":", linewidth=1.2)
        axis.set_xlabel("entropy of the target, nats a token (dotted: median)")
        axis.set_ylabel("times plain decoding")
        # Panels share the axis: a limit from one of them would cut the others' points off.
        axis.set_ylim(0, 1.06 * max(1.0, ours["ratio"].max()))
    legend_beside(grid.figure, list(grid.axes.values()), title="prompts")
    return grid.figure


def serving(frame: Frame, by: str) -> Figure:
    """Latencies (ms, median above and p99 below) and throughput; `by` is `concurrency` or `request_rate`."""
    columns = {
        "ttft": "time to first token, ms",
        "tpot": "time per output token, ms",
        "itl": "between two tokens, ms",
        "e2el": "end to end, ms",
    }
    fig = figure(13.6, 9.0)
    grid = fig.subplots(3, 4)
    for j, (name, label) in enumerate(columns.items()):
        for i, which in enumerate(("p50", "p99")):
            _over_load(grid[i][j], frame, by, f"{name}_{which}", f"{label}, {which}", log=True)
    _over_load(grid[2][0], frame, by, "request_throughput", "requests a second", log=False)
    if frame["goodput"].notna().any():
        _over_load(grid[2][1], frame, by, "goodput", "goodput, requests a second", log=False)
    else:
        grid[2][1].axis("off")
    found = handles_of(list(grid.flat))
    names = sorted(found, key=system_order)
    grid[2][2].axis("off")
    grid[2][3].axis("off")
    grid[2][2].legend([found[n] for n in names], names, loc="upper left", ncols=2)
    return fig


def _over_load(axis: Axes, frame: Frame, by: str, column: str, label: str, log: bool) -> None:
    known = frame[frame[column].notna()]
    for system in _systems(known):
        line = known[known["system"] == system].sort_values(by)
        system_line(axis, line[by], line[column], system)
    log2_axis(axis, known[by], AT_ONCE if by == "concurrency" else "requests sent a second")
    axis.set_title(label, fontsize=11, fontweight="normal")
    if log:
        log_y(axis, known[column])
    else:
        axis.set_ylim(bottom=0)


def growth(points: Frame, parts: Frame) -> Figure:
    """For each target (rows) and sweep (columns): a step by part, plain's step beside it."""
    targets, sweeps = _targets_and_sweeps(points)
    fig = figure(4.6 * len(sweeps), 3.8 * len(targets) + 0.9)
    grid = fig.subplots(len(targets), len(sweeps), squeeze=False)
    for i, target in enumerate(targets):
        for j, sweep in enumerate(sweeps):
            here = _sweep(points, target, sweep)
            _growth_bars(grid[i][j], here, parts.loc[here.index])
            grid[i][j].set_title(f"{target}\n{_fixed(here, sweep)}", fontsize=10.5)
            grid[i][j].set_xlabel(SWEEPS[sweep])
        grid[i][0].set_ylabel("milliseconds a step")
    found = handles_of(list(grid.flat))
    fig.legend(found.values(), found.keys(), loc="outside lower center", ncols=4)
    return fig


SWEEPS = {
    "nodes": "draft nodes a request",
    "requests": "requests at once",
    "context": "tokens of context",
}


def _targets_and_sweeps(points: Frame) -> tuple[list[str], list[str]]:
    return sorted(points["target"].unique()), [s for s in SWEEPS if s in set(points["sweep"])]


def _sweep(points: Frame, target: str, sweep: str) -> Frame:
    chosen = points[(points["target"] == target) & (points["sweep"] == sweep)]
    return chosen.sort_values("value")


def _fixed(points: Frame, sweep: str) -> str:
    """What stays the same in a sweep."""
    units = {"nodes": "nodes", "requests": "requests", "context": "tokens of context"}
    if points.empty:
        return ""
    return ", ".join(
        f"{points[name].iloc[0]} {unit}" for name, unit in units.items() if name != sweep
    )


def _growth_bars(axis: Axes, points: Frame, parts: Frame) -> None:
    """Ours left, plain right of each value."""
    x = range(len(points))
    bottom = [0.0] * len(points)
    for column, colour in zip(parts.columns, PART_COLOURS, strict=True):
        left = [n - 0.2 for n in x]
        axis.bar(left, parts[column], bottom=bottom, width=0.38, color=colour, label=column)
        bottom = [b + value for b, value in zip(bottom, parts[column], strict=True)]
    right = [n + 0.2 for n in x]
    axis.bar(
        right,
        points["ms_plain"],
        width=0.38,
        color="white",
        edgecolor="black",
        hatch="///",
        label="plain step",
    )
    axis.set_xticks(list(x), [f"{value:g}" for value in points["value"]])
    axis.grid(axis="x", visible=False)


def attention(points: Frame) -> Figure:
    """One layer's attention: our op and vLLM's."""
    points = points[points["attention_ms"].notna()]
    targets, sweeps = _targets_and_sweeps(points)
    fig = figure(4.4 * len(sweeps) + 1.0, 3.5 * len(targets))
    grid = fig.subplots(len(targets), len(sweeps), squeeze=False)
    for i, target in enumerate(targets):
        for j, sweep in enumerate(sweeps):
            here = _sweep(points, target, sweep)
            ours, theirs = here["attention_ms"], here["vllm_attention_ms"]
            axis = grid[i][j]
            axis.plot(here["value"], ours, "o-", color=look(MARGINAL).colour, lw=2.4, label="ours")
            axis.plot(here["value"], theirs, "s--", color=look("eagle3 k=3").colour, label="vLLM's")
            axis.set_title(f"{target}\n{_fixed(here, sweep)}", fontsize=10.5)
            log2_axis(axis, here["value"], SWEEPS[sweep])
            log_y(axis, [*ours.dropna(), *theirs.dropna()])
        grid[i][0].set_ylabel("milliseconds a layer")
    legend_beside(fig, list(grid.flat))
    return fig


def _systems(frame: Frame) -> list[str]:
    return sorted(frame["system"].unique(), key=system_order)


def _broken(system: str) -> str:
    """A long name on two lines."""
    head, _, tail = system.partition(" ")
    return f"{head}\n{tail}" if len(system) > 18 else system
