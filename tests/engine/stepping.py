# SPDX-License-Identifier: Apache-2.0
"""A process of `stepping_driver.py`: one engine for many plans."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import ENVIRONMENT


class SteppingEngine:
    """Starts at once and loads while the caller goes on; `play` waits for it."""

    def __init__(self, engine: dict[str, Any], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "log.txt"
        here, there = os.pipe()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    str(Path(__file__).with_name("stepping_driver.py")),
                    json.dumps(engine),
                    str(there),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
                pass_fds=[there],
                text=True,
            )
        os.close(there)
        self._answers = os.fdopen(here)

    def play(self, plan: dict[str, Any]) -> dict[str, Any]:
        """The plan's answers; where the engine died, the end of its log is the assertion's message."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(plan) + "\n")
            self._process.stdin.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        assert line, self._log.read_text()[-6000:]
        return json.loads(line)

    def close(self) -> None:
        if self._process.stdin is not None and self._process.poll() is None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
