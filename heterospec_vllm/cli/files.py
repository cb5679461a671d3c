# SPDX-License-Identifier: Apache-2.0
"""Files that a command writes at its end, checked at its start: minutes of work must not end in a missing folder."""

from __future__ import annotations

from pathlib import Path

import typer


def check_output(path: Path | None, option: str, *suffixes: str) -> None:
    """Raises BadParameter naming the option where a file cannot be written or has another suffix than those allowed."""
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        allowed = " or ".join(suffixes)
        raise typer.BadParameter(
            f"found {path.name!r}, allowed: a file name that ends in {allowed}", param_hint=option
        )
    if path.is_dir():
        raise typer.BadParameter(f"found the folder {path}, allowed: a file", param_hint=option)
    if not path.parent.is_dir():
        raise typer.BadParameter(
            f"found no folder {path.parent}, allowed: a file in a folder that exists",
            param_hint=option,
        )
