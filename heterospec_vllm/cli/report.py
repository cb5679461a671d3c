# SPDX-License-Identifier: Apache-2.0
"""`heterospec report`: one page of tables and plots from the rows of `heterospec bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from heterospec_vllm.cli.extras import require_extra


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Results of `heterospec bench`.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page and its plots are written here. [required, but for `--readme`]"
        ),
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "heterospec benchmark",
    readme: Annotated[
        bool,
        typer.Option(
            "--readme",
            help="Print one Markdown table of processors and requests at once, as the README has "
            "it, and write nothing; of several runs on a machine name the older ones first.",
        ),
    ] = False,
) -> None:
    """Turn result folders into OUTPUT/report.html, PNG plots and summary.md.

    The page is one file without scripts or links to a network; summary.md is its text. Where
    answers differ from plain decoding's no timing is shown; losses are listed first.
    """
    require_extra("bench", "markdown_it", "matplotlib", "pandas", "scipy", "yaml")
    from heterospec_vllm.bench.readme_table import readme_table
    from heterospec_vllm.bench.report import PAGE, write_report

    try:
        if readme:
            print(readme_table(folders))
            return
        if output is None:
            raise typer.BadParameter(
                "found nothing, allowed: a folder for the page; only `--readme` needs none",
                param_hint="--output",
            )
        write_report(folders, output, title)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    Console().print(f"report: {output / PAGE}")
