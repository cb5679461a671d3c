# SPDX-License-Identifier: Apache-2.0
"""The whole demo as a person runs it: model, two servers, answers, comparison, nothing left."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.full]


def servers_on(ports: set[str]) -> list[str]:
    """Command lines of running servers that listen on one of these ports."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended meanwhile
            continue
        if "--port" in arguments and arguments[arguments.index("--port") + 1] in ports:
            found.append(" ".join(arguments))
    return found


def test_demo_answers_compares_and_cleans_up() -> None:
    code = "from heterospec_vllm.cli.main import app; app()"
    result = subprocess.run(
        [sys.executable, "-c", code, "demo", "--rounds", "1", "--max-tokens", "48"],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "photosynthesis" in result.stdout.lower()
    (acceptance_length,) = re.findall(r"speculating .*│\s+(\d\.\d\d) │", result.stdout)
    assert float(acceptance_length) > 1.2  # an untrained head gives 1.0
    ports = set(re.findall(r"--port (\d+)", result.stdout))
    assert len(ports) == 2
    assert servers_on(ports) == []
