# SPDX-License-Identifier: Apache-2.0
"""A folder with nothing but sweeps of nodes, requests and context."""

from pathlib import Path

import report_rows
from report_rows import ENVIRONMENT, write

from heterospec_vllm.bench.report import write_report


def test_growth_alone_makes_a_page(tmp_path: Path) -> None:
    folder = write(tmp_path / "results", list(report_rows.growth())[:3], report_rows.GROWTH)
    write_report([folder], tmp_path / "out", "title")
    assert (tmp_path / "out" / "growth.png").is_file()
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "## Cost of growth" in summary and "what vLLM's op takes" in summary
    assert "| sweep | nodes / requests / context |" in summary and "## All cells" not in summary
    assert ENVIRONMENT.commit in (tmp_path / "out" / "report.html").read_text()
