# SPDX-License-Identifier: Apache-2.0
"""A list of sizes on the command line."""

import typer


def sizes_of(text: str, option: str) -> list[int]:
    """Positive integers, comma-separated; ``option`` is named where they are not."""
    sizes = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if not sizes or min(sizes) < 1 or len(sizes) != len(text.split(",")):
        raise typer.BadParameter(
            f"found '{text}', allowed: positive integers, comma-separated", param_hint=option
        )
    return sizes
