# SPDX-License-Identifier: Apache-2.0
"""The benchmark's spec, gate and orchestration; engines are fakes, everything else is real."""

from __future__ import annotations

import math
import stat

import pytest
import yaml
from rich.console import Console

from heterospec_vllm.bench import rows
from heterospec_vllm.bench.child import EngineFailed
from heterospec_vllm.bench.contenders import Outcome, phases, requests_of
from heterospec_vllm.bench.engines import Position
from heterospec_vllm.bench.environment import environment_of
from heterospec_vllm.bench.gate import judge
from heterospec_vllm.bench.orchestrate import Bench
from heterospec_vllm.bench.prompt_sets import PromptSets
from heterospec_vllm.bench.rows import Cell, Row
from heterospec_vllm.bench.spec import BenchSpec, load_spec, planned_cells, read_yaml
from heterospec_vllm.bench.thresholds import Thresholds
from heterospec_vllm.bench.tuned import schedule_of


class Words:
    """A tokenizer without a chat template: a token a word."""

    chat_template = None

    def encode(self, text):
        return [len(word) for word in text.split()]


def spec_of(**changes) -> BenchSpec:
    values = {
        "target": "none",
        "systems": ["plain", "eagle3 k=1", "marginal"],
        "prompts": {"ours": "builtin"},
        "cells": [{"concurrency": [1, 2], "output_len": 4}],
        "rounds": 2,
    }
    return BenchSpec.model_validate({**values, **changes})


class Fake:
    """A contender whose answers and troubles are given by the test."""

    threads = "fake"

    def __init__(self, world, key, systems):
        self.world, self.key = world, key
        self.systems = systems
        world.made.append(key)

    def begin(self):
        self.world.loading.append(self.key)
        self.world.begun_together.add(tuple(self.world.loading))

    def start(self):
        self.world.loading.remove(self.key)
        if self.key in self.world.wont_start:
            raise EngineFailed(self.world.wont_start[self.key])
        self.world.loaded.append(self.key)
        self.world.most_loaded = max(self.world.most_loaded, len(self.world.loaded))

    def warm_up(self, system, cell, prompts, tokens):
        self.world.log.append(("warm", system.name, cell.concurrency))

    def _answers(self, system, cell, prompts):
        answer = self.world.answers.get(system.name, [7, 7, 7, 7])
        return [list(answer) for _ in requests_of(cell, prompts)]

    def run(self, system, cell, prompts):
        self.world.log.append(("run", system.name, cell.concurrency))
        self.world.runs += 1
        if self.world.interrupt_at == self.world.runs:
            raise KeyboardInterrupt
        if (system.name, cell.concurrency) in self.world.dies:
            raise EngineFailed("the engine's process ended with status -9")
        answers = self._answers(system, cell, prompts)
        seconds = [0.5] * len(phases(cell)) if cell.concurrency == 1 else None
        return Outcome(2.0, sum(map(len, answers)), None, answers, seconds)

    def greedy(self, system, cell, prompts):
        self.world.log.append(("greedy", system.name, cell.concurrency))
        return self._answers(system, cell, prompts)

    def teacher_forced(self, prompts, answers):
        top = {7: math.log(0.6), 8: math.log(0.39), 9: math.log(0.01)}
        return [[Position(top) for _ in answer] for answer in answers]

    def memory(self):
        return 100

    def close(self):
        if self.key in self.world.loaded:
            self.world.loaded.remove(self.key)


class World:
    def __init__(self, tmp_path, **changes):
        self.made, self.loading, self.loaded, self.log = [], [], [], []
        self.begun_together = set()
        self.most_loaded = self.runs = 0
        self.interrupt_at = None
        self.wont_start, self.dies, self.answers = {}, set(), {}
        self.free = 10_000
        self.folder = tmp_path / "out"
        self.spec = spec_of(**changes)

    def run(self) -> int:
        cells = list(planned_cells(self.spec, "tiny"))
        prompts = PromptSets(self.spec.prompts, Words(), 1000)
        console = Console(quiet=True)
        bench = Bench(
            self.spec, cells, prompts, self.folder, environment_of(),
            lambda mode, key, systems: Fake(self, key, systems), console, lambda: self.free,
        )  # fmt: skip
        return bench.run()

    def rows(self) -> list[Row]:
        return list(rows.read(self.folder / rows.ROWS, Row))


def test_two_engines_load_together_but_plain_and_ours_load_alone(tmp_path):
    world = World(tmp_path, systems=["plain", "off", "eagle3 k=1", "eagle3 k=2", "ngram"])
    assert world.run() == 0
    assert world.begun_together == {
        ("plain",), ("eagle3 k=1",), ("eagle3 k=1", "eagle3 k=2"), ("eagle3 k=2", "ngram"), ("ours",),
    }  # fmt: skip
    assert world.loading == []


def test_systems_run_in_turns_and_every_run_is_a_row(tmp_path):
    world = World(tmp_path)
    assert world.run() == 0
    timed = [entry for entry in world.log if entry[0] == "run"]
    names = ["plain", "eagle3 k=1", "marginal"]
    assert timed == [("run", n, c) for c in (1, 2) for _ in range(2) for n in names]
    assert [(r.system, r.cell.concurrency, r.round) for r in world.rows()] == [
        (n, c, r) for c in (1, 2) for r in range(2) for n in names
    ]
    assert all(r.status == "ok" and r.tokens_per_second for r in world.rows())
    assert world.loaded == []
    assert world.rows()[0].request_seconds == [0.5]
    assert world.rows()[-1].request_seconds is None


def test_a_system_that_answers_differently_gets_no_timing(tmp_path):
    world = World(tmp_path)
    world.answers["marginal"] = [7, 9, 7, 7]
    assert world.run() == 1
    bad = [r for r in world.rows() if r.system == "marginal"]
    assert len(bad) == 4
    assert all(r.status == "different" and r.seconds is None for r in bad)
    assert bad[0].tokens_per_second is None and bad[0].gate.different == 1
    assert "1 of 1 answers differ" in bad[0].reason


def test_a_near_tie_is_excused_and_counted(tmp_path):
    world = World(tmp_path)
    world.answers["marginal"] = [7, 8, 7, 7]
    assert world.run() == 0
    gate = next(r for r in world.rows() if r.system == "marginal").gate
    assert (gate.same, gate.near_ties, gate.different) == (0, 1, 0)
    assert gate.largest_gap == pytest.approx(math.log(0.6 / 0.39), abs=1e-3)


def test_sampled_cells_are_gated_by_a_greedy_run(tmp_path):
    world = World(tmp_path, cells=[{"concurrency": [1], "temperature": [1.0], "output_len": 4}])
    world.answers["eagle3 k=1"] = [9, 9, 9, 9]
    assert world.run() == 1
    assert ("greedy", "eagle3 k=1", 1) in world.log
    status = {r.system: r.status for r in world.rows()}
    assert status == {"plain": "ok", "eagle3 k=1": "different", "marginal": "ok"}


def test_an_engine_that_does_not_start_fails_its_cells_only(tmp_path):
    world = World(tmp_path)
    world.wont_start["eagle3 k=1"] = "no such head"
    assert world.run() == 1
    failed = [r for r in world.rows() if r.status == "failed"]
    assert {r.system for r in failed} == {"eagle3 k=1"} and len(failed) == 4
    assert failed[0].reason == "no such head"
    assert sum(r.status == "ok" for r in world.rows()) == 8


def test_an_engine_that_dies_in_a_cell_comes_back_in_the_next(tmp_path):
    world = World(tmp_path)
    world.dies.add(("marginal", 1))
    assert world.run() == 1
    mine = {(r.cell.concurrency, r.status) for r in world.rows() if r.system == "marginal"}
    assert mine == {(1, "failed"), (2, "ok")}
    assert world.made.count("ours") == 2
    world.dies.clear()
    assert world.run() == 0
    ok = [(r.system, r.cell.concurrency, r.round) for r in world.rows() if r.status == "ok"]
    assert ("marginal", 1, 0) in ok and ("marginal", 1, 1) in ok


def test_without_plain_nothing_is_timed(tmp_path):
    world = World(tmp_path)
    world.wont_start["plain"] = "out of memory"
    assert world.run() == 1
    assert all(r.status == "failed" and "out of memory" in r.reason for r in world.rows())


def test_an_interrupted_benchmark_goes_on_where_it_stopped(tmp_path):
    world = World(tmp_path)
    world.interrupt_at = 6
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert world.loaded == []
    before = world.rows()
    assert len(before) == 5
    with (world.folder / rows.ROWS).open("a") as file:
        file.write('{"cell": {"tar')  # a torn line
    world.interrupt_at, world.log = None, []
    assert world.run() == 0
    timed = [(r.system, r.cell.concurrency, r.round) for r in world.rows()]
    assert sorted(set(timed)) == sorted(
        (n, c, r) for n in ("plain", "eagle3 k=1", "marginal") for c in (1, 2) for r in (0, 1)
    )
    # What was whole is not run again, but for plain decoding beside what was missing.
    repeated = [t for t in timed if timed.count(t) > 1]
    assert {t[0] for t in repeated} <= {"plain"}
    assert world.run() == 0
    assert len(world.rows()) == len(timed)


def test_engines_are_grouped_with_plain_where_memory_is_short(tmp_path):
    world = World(tmp_path, systems=["plain", "eagle3 k=1", "eagle3 k=2", "ngram", "marginal"])
    world.free = 240  # two more engines of 100
    assert world.run() == 0
    assert world.most_loaded == 3
    groups = {}
    for row in world.rows():
        groups.setdefault(row.group, set()).add(row.system)
    assert list(groups.values()) == [
        {"plain", "eagle3 k=1", "eagle3 k=2"},
        {"plain", "ngram", "marginal"},
    ]


def test_phases_of_a_rising_load():
    cell = Cell(
        target="t", prompt_set="mix", load="rising", concurrency=16, temperature=0,
        output_len=4, num_prompts=16,
    )  # fmt: skip
    assert phases(cell) == (1, 4, 16, 4, 1)
    batches = cell.model_copy(update={"load": "batches", "num_prompts": 20})
    assert phases(batches) == (16, 4)
    steady = cell.model_copy(update={"load": "steady", "num_prompts": 20})
    assert phases(steady) == (20,)
    assert phases(steady.model_copy(update={"concurrency": 1})) == (1,) * 20


def test_near_ties_are_judged_by_the_target_behind_its_own_text():
    top = {1: -0.5, 2: -0.9, 3: -3.0}
    forced = [[Position(top)] * 3]
    tie = judge([[1, 1, 1]], [[1, 2, 3]], forced, 0.5)
    assert (tie.same, tie.near_ties, tie.different) == (0, 1, 0)
    far = judge([[1, 1, 1]], [[1, 3, 1]], forced, 0.5)
    assert (far.near_ties, far.different, far.largest_gap) == (0, 1, 2.5)
    unknown = judge([[1, 1, 1]], [[1, 4, 1]], forced, 0.5)
    assert (unknown.different, unknown.largest_gap) == (1, 99.0)
    assert judge([[1, 1, 1]], [[1, 1]], forced, 0.5).different == 1
    assert judge([[1, 1, 1]], [[1, 1, 1]], forced, 0.5).same == 1


def test_missing_prompts_are_named(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text("systems: [plain]\nprompts: {mine: no.jsonl}\ncells: [{concurrency: [1]}]\n")
    loaded = load_spec(spec)
    with pytest.raises(ValueError, match=r"prompts.mine: .*no.jsonl"):
        PromptSets(loaded.prompts, Words(), 100)
    with pytest.raises(ValueError, match="longer than 3 tokens"):
        PromptSets({"a": "builtin"}, Words(), 3)
    with pytest.raises(ValueError, match="builtin:repetitive"):
        PromptSets({"a": "builtin:other"}, Words(), 100)


def test_a_mix_takes_the_sets_in_turn_and_prefill_the_longest():
    sets = PromptSets({"a": "builtin", "b": "builtin:repetitive"}, Words(), 100)
    cell = Cell(
        target="t", prompt_set="mix", concurrency=4, temperature=0, output_len=4, num_prompts=4
    )
    assert [(p.prompt_set, p.index) for p in sets.of(cell)] == [
        ("a", 0),
        ("b", 0),
        ("a", 1),
        ("b", 1),
    ]
    only = PromptSets(
        {"a": "builtin", "b": "builtin:repetitive"},
        Words(),
        100,
        {"mix": ["b"], "both": ["a", "b"]},
    )
    assert {p.prompt_set for p in only.of(cell)} == {"b"}
    both = only.of(cell.model_copy(update={"prompt_set": "both"}))
    assert [p.prompt_set for p in both] == ["a", "b", "a", "b"]
    longest = sets.of(cell.model_copy(update={"load": "prefill", "num_prompts": 1}))[0]
    assert len(longest.token_ids) == max(len(p.token_ids) for s in sets.sets.values() for p in s)


def _row(system: str, concurrency: int, tokens: int, number: int = 0) -> Row:
    cell = Cell(
        target="t", prompt_set="mix", concurrency=concurrency, temperature=0,
        output_len=4, num_prompts=concurrency,
    )  # fmt: skip
    return Row(
        cell=cell, system=system, round=number, status="ok", seconds=1.0, num_tokens=tokens,
        time="", environment=environment_of(),
    )  # fmt: skip


def test_a_tuned_schedule_takes_the_best_chain_of_every_size():
    speeds = {1: (100, 130, 150), 4: (200, 240, 210), 16: (400, 380, 300)}
    measured = [
        _row(system, size, tokens)
        for size, values in speeds.items()
        for system, tokens in zip(("plain", "eagle3 k=1", "eagle3 k=3"), values, strict=True)
    ]
    assert schedule_of(measured, 64) == [(1, 2, 3), (3, 10, 1), (11, 64, 0)]
    with pytest.raises(ValueError, match="needs measured rows"):
        schedule_of([_row("plain", 1, 10), _row("eagle3 k=1", 1, 5)], 8)


def test_rows_are_private_and_follow_no_link(tmp_path):
    rows.append(tmp_path / rows.ROWS, _row("plain", 1, 100))
    assert stat.S_IMODE((tmp_path / rows.ROWS).stat().st_mode) == 0o600
    (tmp_path / "victim").write_text("precious\n")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        rows.append(tmp_path / "link", _row("plain", 1, 100))
    assert (tmp_path / "victim").read_text() == "precious\n"


def test_thresholds_pass_fail_and_miss(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for row in (_row("plain", 1, 100), _row("eagle3 k=1", 1, 120), _row("marginal", 1, 150)):
        rows.append(folder / rows.ROWS, row)
    path = tmp_path / "limits.yaml"

    def reached(rival: str, least: float, concurrency: int = 1) -> bool:
        one = {
            "system": "marginal", "rival": rival, "concurrency": concurrency, "least": least,
        }  # fmt: skip
        path.write_text(yaml.safe_dump({"thresholds": [one]}))
        return read_yaml(path, Thresholds).reached(folder, Console(quiet=True))

    assert reached("plain", 1.5) and not reached("plain", 1.51)
    assert reached("best chain", 1.24) and not reached("best chain", 1.26)
    assert not reached("plain", 0.5, concurrency=16)
    path.write_text("thresholds: [{system: marginal, rival: nobody, concurrency: 1, least: 1}]")
    with pytest.raises(ValueError, match="thresholds.0.rival"):
        read_yaml(path, Thresholds)
