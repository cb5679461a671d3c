# SPDX-License-Identifier: Apache-2.0
"""Real servers in turns under the real client, plain and with our config."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from heterospec_vllm.bench.engines import Position
from heterospec_vllm.bench.gate import judge
from heterospec_vllm.bench.rows import Cell
from heterospec_vllm.bench.serving import ServedSystem
from heterospec_vllm.demo.model_cache import (
    check_head,
    default_cache_dir,
    prepare_target,
    shipped_head,
)
from heterospec_vllm.prompts import BUILT_IN, chat_token_ids, texts_of

pytestmark = [pytest.mark.engine, pytest.mark.full]

OUTPUT_LEN = 32
CELL = Cell(
    mode="serving",
    target="default",
    prompt_set="p",
    concurrency=4,
    temperature=0.0,
    output_len=OUTPUT_LEN,
    num_prompts=8,
)
LIMITS = {"ttft": 60_000.0, "e2el": 600_000.0}


@pytest.fixture(scope="module")
def target() -> str:
    """The embedded model, or the folder that HETEROSPEC_TEST_TARGET names."""
    named = os.environ.get("HETEROSPEC_TEST_TARGET")
    return named or str(prepare_target(default_cache_dir(), Console(stderr=True)))


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Ours, or the file that HETEROSPEC_TEST_PROMPTS names."""
    named = os.environ.get("HETEROSPEC_TEST_PROMPTS")
    return (texts_of(Path(named)) if named else list(BUILT_IN))[: CELL.num_prompts]


@pytest.fixture(scope="module")
def systems(
    target: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, ServedSystem]]:
    head = str(check_head(shipped_head()))
    configs = {"plain": None, "heterospec": {"method": "heterospec", "model": head}}
    folder = tmp_path_factory.mktemp("servers")
    made = {
        name: ServedSystem(
            name,
            target,
            folder=folder,
            max_model_len=1024,
            max_num_seqs=4,
            speculative_config=config,
        )
        for name, config in configs.items()
    }
    try:
        for system in made.values():
            system.start(Console(stderr=True))
        yield made
    finally:
        for system in made.values():
            system.close()


def test_answers_are_plain_decodings(
    systems: dict[str, ServedSystem], target: str, prompts: list[str]
) -> None:
    from transformers import AutoTokenizer

    plain, ours = (s.greedy_answers(prompts, OUTPUT_LEN) for s in systems.values())
    assert {len(answer) for answer in plain + ours} == {OUTPUT_LEN}
    ids = chat_token_ids(AutoTokenizer.from_pretrained(target), prompts, 1024)
    forced = systems["plain"].teacher_forced(ids, plain)
    assert _likeliest(forced[0][:8]) == plain[0][:8]
    gate = judge(plain, ours, forced, 0.5)
    print(gate)
    assert gate.different == 0


def _likeliest(positions: list[Position]) -> list[int]:
    return [max(p.top, key=lambda token: p.top[token]) for p in positions]


def test_the_real_client_measures_both_in_turns(
    systems: dict[str, ServedSystem], prompts: list[str]
) -> None:
    for number in range(2):
        for name, system in systems.items():
            run = system.run(CELL, prompts, goodput=LIMITS, seed=number)
            print(name, number, f"{system.memory() / 2**30:.2f} GiB", run)
            assert run.num_tokens == CELL.num_prompts * OUTPUT_LEN
            assert run.serving.completed == CELL.num_prompts and run.serving.failed == 0
            assert run.serving.goodput == run.serving.request_throughput
            assert 0 < run.serving.ttft_p50 < run.serving.e2el_p50 <= run.serving.e2el_p99
            assert run.serving.e2el_p99 < 1000 * run.seconds
            if name == "plain":
                assert run.counters is None
            else:
                assert run.counters is not None
                tokens = run.counters["accepted_nodes"] + run.counters["steps"]
                assert run.counters["verified_nodes"] > 0 and tokens > OUTPUT_LEN
                assert run.counters["seconds"]["target"] > 0


def test_an_open_loop_at_temperature(systems: dict[str, ServedSystem], prompts: list[str]) -> None:
    values = {"request_rate": 4.0, "temperature": 0.7, "output_len": 8}
    run = systems["heterospec"].run(CELL.model_copy(update=values), prompts, goodput=None)
    print(run)
    assert run.num_tokens == CELL.num_prompts * 8
    # The last of the arrivals comes at the end of the time that the rate gives them.
    assert run.seconds > CELL.num_prompts / 4.0
    assert run.serving.goodput is None
