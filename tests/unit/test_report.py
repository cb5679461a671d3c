# SPDX-License-Identifier: Apache-2.0
"""The report: statistics against values worked out by hand, what must not be shown, and a whole page."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_rows import ENVIRONMENT, everything, make_row, write
from typer.testing import CliRunner

from heterospec_vllm.bench import details, words
from heterospec_vllm.bench.report import main_table, summary_of, write_report
from heterospec_vllm.bench.rows import Gate, Row
from heterospec_vllm.bench.tables import (
    by_load,
    load,
    mean_against,
    sign_test,
    speedups,
    summarise,
    timed,
    verdict,
    worst_gates,
)
from heterospec_vllm.cli.main import app


def rows_of(speeds: dict[str, list[float]], group: int = 1, **cell) -> list[Row]:
    """A row for each speed (tokens a second) of each system, its place in the list being the round."""
    return [
        make_row(speed, system, round_, group, cell)
        for system, values in speeds.items()
        for round_, speed in enumerate(values)
    ]


def loaded(tmp_path: Path, rows: list[Row]):
    return load([write(tmp_path / "results", rows)])


def one_cell(tmp_path: Path, rows: list[Row]):
    (cell,) = summarise(loaded(tmp_path, rows))
    return cell


def test_ratio_spread_and_sign_test_of_a_cell(tmp_path: Path) -> None:
    rows = rows_of({"plain": [10.0, 11.0, 12.0], "marginal": [15.0, 22.0, 12.0]})
    cell = one_cell(tmp_path, rows)
    pair = cell.against("marginal", "plain")
    assert pair is not None
    assert pair.ratio == pytest.approx(15 / 11)  # medians, not the median of ratios (1.5)
    assert (pair.won, pair.lost, pair.p) == (2, 0, 0.5)  # a tie is left out: 2 * 0.5**2
    assert cell.noise == pytest.approx(2 / 11)


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [(3, 0, 0.25), (0, 3, 0.25), (5, 1, 14 / 64), (2, 2, 1.0), (0, 0, 1.0)],
)
def test_sign_test(won: int, lost: int, p: float) -> None:
    assert sign_test(won, lost) == pytest.approx(p)


@pytest.mark.parametrize(
    ("ratio", "noise", "expected"),
    [
        (1.11, 0.1, "win"),
        (0.89, 0.1, "loss"),
        (1.09, 0.1, "noise"),
        (0.91, 0.1, "noise"),
        (2.0, None, "noise"),  # one round says nothing
    ],
)
def test_verdict(ratio: float, noise: float | None, expected: str) -> None:
    assert verdict(ratio, noise) == expected


def test_the_best_chain_is_an_eagle3(tmp_path: Path) -> None:
    speeds = {
        "plain": [10.0],
        "eagle3 k=1": [12.0],
        "eagle3 tuned": [13.0],
        "ngram k=4": [20.0],
        "chain k=3": [21.0],
    }
    cell = one_cell(tmp_path, rows_of(speeds))
    assert cell.best_chain == "eagle3 tuned"
    assert cell.named("better") == "eagle3 tuned"
    slow = one_cell(tmp_path / "slow", rows_of({"plain": [10.0], "eagle3 k=1": [9.0]}))
    assert (slow.best_chain, slow.named("better")) == ("eagle3 k=1", "plain")


def test_engines_of_different_groups_are_compared_through_plain(tmp_path: Path) -> None:
    # The second group ran on a machine twice as fast: 30 is the slower system there.
    first = rows_of({"plain": [10.0, 10.0], "marginal": [20.0, 20.0]}, group=1)
    second = rows_of({"plain": [20.0, 20.0], "eagle3 k=1": [30.0, 30.0]}, group=2)
    cell = one_cell(tmp_path, first + second)
    pair = cell.against("marginal", "best chain")
    assert pair is not None and pair.indirect
    assert pair.ratio == pytest.approx(2.0 / 1.5)
    plain = cell.against("marginal", "plain")
    assert plain is not None and not plain.indirect
    assert plain.ratio == pytest.approx(2.0)
    assert cell.noise == 0.0  # the spread within a group


def test_the_mean_over_prompt_sets_is_geometric_and_needs_them_all(tmp_path: Path) -> None:
    rows = rows_of({"plain": [10.0, 10.0], "marginal": [40.0, 20.0]}, prompt_set="a")
    rows += rows_of(
        {"plain": [10.0, 10.0], "marginal": [10.0, 20.0], "paper": [9.0]}, prompt_set="b"
    )
    cells = summarise(loaded(tmp_path, rows))
    table = speedups(cells).set_index("system")
    assert table.loc["marginal", "ratio"] == pytest.approx((3.0 * 1.5) ** 0.5)
    assert table.loc[["paper"], "ratio"].isna().all()
    assert mean_against(cells, "marginal", "plain") == pytest.approx((3.0 * 1.5) ** 0.5)
    assert mean_against(cells, "paper", "plain") is None


def test_counters_become_means_a_step(tmp_path: Path) -> None:
    ours = {
        "steps": 20,
        "draft_steps": 10,
        "head_passes": 25,
        "verified_nodes": 120,
        "accepted_nodes": 60,
        "seconds": {"target": 0.8, "draft": 0.1, "policy": 0.04, "sample": 0.03, "rest": 0.03},
    }
    theirs = {"num_drafts": 50, "num_draft_tokens": 100, "num_accepted_tokens": 50}
    rows = [
        make_row(10.0, "plain"),
        make_row(20.0, "marginal", counters=ours),
        make_row(20.0, "eagle3 k=2", counters=theirs),
    ]
    table = details.step_counters(timed(loaded(tmp_path, rows))).set_index("system")
    marginal = table.loc["marginal"]
    assert marginal["tokens_per_step"] == pytest.approx(2.5)  # 100 tokens, 40 steps of requests
    assert marginal["nodes"] == pytest.approx(3.0)
    assert marginal["ms_target"] == pytest.approx(40.0)
    assert table.loc["eagle3 k=2", "tokens_per_step"] == pytest.approx(2.0)
    assert table.loc["eagle3 k=2", "nodes"] == pytest.approx(2.0)
    assert "plain" not in table.index


def test_a_round_run_again_counts_once(tmp_path: Path) -> None:
    rows = [
        make_row(10.0, "plain", 0, group=1),
        make_row(None, "marginal", 0, group=1, status="failed", reason="died"),
        make_row(30.0, "plain", 0, group=2),
        make_row(60.0, "marginal", 0, group=2),
    ]
    found = loaded(tmp_path, rows)
    assert len(found) == 3
    (cell,) = summarise(found)
    assert cell.entries["marginal"].status == "ok"
    pair = cell.against("marginal", "plain")
    assert pair is not None and pair.ratio == pytest.approx(2.0)


def test_answers_are_counted_once_a_cell_and_system(tmp_path: Path) -> None:
    gate = Gate(same=7, near_ties=1, different=0, largest_gap=0.2)
    rows = [
        make_row(10.0, system, round_, cell={"temperature": temperature}, gate=gate)
        for system in ("plain", "marginal", "paper")
        for round_ in range(3)
        for temperature in (0.0, 1.0)
    ]
    found = loaded(tmp_path, rows)
    assert len(worst_gates(found)) == 2
    sentence = words.gates(found)
    assert "16 (once a cell and system); 14 are the same, 2 part at a near-tie" in sentence
    assert "0.200 nats" in sentence


def test_no_timing_is_shown_where_answers_differ(tmp_path: Path) -> None:
    gate = Gate(same=6, near_ties=0, different=2, largest_gap=3.0)
    rows = rows_of({"plain": [10.0, 10.0], "marginal": [4321.5]})
    # A row that should not hold a timing does, and another round of it passed.
    rows.append(
        make_row(6543.25, "marginal", 1, status="different", reason="2 of 8", gate=gate,
                 request_seconds=[0.0123] * 4, counters=None)
    )  # fmt: skip
    out = tmp_path / "out"
    write_report([write(tmp_path / "results", rows)], out, "title")
    for name in ("report.html", "summary.md"):
        text = re.sub(r"data:image/png;base64,[^\"]+", "", (out / name).read_text())
        assert "answers differ (2)" in text, name
        assert not re.search(r"4321|6543|432\.\d+x|654\.\d+x", text), name
    (cell,) = summarise(load([tmp_path / "results"]))
    assert cell.against("marginal", "plain") is None
    assert cell.entries["marginal"].speed is None


def test_failures_are_told_with_their_reasons(tmp_path: Path) -> None:
    rows = rows_of({"plain": [10.0, 10.0], "paper": [12.0]})
    rows.append(make_row(None, "paper", 1, status="failed", reason="out of patience"))
    rows.append(make_row(None, "marginal", 0, status="failed", reason="died: out of memory"))
    text = summary_of(loaded(tmp_path, rows), "title")
    assert re.search("has no timing in 1 of 1 cell .* 1 failed", text)
    failed = [line for line in text.splitlines() if line.startswith("* Failed: ")]
    assert any("marginal: died: out of memory" in line for line in failed)
    assert any("paper (in some rounds; 1 are timed): out of patience" in line for line in failed)
    assert "| `marginal` | failed |" in text


def test_a_cell_without_plain_has_no_ratios(tmp_path: Path) -> None:
    rows = rows_of({"plain": [10.0]}) + rows_of({"marginal": [12.0]}, concurrency=4)
    table = main_table(summarise(loaded(tmp_path, rows))).splitlines()
    assert table[2] == "| `plain` | 10.0 tok/s (one round) |  |"
    assert table[3] == "| `marginal` |  | n/a |"


def test_losses_are_said_in_words(tmp_path: Path) -> None:
    rows = rows_of({"plain": [10.0, 10.0], "eagle3 k=1": [8.0, 8.0], "marginal": [9.0, 9.0]})
    cells = summarise(loaded(tmp_path, rows))
    (sentence,) = words.losses(cells)
    assert "marginal at 9.0 tok/s is 0.90x of plain, 10.0 tok/s (beyond plain's own" in sentence
    assert "best chain" not in sentence
    text = " ".join(words.headlines(cells))
    assert "Worst loss against plain: 0.90x" in text
    assert "No cell is a loss against best chain; the lowest is 1.12x" in text
    assert "at least 0.98x in 0 of 1 cell;" in text
    table = main_table(cells)
    assert "| `plain` | 10.0 tok/s (spread 0.0 %) |" in table
    assert "| `marginal` | **0.90x** / 1.12x; 0/2 |" in table


def test_a_column_is_a_load_and_a_mix_stands_for_its_sets(tmp_path: Path) -> None:
    counters = {"num_draft_tokens": 30, "num_accepted_tokens": 50}
    rows = []
    for prompt_set in ("a", "b"):
        rows += rows_of({"plain": [10.0, 10.1]}, prompt_set=prompt_set)
    for concurrency, prompt_set in ((8, "mix"), (8, "half repetitive")):
        cell = {"prompt_set": prompt_set, "concurrency": concurrency}
        rows += rows_of({"plain": [10.0, 10.1]}, **cell)
        rows.append(make_row(20.0, "eagle3 k=1", cell=cell, counters=counters))
    rows += rows_of({"plain": [10.0]}, concurrency=64, load="rising")
    cells = summarise(loaded(tmp_path, rows))
    labels = ["1 at once", "8 at once", "8 at once, half repetitive", "64 at once, rising"]
    assert list(by_load(cells)) == labels
    table = main_table(cells).splitlines()
    assert table[0] == (
        "| system | 1 at once: mean | 1 at once: a | 1 at once: b | 8 at once | "
        "8 at once, half repetitive | 64 at once, rising |"
    )
    assert table[3] == "| `eagle3 k=1` |  |  |  | 2.00x; 2.00; 1/1 | 2.00x; 2.00; 1/1 |  |"


class Page(HTMLParser):
    """Tags and attributes; raises where a tag is closed that was not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_whole_page(tmp_path: Path) -> None:
    folder = everything(tmp_path / "results", sizes=(1, 32, 64), sets=("mt_bench", "sum"))
    (folder / "spec.yaml").write_text("warmup_tokens: 16\nprompts: <b>\n")
    out = tmp_path / "out"
    arguments = ["report", str(folder), "--output", str(out), "--title", "A & B"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    text = (out / "report.html").read_text()
    page = Page(text)
    images = [attributes["src"] or "" for tag, attributes in page.seen if tag == "img"]
    assert len(images) == len(list(out.glob("*.png"))) == 3
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.seen}
    assert "http" not in re.sub(r"base64,[^\"]+", "", text)
    for title in ("Speed", "Servers", "How it was made", "Plots"):
        assert f"<h2>{title}</h2>" in text
    assert "<title>A &amp; B</title>" in text and "prompts: &lt;b&gt;" in text
    assert "died: out of KV cache (made up)" in text and "answers differ (2)" in text
    assert ENVIRONMENT.commit in text
    # The page is the summary and its plots.
    summary = (out / "summary.md").read_text()
    assert summary.count("\n| `marginal` |") == text.count("<td><code>marginal</code></td>") == 5
    assert "| TTFT P50 |" in summary


def test_rows_of_before_are_read() -> None:
    results = Path(__file__).parents[2] / "docs" / "results"
    folders = [path.parent for path in results.rglob("rows.jsonl")]
    assert len(folders) > 5
    for folder in folders:
        assert len(load([folder])), folder
    smallest = min(folders, key=lambda folder: (folder / "rows.jsonl").stat().st_size)
    assert "## How it was made" in summary_of(load([smallest]), "title")


def test_the_readme_s_table_takes_the_newest_of_each_processor(tmp_path: Path) -> None:
    speeds = {"plain": [10.0], "eagle3 k=1": [12.0]}
    old = rows_of({**speeds, "marginal": [11.0]}) + rows_of(speeds, concurrency=4)
    new = rows_of({**speeds, "marginal": [18.0]}) + rows_of(
        {"plain": [10.0], "marginal": [9.0]}, concurrency=64
    )
    folders = [write(tmp_path / "old", old), write(tmp_path / "new", new)]
    for folder in folders:
        (folder / "spec.yaml").write_text("dtype: float32\n")
    result = CliRunner().invoke(app, ["report", *map(str, folders), "--readme"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "| processor | target | dtype | 1 at once | 4 at once | 16 at once | 64 at once |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| made up, 2 cores seen | target | float32 | 1.80x (1.50x) |  |  | **0.90x** |",
    ]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no rows\.jsonl in"):
        load([tmp_path])
    (tmp_path / "rows.jsonl").write_text('{"system": "plain"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: cell: found nothing"):
        load([tmp_path])
    result = CliRunner().invoke(app, ["report", str(tmp_path / "none"), "--output", "x"])
    assert result.exit_code == 2
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 2  # no --output


def test_the_readme_shows_the_table_that_its_rows_give() -> None:
    """`make readme-table` names the folders."""
    root = Path(__file__).parents[2]
    listed = re.search(
        r"^RESULTS := \$\(addprefix (\S+),(.*?)\)$", (root / "Makefile").read_text(), re.M | re.S
    )
    assert listed is not None
    prefix, names = listed[1], listed[2].replace("\\", "").split()
    result = CliRunner().invoke(
        app, ["report", *(str(root / (prefix + n)) for n in names), "--readme"]
    )
    assert result.exit_code == 0
    shown = (root / "README.md").read_text().split("<!-- table: begin -->\n")[1]
    assert shown.split("\n<!-- table: end -->")[0] == result.stdout.strip()
