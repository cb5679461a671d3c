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
    output: Annotated[Path, typer.Option(help="The page and its plots are written here.")],
    simulation: Annotated[
        Path | None, typer.Option(help="JSON of `heterospec simulate --json`.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "heterospec benchmark",
    readme: Annotated[
        Path | None,
        typer.Option(
            help="Replace what lies between `<!-- bench:begin -->` and `<!-- bench:end -->` of "
            "this file with the table and the plot."
        ),
    ] = None,
) -> None:
    """Turn result folders into OUTPUT/report.html, PNG plots, table.md and summary.md.

    The page is one file without scripts or links to a network. Where answers differ from plain
    decoding's no timing is shown; losses are listed first.
    """
    require_extra("bench", "jinja2", "matplotlib", "pandas", "scipy")
    from heterospec_vllm.bench.report import PAGE, write_report

    try:
        write_report(folders, output, title, simulation, readme)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    Console().print(f"report: {output / PAGE}")
