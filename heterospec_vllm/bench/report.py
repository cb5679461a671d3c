# SPDX-License-Identifier: Apache-2.0
"""Folders of benchmark rows to one HTML page, its plots and the generated Markdown."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heterospec_vllm.bench import markdown, sections
from heterospec_vllm.bench.page import Section, Sheet, render, text_table
from heterospec_vllm.bench.rows import SPEC, Environment
from heterospec_vllm.bench.sections import NEEDS, Material
from heterospec_vllm.bench.tables import PLAIN, CellSummary, Results, load

PAGE, TABLE, SUMMARY = "report.html", "table.md", "summary.md"
MADE = (
    sections.speedup,
    sections.all_cells,
    sections.acceptance,
    sections.step_split,
    sections.oracle,
    sections.entropy,
    sections.serving,
    sections.growth,
)
# Sections whose sentences and tables are in `summary.md` too, behind the cells.
IN_SUMMARY = ("Serving", "Cost of growth")


def write_report(
    folders: Sequence[Path],
    output: Path,
    title: str,
    simulation: Path | None = None,
    readme: Path | None = None,
) -> None:
    """Writes the page, the plots, `table.md` and `summary.md`. Raises ValueError for what cannot be read."""
    if readme is not None:
        markdown.check_markers(readme)
    simulated = None if simulation is None else load_simulation(simulation)
    material = Material(load(folders), simulated)
    output.mkdir(parents=True, exist_ok=True)
    head = sections.headlines(material)
    page = page_sections(material, head, folders, Sheet(output))
    (output / PAGE).write_text(render(title, page), encoding="utf-8")
    table = markdown.readme_table(material.cells, origin(material))
    (output / TABLE).write_text(table, encoding="utf-8")
    sentences = [*head.sentences, *(b for b in head.bullets if not b.startswith("Loss: "))]
    everything = [*material.cells, *material.served]
    more = [section for section in page if section.title in IN_SUMMARY]
    (output / SUMMARY).write_text(
        markdown.summary_markdown(title, sentences, everything, more), encoding="utf-8"
    )
    if readme is not None:
        markdown.into_readme(readme, table + _plot_reference(output, readme))


def page_sections(
    material: Material, head: Section, folders: Sequence[Path], sheet: Sheet
) -> list[Section]:
    """In the order of the page; what is missing is named at the end."""
    made = [section for make in MADE if (section := make(material, sheet)) is not None]
    page = [head, *made, how_it_was_made(material, folders)]
    titles = {section.title for section in made}
    missing = [f"{title}: run {what}." for title, what in NEEDS.items() if title not in titles]
    if missing:
        page.append(Section("Not in this report", bullets=missing))
    return page


def load_simulation(path: Path) -> dict[str, Any]:
    """Raises ValueError that names the file and what is wrong with it."""
    wanted = "the output of `heterospec simulate --json`"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for policies in found.values():
            for values in policies.values():
                float(values["share_of_oracle"]), float(values["ratio_to_plain"])
        for batch in found:
            int(batch)
    except OSError as error:
        raise ValueError(f"found no file {path}, allowed: {wanted}") from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not {wanted} ({error})") from error
    return found


def how_it_was_made(material: Material, folders: Sequence[Path]) -> Section:
    """Commits, versions, machine, threads and commands, with the specs as they ran."""
    results = material.results
    section = Section("How it was made")
    rounds = _rounds([*material.cells, *material.served])
    if rounds:
        section.sentences.append(
            f"Timed rounds of a system in a cell: {rounds}. Every round is a row; ratios are of medians over the "
            "rounds of engines that were loaded together, plain decoding always among them."
        )
    if results.superseded:
        section.sentences.append(
            f"{results.superseded} rows were replaced by a later row of the same round and do not count."
        )
    section.sentences += [warm_up for folder in folders if (warm_up := _warm_up(folder / SPEC))]
    rows = [_environment_row(env, count) for env, count in environments(results).items()]
    if rows:
        section.tables.append(
            text_table("Environments", list(rows[0]), [list(r.values()) for r in rows])
        )
    for folder in folders:
        if (folder / SPEC).is_file():
            section.folded[str(folder / SPEC)] = (folder / SPEC).read_text(encoding="utf-8")
    return section


def environments(results: Results) -> dict[str, int]:
    """Number of rows of each environment, as its JSON."""
    found = [*results.rows["environment"], *results.growth["environment"]]
    return dict(Counter(one.model_dump_json() for one in found))


def _environment_row(environment: str, count: int) -> dict[str, str]:
    """Every field that the environment has, by its name."""
    fields = json.loads(environment)
    shown = {
        name: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return {"rows": str(count), **{name: str(value) for name, value in shown.items()}}


def _warm_up(spec: Path) -> str | None:
    import yaml

    if not spec.is_file():
        return None
    found = yaml.safe_load(spec.read_text(encoding="utf-8"))
    tokens = found.get("warmup_tokens") if isinstance(found, dict) else None
    if tokens is None:
        return None
    return f"{spec.parent}: before its first round in a cell each system decodes {tokens} tokens a request, untimed."


def _rounds(cells: Sequence[CellSummary]) -> str:
    """How many were timed, without plain's, which runs beside every group of engines."""
    entries = [e for one in cells for e in one.entries.values() if e.system != PLAIN]
    counts = sorted({len(e.speeds) for e in entries if len(e.speeds)})
    return (
        "" if not counts else " to ".join(str(n) for n in dict.fromkeys(counts[:1] + counts[-1:]))
    )


def origin(material: Material) -> str:
    """One sentence under the README's table: where and with what, if all rows agree on it."""
    found = [Environment.model_validate_json(one) for one in environments(material.results)]
    rounds = _rounds(material.cells)
    parts = [
        ", ".join(sorted({env.machine for env in found})),
        ", ".join(
            sorted({f"vLLM {env.versions['vllm']}" for env in found if "vllm" in env.versions})
        ),
        "commit " + ", ".join(sorted({env.commit for env in found})) if found else "",
        f"medians over interleaved rounds ({rounds} a cell)" if rounds else "",
    ]
    return "; ".join(filter(None, parts)) + "."


def _plot_reference(output: Path, readme: Path) -> str:
    """A plot and links, relative to the README; nothing where no plot was drawn."""
    base = readme.resolve().parent
    place = Path(os.path.relpath(output.resolve(), base)).as_posix()
    links = f"All cells, losses included: [{SUMMARY}]({place}/{SUMMARY})."
    if not (output / "speedup.png").is_file():
        return f"\n{links}\n"
    return f"\n![Speed-up over plain decoding]({place}/speedup.png)\n\n{links}\n"
