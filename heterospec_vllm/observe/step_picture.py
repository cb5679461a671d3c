# SPDX-License-Identifier: Apache-2.0
"""The steps of `heterospec explain` as a picture: one drawn tree a step (PNG)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from heterospec_vllm.kernels import private_files
from heterospec_vllm.observe.steps import ShownNode, ShownStep

MOST_STEPS = 24
COLORS = {"accepted": "#2a7f3f", "rejected": "#c0392b", "not verified": "#9a9a9a"}


def draw_steps(
    steps: list[ShownStep],
    shown: Callable[[int], str],  # how a token is written
    path: Path,
    title: str,
) -> None:
    """Writes a PNG of the first steps: time goes right, each node with its token and survival."""
    from matplotlib.figure import Figure

    steps = steps[:MOST_STEPS]
    drawn = [_visible(step) for step in steps]
    heights = [max(2, _num_leaves(nodes)) for nodes in drawn]
    deepest = max((step.num_levels for step in steps), default=1)
    figure = Figure(figsize=(3 + 2.2 * deepest, 1 + 0.32 * sum(heights) + 0.5 * len(steps)))
    figure.suptitle(title, parse_math=False)
    rows = figure.subplots(max(len(steps), 1), 1, squeeze=False, height_ratios=heights or [1])
    for axes, step, nodes, number in zip(
        rows[:, 0], steps, drawn, range(1, 1 + len(steps)), strict=False
    ):
        _draw(axes, step, nodes, shown)
        axes.set_title(
            f"step {number}: {step.num_verified} of {step.num_drafted} nodes verified, "
            f"{step.num_accepted} accepted",
            loc="left",
            fontsize=9,
        )
    for axes in rows[:, 0]:
        axes.axis("off")
        axes.set_xlim(-0.6, deepest + 0.1)
    figure.tight_layout()
    with private_files.beside(path) as part:
        figure.savefig(part, dpi=110)


def _visible(step: ShownStep) -> list[ShownNode]:
    """Every verified node and the two best of each node's others, as the terminal shows them."""
    kept = {-1}
    nodes = []
    for node in step.nodes:
        if node.parent in kept and (node.state != "not verified" or node.rank <= 2):
            kept.add(node.column)
            nodes.append(node)
    return nodes


def _num_leaves(nodes: Iterable[ShownNode]) -> int:
    nodes = list(nodes)
    parents = {node.parent for node in nodes}
    return sum(node.column not in parents for node in nodes)


def _draw(axes: Any, step: ShownStep, nodes: list[ShownNode], shown: Callable[[int], str]) -> None:
    children: dict[int, list[ShownNode]] = {}
    for node in nodes:
        children.setdefault(node.parent, []).append(node)
    place: dict[int, tuple[int, float]] = {}
    next_leaf = 0

    def lay_out(column: int, level: int) -> float:
        """A parent stands where its first child does, so that the likeliest path is a straight line."""
        nonlocal next_leaf
        heights = [lay_out(child.column, level + 1) for child in children.get(column, [])]
        if not heights:
            heights = [float(-next_leaf)]
            next_leaf += 1
        place[column] = (level, heights[0])
        return heights[0]

    lay_out(-1, 0)
    x, y = place[-1]
    axes.text(  # left of the root, for its children's tokens begin right of it
        x - 0.05, y, shown(step.root), ha="right", va="center", fontsize=8, fontweight="bold", parse_math=False
    )  # fmt: skip
    for node in nodes:
        (x0, y0), (x, y) = place[node.parent], place[node.column]
        color = COLORS[node.state]
        axes.plot(
            [x0, x0 + 0.15, x],
            [y0, y, y],
            color=color,
            linewidth=1.8 if node.state == "accepted" else 0.8,
        )
        axes.text(
            x0 + 0.18,
            y,
            f"{shown(node.token)} {node.survival:.2f}",
            color=color,
            va="bottom",
            fontsize=8,
        )
    axes.set_ylim(0.8 - max(next_leaf, 1), 0.8)
