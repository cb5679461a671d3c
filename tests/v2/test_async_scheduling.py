# SPDX-License-Identifier: Apache-2.0
"""Async scheduling is off with our config: it hands out placeholders, for which there is no tree, in place of drafts.

On a CPU vLLM never switches it on, so a process of its own decides as one with a GPU does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_folders import write_head, write_target

# A folder with another release's Python, which `tools/vllm_overlay.py` makes: 0.33.0 has no CPU wheel.
OVERLAY = os.environ.get("HETEROSPEC_VLLM_OVERLAY", "")


def _decisions(folder: Path, *first: str) -> dict[str, Any]:
    target, head = write_target(folder / "target"), write_head(folder / "head")
    script = Path(__file__).with_name("async_decision.py")
    path = [*first, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(script), str(target), str(head)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def _assert_off(found: dict[str, Any]) -> None:
    # vLLM was asked as on a GPU: it wants async scheduling for its own method.
    assert found["eagle3"] == [True, True]
    assert found["ours"] == found["ours, padded"] == [False, False]


def test_installed_version(tmp_path: Path) -> None:
    _assert_off(_decisions(tmp_path))


@pytest.mark.skipif(not OVERLAY, reason="HETEROSPEC_VLLM_OVERLAY: unset; `make overlay` sets it up")
def test_version_0_33(tmp_path: Path) -> None:
    found = _decisions(tmp_path, OVERLAY)
    assert found["version"].startswith("0.33.0")
    _assert_off(found)
