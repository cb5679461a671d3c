# SPDX-License-Identifier: Apache-2.0
"""`heterospec explain --png`: what is drawn of a step, and where."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from heterospec_vllm.observe import step_picture
from heterospec_vllm.observe.steps import ShownNode, ShownStep

# column: (parent, rank, state); 4 and 5 are dim, and 5 is too far down its parent's list to be drawn
TREE = {
    0: (-1, 1, "accepted"),
    1: (-1, 2, "rejected"),
    2: (0, 1, "accepted"),
    3: (0, 2, "rejected"),
    4: (1, 1, "not verified"),
    5: (1, 3, "not verified"),
    6: (5, 1, "not verified"),
}


def _step(tree=TREE) -> ShownStep:
    nodes = [
        ShownNode(column, parent, 100 + column, 0.5, 1.0, 0, rank, state, "")
        for column, (parent, rank, state) in tree.items()
    ]
    return ShownStep(7, nodes, len(nodes), 4, 2, 3, 50.0, 0.001)


def test_a_picture_is_written(tmp_path: Path) -> None:
    path = tmp_path / "steps.png"
    # A dollar sign would start a formula.
    step_picture.draw_steps([_step(), _step({})], lambda token: f"'${token}'", path, "why $5?")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize("count", [0, step_picture.MOST_STEPS + 3])
def test_no_step_and_too_many(tmp_path: Path, count: int) -> None:
    path = tmp_path / "steps.png"
    step_picture.draw_steps([_step()] * count, str, path, "title")
    assert path.stat().st_size > 1000


def test_what_is_drawn_and_in_which_colour() -> None:
    axes = Figure().subplots()
    step = _step()
    step_picture._draw(axes, step, step_picture._visible(step), str)
    texts = {text.get_text(): text for text in axes.texts}
    assert set(texts) == {"7", "100 0.50", "101 0.50", "102 0.50", "103 0.50", "104 0.50"}
    for token, (_, _, state) in zip(range(100, 105), TREE.values(), strict=False):
        assert texts[f"{token} 0.50"].get_color() == step_picture.COLORS[state]
    # The likeliest path is a straight line; siblings stand below each other.
    height = {name.split()[0]: text.get_position()[1] for name, text in texts.items()}
    assert height["7"] == height["100"] == height["102"] > height["103"] > height["101"]
    assert height["101"] == height["104"]
