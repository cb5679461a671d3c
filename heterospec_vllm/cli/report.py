# SPDX-License-Identifier: Apache-2.0
"""`heterospec report`: one page of tables and plots from the rows of `heterospec bench`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


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
    _require_libraries()
    from heterospec_vllm.bench.report import PAGE, write_report

    try:
        write_report(folders, output, title, simulation, readme)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    Console().print(f"report: {output / PAGE}")


def _require_libraries() -> None:
    for name in ("jinja2", "matplotlib", "pandas", "scipy"):
        if find_spec(name) is None:
            raise typer.BadParameter(
                f"found no library {name}, allowed: an installation with the extra `bench` "
                "(pip install 'heterospec-vllm[bench]')"
            )
