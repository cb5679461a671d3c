# SPDX-License-Identifier: Apache-2.0
"""What a killed server leaves of its metrics goes at the next start, and nothing else does."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from heterospec_vllm.observe.metrics_folder import metrics_folder

ROOT = Path(__file__).parents[2]

# Waits until it is killed.
SERVER = """
import time
from heterospec_vllm.observe.metrics_folder import metrics_folder

print(metrics_folder(), flush=True)
time.sleep(600)
"""


def test_file_of_a_killed_process_is_removed_at_the_next_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def started() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    (killed, left), (other, used) = started(), started()
    try:
        killed.kill()
        killed.communicate()
        another_accounts = tmp_path / "heterospec-metrics-1-other"
        another_accounts.mkdir()
        if os.geteuid() == 0:
            os.chown(another_accounts, 12345, 12345)
        link = tmp_path / "heterospec-metrics-2-link"
        link.symlink_to(ROOT)
        assert left.exists() and str(killed.pid) in str(left)
        own = metrics_folder()
        assert not left.exists() and used.exists() and own.exists() and link.exists()
        assert another_accounts.exists() == (os.geteuid() == 0)
    finally:
        other.kill()
        other.communicate()
    metrics_folder()
    assert not used.exists() and own.exists()
