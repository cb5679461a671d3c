# SPDX-License-Identifier: Apache-2.0
"""Entry point of the `heterospec` command; subcommands are imported only when they run."""

import typer

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.callback()
def root() -> None:
    """Tree speculative decoding for stock vLLM: prepare, try, train, measure."""
