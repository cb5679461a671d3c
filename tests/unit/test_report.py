# SPDX-License-Identifier: Apache-2.0
"""The report: statistics against values worked out by hand, what must not be shown, and a whole page."""

import json
import math
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pandas as pd
import pytest
from report_rows import everything, make_row, simulation, write
from typer.testing import CliRunner

from heterospec_vllm.bench import details, markdown, plots, words
from heterospec_vllm.bench.report import load_simulation, write_report
from heterospec_vllm.bench.rows import PROMPTS, Gate, Prompt, Row
from heterospec_vllm.bench.sections import NEEDS, Material, headlines
from heterospec_vllm.bench.tables import (
    load,
    mean_against,
    sign_test,
    speedups,
    summarise,
    verdict,
    worst_gates,
)
from heterospec_vllm.cli.main import app

README = "# x\n\nbefore\n\n<!-- bench:begin -->\nold\n<!-- bench:end -->\n\nafter\n"


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
    (cell,) = summarise(loaded(tmp_path, rows).rows)
    return cell


def test_ratio_spread_and_sign_test_of_a_cell(tmp_path: Path) -> None:
    rows = rows_of({"plain": [10.0, 11.0, 12.0], "marginal": [15.0, 22.0, 12.0]})
    cell = one_cell(tmp_path, rows)
    pair = cell.against("marginal", "plain")
    assert pair is not None
    assert pair.ratio == pytest.approx(15 / 11)  # medians, not the median of ratios (1.5)
    assert (pair.low, pair.high) == pytest.approx((1.0, 2.0))
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
    assert cell.better == "eagle3 tuned"
    slow = one_cell(tmp_path / "slow", rows_of({"plain": [10.0], "eagle3 k=1": [9.0]}))
    assert (slow.best_chain, slow.better) == ("eagle3 k=1", "plain")


def test_engines_of_different_groups_are_compared_through_plain(tmp_path: Path) -> None:
    # The second group ran on a machine twice as fast: 30 is the slower system there.
    first = rows_of({"plain": [10.0, 10.0], "marginal": [20.0, 20.0]}, group=1)
    second = rows_of({"plain": [20.0, 20.0], "eagle3 k=1": [30.0, 30.0]}, group=2)
    cell = one_cell(tmp_path, first + second)
    pair = cell.against("marginal", cell.best_chain)
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
    cells = summarise(loaded(tmp_path, rows).rows)
    table = speedups(cells).set_index("system")
    assert table.loc["marginal", "ratio"] == pytest.approx((3.0 * 1.5) ** 0.5)
    assert table.loc["marginal", "low"] == pytest.approx(2.0)  # sqrt(4 * 1) and sqrt(2 * 2)
    assert table.loc["marginal", "high"] == pytest.approx(2.0)
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
        "seconds_off": 0.25,
    }
    theirs = {"num_drafts": 50, "num_draft_tokens": 100, "num_accepted_tokens": 50}
    rows = [
        make_row(10.0, "plain"),
        make_row(20.0, "marginal", counters=ours),
        make_row(20.0, "eagle3 k=2", counters=theirs),
    ]
    table = details.step_counters(loaded(tmp_path, rows).rows).set_index("system")
    marginal = table.loc["marginal"]
    assert marginal["tokens_per_step"] == pytest.approx(2.5)  # 100 tokens, 40 steps of requests
    assert marginal["nodes"] == pytest.approx(3.0)
    assert marginal["batch_nodes"] == pytest.approx(6.0)
    assert marginal["levels"] == pytest.approx(2.5)
    assert marginal["ms_target"] == pytest.approx(40.0)
    assert marginal["off"] == pytest.approx(0.25)
    assert table.loc["eagle3 k=2", "tokens_per_step"] == pytest.approx(2.0)
    assert table.loc["eagle3 k=2", "nodes"] == pytest.approx(2.0)
    assert "plain" not in table.index


def test_entropy_splits_prompts_at_the_median(tmp_path: Path) -> None:
    seconds = {"plain": [4.0, 4.0, 4.0, 4.0], "marginal": [1.0, 4.0, 2.0, 8.0]}
    rows = [make_row(10.0, name, request_seconds=each) for name, each in seconds.items()]
    prompts = [
        Prompt(target="target", prompt_set="mix", index=i, num_tokens=5, entropy=entropy)
        for i, entropy in enumerate((0.1, 0.3, 0.2, 0.4))
    ]
    folder = write(write(tmp_path, rows), prompts, PROMPTS)
    results = load([folder])
    halves = details.entropy_halves(details.by_entropy(results.rows, results.prompts))
    (row,) = halves.to_dict("records")
    assert row["low"] == pytest.approx((4.0 * 2.0) ** 0.5)
    assert row["high"] == pytest.approx((1.0 * 0.5) ** 0.5)
    assert (row["num_low"], row["num_high"]) == (2, 2)


def test_no_panel_cuts_points_off() -> None:
    frame = pd.DataFrame({"target": ["a", "b"], "ratio": [1.2, 3.4], "entropy": [0.5, 0.6]})
    frame = frame.assign(temperature=0.0, system="marginal", prompt_set="mix")
    assert all(axis.get_ylim()[1] > 3.4 for axis in plots.entropy_scatter(frame).axes)


def test_growth_parts_are_disjoint_and_add_up(tmp_path: Path) -> None:
    points = pd.DataFrame(
        {
            "spans_ms": [
                {
                    "execute_model": 12.0, "target forward": 10.0, "tree attention": 1.0,
                    "sample_tokens": 8.0, "walk": 1.0, "draft": 6.0, "draft: true tokens": 2.0,
                    "draft: levels": 3.0, "head forward": 4.0,
                }
            ],
            "ms_per_step": [22.0],
        }
    )  # fmt: skip
    (parts,) = details.growth_parts(points).to_dict("records")
    assert parts == pytest.approx(
        {
            "target forward": 9.0,
            "tree attention": 1.0,
            "trees in and out": 1.0,
            "head over true tokens": 2.0,
            "head, levels": 3.0,
            "choosing and cutting": 1.0,
            "vLLM's own work": 5.0,
        }
    )


def test_simulated_policies_meet_measured_ones_by_name_and_batch(tmp_path: Path) -> None:
    speeds = {"plain": [10.0], "static nodes=6 depth=2 top=4": [15.0]}
    rows = rows_of(speeds) + rows_of(speeds, temperature=1.0)
    measured = speedups(summarise(loaded(tmp_path, rows).rows))
    result = {"1": {"static 6 nodes, depth 2, top 4": _outcome(0.7), "oracle": _outcome(1.0)}}
    table = details.simulated(result, measured).set_index("policy")
    assert table.loc["static nodes=6 depth=2 top=4", "measured"] == pytest.approx(1.5)
    assert math.isnan(table.loc["oracle", "measured"])
    assert len(table) == 2


def _outcome(share: float) -> dict[str, float]:
    return {"share_of_oracle": share, "ratio_to_plain": 2 * share}


def test_a_round_run_again_counts_once(tmp_path: Path) -> None:
    rows = [
        make_row(10.0, "plain", 0, group=1),
        make_row(None, "marginal", 0, group=1, status="failed", reason="died"),
        make_row(30.0, "plain", 0, group=2),
        make_row(60.0, "marginal", 0, group=2),
    ]
    results = loaded(tmp_path, rows)
    assert results.superseded == 1
    (cell,) = summarise(results.rows)
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
    results = loaded(tmp_path, rows)
    assert len(worst_gates(results.rows)) == 2
    sentence = words.gates(results.rows, 0)
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
    for name in ("report.html", "summary.md", "table.md"):
        text = re.sub(r"data:image/png;base64,[^\"]+", "", (out / name).read_text())
        assert "answers differ (2)" in text, name
        assert not re.search(r"4321|6543|432\.\d+x|654\.\d+x", text), name
    (cell,) = summarise(load([tmp_path / "results"]).rows)
    assert cell.against("marginal", "plain") is None
    assert cell.entries["marginal"].speed is None


def test_failures_are_told_with_their_reasons(tmp_path: Path) -> None:
    rows = rows_of({"plain": [10.0, 10.0], "paper": [12.0]})
    rows.append(make_row(None, "paper", 1, status="failed", reason="out of patience"))
    rows.append(make_row(None, "marginal", 0, status="failed", reason="died: out of memory"))
    section = headlines(Material(loaded(tmp_path, rows), None))
    assert any("has no timing in 1 of 1 cell" in s and "1 failed" in s for s in section.sentences)
    failed = [line for line in section.bullets if line.startswith("Failed: ")]
    assert any("marginal: died: out of memory" in line for line in failed)
    assert any("paper (in some rounds; 1 are timed): out of patience" in line for line in failed)


def test_losses_are_said_in_words(tmp_path: Path) -> None:
    rows = rows_of({"plain": [10.0, 10.0], "eagle3 k=1": [8.0, 8.0], "marginal": [9.0, 9.0]})
    cells = summarise(loaded(tmp_path, rows).rows)
    (sentence,) = words.losses(cells)
    assert "marginal at 9.0 tok/s is 0.90x of plain, 10.0 tok/s (beyond plain's own" in sentence
    assert "best chain" not in sentence
    text = " ".join(words.headlines(loaded(tmp_path, []).rows, cells))
    assert "Worst loss against plain: 0.90x" in text
    assert "No cell is a loss against best chain; the lowest is 1.12x" in text
    assert "at least 0.98x in 0 of 1 cell;" in text
    table = markdown.readme_table(cells, "here.")
    assert "| target | 0 | **0.90x** / 1.12x |" in table


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

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_whole_page(tmp_path: Path) -> None:
    folder = everything(tmp_path / "results", sizes=(1, 32, 64), sets=("mt_bench", "sum"))
    (folder / "spec.yaml").write_text("warmup_tokens: 16\nprompts: <b>\n")
    (tmp_path / "sim.json").write_text(json.dumps(simulation()))
    (tmp_path / "README.md").write_text(README)
    out = tmp_path / "out"
    arguments = ["report", str(folder), "--output", str(out), "--title", "A & B"]
    arguments += ["--simulation", str(tmp_path / "sim.json")]
    arguments += ["--readme", str(tmp_path / "README.md")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    text = (out / "report.html").read_text()
    page = Page(text)
    images = [attributes["src"] or "" for tag, attributes in page.seen if tag == "img"]
    assert len(images) == len(list(out.glob("*.png"))) == 14
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.seen}
    assert "http" not in re.sub(r"base64,[^\"]+", "", text)
    for title in ("In words", *NEEDS, "How it was made"):
        assert f">{title}</h2>" in text
    assert "Not in this report" not in text
    assert "<title>A &amp; B</title>" in text and "prompts: &lt;b&gt;" in text
    assert "decodes 16 tokens a request, untimed" in text
    assert "failed: died: out of KV cache (made up)" in text and "answers differ (2)" in text
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("# x\n\nbefore\n\n<!-- bench:begin -->\n")
    assert readme.endswith("\n<!-- bench:end -->\n\nafter\n") and "\nold\n" not in readme
    assert "(out/speedup.png)" in readme
    assert (out / "table.md").read_text().strip() in readme


def test_sections_without_rows_say_what_to_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "results", rows_of({"plain": [10.0], "marginal": [12.0]}))
    out = tmp_path / "out"
    write_report([folder], out, "title")
    assert [path.name for path in out.glob("*.png")] == ["speedup.png"]
    text = (out / "report.html").read_text()
    for title in ("Share of the oracle", "Serving", "Cost of growth", "Low and high entropy"):
        assert f">{title}</h2>" not in text
        assert f"<li>{title}: run <code>heterospec " in text


@pytest.mark.parametrize(
    "text",
    [
        "no markers\n",
        "<!-- bench:begin -->\n",
        "<!-- bench:end -->\n<!-- bench:begin -->\n",
        README + README,
    ],
)
def test_a_readme_without_its_markers_is_named_and_left_alone(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "results", rows_of({"plain": [10.0]}))
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md: found not exactly one pair of markers"):
        write_report([folder], tmp_path / "out", "title", readme=readme)
    assert readme.read_text() == text
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no rows\.jsonl and no growth\.jsonl in"):
        load([tmp_path])
    (tmp_path / "rows.jsonl").write_text('{"system": "plain"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl: cell: Field required"):
        load([tmp_path])
    (tmp_path / "sim.json").write_text('{"1": {"plain": {}}}')
    with pytest.raises(ValueError, match=r"sim\.json: not the output of"):
        load_simulation(tmp_path / "sim.json")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "none"), "--output", "x"])
    assert result.exit_code == 2


def test_the_template_is_packaged() -> None:
    assert files("heterospec_vllm.bench").joinpath("report.html.j2").is_file()
    assert "bench/*.j2" in (Path(__file__).parents[2] / "setup.py").read_text()
