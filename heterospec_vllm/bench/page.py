# SPDX-License-Identifier: Apache-2.0
"""Markdown tables, and Markdown as one HTML page with its pictures inside. Knows nothing of benchmarks."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1540px; padding: 1rem 2rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
p, li { max-width: 60rem; }
img { display: block; max-width: 100%; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: 13px; }
th, td { border: 1px solid #ddd; padding: .25rem .5rem; text-align: right; white-space: nowrap; }
th, td:first-child { background: #f6f6f6; text-align: left; }
td strong { color: #b3261e; }
code, pre { background: #f1f1f1; }
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def picture(path: Path, caption: str) -> str:
    """A PNG as text of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f"![{caption}](data:image/png;base64,{data})\n\n{caption}"


def to_html(title: str, text: str, files: Mapping[str, str]) -> str:
    """One page without scripts or links to a network; ``files``: folded texts by name."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    folded = "\n".join(
        f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(content)}</pre></details>"
        for name, content in files.items()
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n{folded}\n</body>\n</html>\n"
    )
