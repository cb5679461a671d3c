# SPDX-License-Identifier: Apache-2.0
"""The generated Markdown: the README's table and the summary of every cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from heterospec_vllm.bench.page import Section
from heterospec_vllm.bench.tables import MARGINAL, PLAIN, CellSummary, Entry, mean_against, named
from heterospec_vllm.bench.words import RIVALS, compared, differ, is_offline, losses, p_value, times

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def readme_table(cells: Sequence[CellSummary], origin: str) -> str:
    """What the README shows: by concurrency, then every prompt set decoded one request at a time."""
    steady = [one for one in cells if one.cell.load == "steady"]
    parts = [origin, _by_concurrency(steady)]
    for target in dict.fromkeys(one.cell.target for one in steady):
        alone = [
            one
            for one in steady
            if (one.cell.target, one.cell.concurrency) == (target, 1) and not one.cell.temperature
        ]
        if alone:
            parts += [f"{target}, temperature 0, one request at a time, tokens a second:"]
            parts += [_by_prompt_set(alone)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _by_concurrency(cells: Sequence[CellSummary]) -> str:
    """Rows: target and temperature; columns: requests at once."""
    groups: dict[tuple[str, float], dict[int, list[CellSummary]]] = {}
    for one in cells:
        group = groups.setdefault((one.cell.target, one.cell.temperature), {})
        group.setdefault(one.cell.concurrency, []).append(one)
    sizes = sorted({size for group in groups.values() for size in group})
    if not sizes:
        return ""
    rows = [
        [target, f"{temperature:g}", *(_against_both(group.get(size, [])) for size in sizes)]
        for (target, temperature), group in groups.items()
    ]
    names = [f"{size} at once" for size in sizes]
    return (
        f"`{MARGINAL}`, the default: times plain vLLM / times the best chain (the fastest `eagle3` "
        "of each cell, chosen with hindsight). Losses are bold. Geometric means where a cell stands "
        "for several prompt sets.\n\n" + markdown_table(["target", "T", *names], rows)
    )


def _against_both(cells: Sequence[CellSummary]) -> str:
    if not cells:
        return ""
    reason = _no_timing([one.entries.get(MARGINAL) for one in cells])
    if reason:
        return reason
    ratios = [mean_against(cells, MARGINAL, rival) for rival in RIVALS]
    return " / ".join(_bold(ratio) for ratio in ratios)


def _no_timing(entries: Sequence[Entry | None]) -> str:
    different = [e for e in entries if e is not None and e.status == "different"]
    if different:
        return f"answers differ ({sum(e.num_different for e in different)})"
    if any(e is not None and e.status == "failed" for e in entries):
        return "failed"
    return "" if all(e is not None for e in entries) else "not run"


def _bold(ratio: float | None) -> str:
    if ratio is None:
        return "n/a"
    return f"**{times(ratio)}**" if ratio < 1 else times(ratio)


def _by_prompt_set(cells: Sequence[CellSummary]) -> str:
    systems = [PLAIN, "best chain"]
    present = {name for one in cells for name in one.entries}
    systems += [n for n in sorted(present) if n.startswith(("ngram", "static"))]
    systems.append(MARGINAL)
    rows = []
    for one in cells:
        rows.append([one.cell.prompt_set, *(_speed_and_ratio(one, s) for s in systems)])
    means = [mean_against(cells, name, PLAIN) for name in systems[1:]]
    rows.append(["geometric mean", "", *(_bold(mean) for mean in means)])
    return markdown_table(["prompts", *systems], rows)


def _speed_and_ratio(one: CellSummary, system: str) -> str:
    name = named(one, system)
    if name is None or name not in one.entries:
        return "not run" if system != "best chain" else "n/a"
    entry = one.entries[name]
    if entry.speed is None:
        return _no_timing([entry])
    which = f" {name.removeprefix('eagle3 ')}" if system == "best chain" else ""
    if system == PLAIN:
        return f"{entry.speed:.1f}"
    pair = one.against(name, PLAIN)
    ratio = _bold(pair.ratio) if pair else "n/a"
    return f"{entry.speed:.1f} ({ratio}{',' if which else ''}{which})"


def cell_markdown(one: CellSummary) -> str:
    """One cell: a heading, a table of all systems, and in words what `marginal` lost."""
    spread = "unknown (one round)" if one.noise is None else f"{100 * one.noise:.1f} %"
    cell = one.cell
    rows = [_cell_row(one, entry) for entry in one.entries.values()]
    unit = "tok/s" if is_offline(one) else "1 / E2EL p50, 1/s"
    header = ["system", f"{unit}, median", "min..max", "x plain", "rounds won", "sign test p"]
    text = (
        f"### {cell.label}\n\n{cell.num_prompts} prompts, {cell.lengths} tokens each; plain's own "
        f"spread: {spread}.\n\n{markdown_table(header, rows)}"
    )
    found = losses([one])
    return text + (f"\n\nLoss: {found[0]}" if found else "")


def _cell_row(one: CellSummary, entry: Entry) -> list[str]:
    mark = " (best chain)" if entry.system == one.best_chain else ""
    if entry.status == "different":
        return [entry.system, differ(entry), "", "", "", ""]
    if entry.speed is None:
        return [entry.system, f"failed: {'; '.join(entry.reasons)}", "", "", "", ""]
    digits = 1 if entry.speed >= 10 else 3
    span = f"{entry.speeds.min():.{digits}f}..{entry.speeds.max():.{digits}f}"
    row = [entry.system + mark, f"{entry.speed:.{digits}f}", span]
    pair = one.against(entry.system, PLAIN)
    if entry.system == PLAIN or pair is None:
        return [*row, "" if pair else "n/a", "", ""]
    return [
        *row,
        _bold(pair.ratio),
        f"{pair.won} of {pair.won + pair.lost}",
        p_value(pair.p),
    ]


def section_markdown(section: Section) -> str:
    """A section's sentences and tables."""
    tables = [
        markdown_table(
            [" ".join(cell.lines) for cell in table.header],
            [[" ".join(cell.lines) for cell in row] for row in table.rows],
        )
        for table in section.tables
    ]
    return "\n\n".join([f"## {section.title}", *section.sentences, *tables])


def summary_markdown(
    title: str,
    sentences: Sequence[str],
    cells: Sequence[CellSummary],
    sections: Sequence[Section] = (),  # what the cells do not tell
) -> str:
    """Every cell as a table, the losses first."""
    parts = [f"# {title}"]
    if cells:
        lost = losses(cells)
        if not lost and any(compared(cells, rival) for rival in RIVALS):
            lost = [f"None: `{MARGINAL}` is nowhere slower than plain or the best chain."]
        elif not lost:
            lost = [f"Unknown: no cell has a timing of `{MARGINAL}` and of plain or a best chain."]
        parts += [
            "\n".join(f"* {sentence}" for sentence in sentences),
            "## Losses of `marginal`",
            "\n".join(f"* {text}" for text in lost),
            "## All cells",
            *(cell_markdown(one) for one in cells),
        ]
    parts += [section_markdown(section) for section in sections]
    return "\n\n".join(parts) + "\n"


def check_markers(path: Path) -> None:
    """ValueError that names the file unless it holds the two markers once, in order."""
    if not path.is_file():
        raise ValueError(f"found no file {path}, allowed: a Markdown file with {BEGIN} and {END}")
    text = path.read_text(encoding="utf-8")
    once = text.count(BEGIN) == 1 and text.count(END) == 1
    if not once or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: found not exactly one pair of markers {BEGIN} and {END}")


def into_readme(path: Path, text: str) -> None:
    """Replaces what lies between the two markers."""
    check_markers(path)
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{text.strip()}\n{END}{after}", encoding="utf-8")
