# SPDX-License-Identifier: Apache-2.0
"""Relative links of the documentation lead to files of the clone."""

import re
from pathlib import Path

from heterospec_vllm.observe.reasons import REASONS

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")


def broken_links(page: Path) -> list[str]:
    found = LINK.findall(page.read_text(encoding="utf-8"))
    return [link for link in found if ":" not in link and not (page.parent / link).exists()]


def test_relative_links_resolve() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.md")]
    assert len(pages) > 20
    broken = {str(page.relative_to(ROOT)): broken_links(page) for page in pages}
    assert not {page: links for page, links in broken.items() if links}


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](page.md#part) [b](https://example.org) ![c](none.png)")
    assert broken_links(page) == ["none.png"]


def test_the_page_lists_every_reason_for_plain_decoding() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (its? [^|]+) \|$", page, re.MULTILINE))
    assert rows == REASONS
