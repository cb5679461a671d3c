# SPDX-License-Identifier: Apache-2.0
"""Libraries of an extra, asked for before a command works for minutes."""

from __future__ import annotations

from importlib.util import find_spec

import typer


def require_extra(extra: str, *libraries: str, option: str | None = None) -> None:
    """Raises BadParameter that says what to install; ``option`` is the one that needs it, if not the command itself."""
    for name in libraries:
        if find_spec(name) is None:
            raise typer.BadParameter(
                f"found no library {name}, allowed: an installation with the extra `{extra}` "
                f"(pip install 'heterospec-vllm[{extra}]')",
                param_hint=option,
            )
