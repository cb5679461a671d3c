# SPDX-License-Identifier: Apache-2.0
"""What a page is made of: sections of sentences, plots and tables. Knows nothing of benchmarks."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from matplotlib.figure import Figure

from heterospec_vllm.bench.style import save

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class TableCell:
    """Lines of text, the first one emphasised; kind: win, loss, noise, bad, name or nothing."""

    lines: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    caption: str
    header: tuple[TableCell, ...]
    rows: tuple[tuple[TableCell, ...], ...]


@dataclass(frozen=True)
class Plot:
    """A PNG: a file beside the page, and its bytes inside it."""

    name: str
    caption: str
    uri: str


@dataclass
class Section:
    """Sentences may hold `code` in backticks."""

    title: str
    sentences: list[str] = field(default_factory=list)
    bullets: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: dict[str, str] = field(default_factory=dict)  # long text by title

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z]+", "-", self.title.lower()).strip("-")


@dataclass
class Sheet:
    """Draws plots into a folder."""

    folder: Path

    def plot(self, name: str, caption: str, draw: Callable[[], Figure]) -> Plot:
        path = self.folder / f"{name}.png"
        save(draw, path)
        data = base64.b64encode(path.read_bytes()).decode()
        return Plot(path.name, caption, f"data:image/png;base64,{data}")


def text_table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The first column names the row."""
    return Table(
        caption,
        tuple(TableCell((name,)) for name in header),
        tuple(
            tuple(TableCell((text,), "name" if i == 0 else "") for i, text in enumerate(row))
            for row in rows
        ),
    )


def render(title: str, sections: Sequence[Section]) -> str:
    """One self-contained HTML page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    def code(text: str) -> Markup:
        return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["code"] = code
    source = files("heterospec_vllm.bench").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(title=title, sections=sections)
