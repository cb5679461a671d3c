# SPDX-License-Identifier: Apache-2.0
"""Made-up benchmark results in the shape of real ones, for the report's tests.

Two targets, temperatures 0 and 1, 1 to 64 requests at once, every kind of system, a failed cell, answers that differ,
two groups of engines, servers. `python tests/unit/report_rows.py FOLDER` writes them to look at.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from heterospec_vllm.bench.rows import ROWS, Cell, Environment, Gate, Row, Serving, append

ENVIRONMENT = Environment(
    commit="0123456789",
    versions={"python": "3.11.9", "vllm": "0.32.0+cpu", "torch": "2.13.0+cpu"},
    machine="made up, 2 cores seen",
    threads="0,1",
    command="heterospec bench ladder.yaml --output results",
)
TIME = "2026-11-23T10:00:00Z"
SETS = ("mt_bench", "humaneval", "gsm8k", "alpaca", "sum")
SIZES = (1, 2, 4, 8, 16, 32, 64)
TARGETS = {"SmolLM2-135M": 43.0, "SmolLM2-135M-x8": 6.5}  # plain's tokens a second at 1
# system: speed-up at 1, exponent by which it falls with the concurrency, nodes a request, depth
SYSTEMS = {
    "plain": (1.0, 0.0, 0, 0),
    "off": (0.99, 0.0, 0, 0),
    "eagle3 k=1": (1.25, 0.09, 1, 1),
    "eagle3 k=2": (1.33, 0.16, 2, 2),
    "eagle3 k=3": (1.32, 0.22, 3, 3),
    "eagle3 k=5": (1.2, 0.3, 5, 5),
    "eagle3 tuned": (1.33, 0.08, 2, 2),
    "ngram k=4": (1.08, 0.12, 4, 4),
    "chain k=3": (1.36, 0.2, 3, 3),
    "static nodes=6 depth=2 top=4": (1.47, 0.36, 6, 2),
    "paper": (1.38, 0.33, 8, 3),
    "marginal": (1.62, 0.13, 9, 3),
}
GROUP_OF = {"eagle3 k=5": 2, "eagle3 tuned": 2}
RNG = random.Random(7)


def make_row(
    speed: float | None = None,
    system: str = "plain",
    round_: int = 0,
    group: int = 1,
    cell: dict[str, Any] | None = None,
    **fields: Any,
) -> Row:
    """A row with `speed` tokens a second; fields and those of the cell may be set."""
    given = {
        "target": "target",
        "prompt_set": "mix",
        "concurrency": 1,
        "temperature": 0.0,
        "output_len": 64,
        "num_prompts": 4,
        **(cell or {}),
    }
    timing = {} if speed is None else {"seconds": 100 / speed, "num_tokens": 100}
    values = {"status": "ok", "time": TIME, "environment": ENVIRONMENT, **timing, **fields}
    return Row(cell=Cell(**given), system=system, round=round_, group=group, **values)


def write(folder: Path, rows: Iterable[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        append(folder / ROWS, row)
    return folder


def everything(folder: Path, sizes: tuple[int, ...] = SIZES, sets: tuple[str, ...] = SETS) -> Path:
    return write(folder, [*offline(sizes, sets), *served()])


def cells(sizes: tuple[int, ...], sets: tuple[str, ...]) -> Iterator[Cell]:
    for target in TARGETS:
        for temperature in (0.0, 1.0):
            for size in sizes:
                for name in sets if size == 1 else ("mix",):
                    yield Cell(
                        target=target, prompt_set=name, concurrency=size, temperature=temperature,
                        output_len=64, num_prompts=max(8, size),
                    )  # fmt: skip
        for load in ("rising", "prefill"):
            yield Cell(
                target=target, prompt_set="mix", concurrency=16, temperature=0.0, load=load,
                output_len=64, num_prompts=16,
            )  # fmt: skip


def offline(sizes: tuple[int, ...], sets: tuple[str, ...]) -> Iterator[Row]:
    for cell in cells(sizes, sets):
        for round_ in range(3):
            for group in (1, 2):
                drift = RNG.gauss(1, 0.015)
                for system in SYSTEMS:
                    if system == "plain" or GROUP_OF.get(system, 1) == group:
                        yield _offline_row(cell, system, round_, group, drift)


def _offline_row(cell: Cell, system: str, round_: int, group: int, drift: float) -> Row:
    gate = Gate(same=cell.num_prompts - 1, near_ties=1, different=0, largest_gap=0.11)
    common = {"cell": cell.model_dump(), "system": system, "round_": round_, "group": group}
    if system == "ngram k=4" and cell.concurrency == 64:
        return make_row(**common, status="failed", reason="died: out of KV cache (made up)")
    if system == "paper" and cell.concurrency == 32 and cell.temperature == 0:
        gate = Gate(same=29, near_ties=1, different=2, largest_gap=2.4)
        reason = "2 of 32 answers differ from plain's"
        return make_row(**common, status="different", reason=reason, gate=gate)
    tokens = cell.num_prompts * 64
    base = TARGETS[cell.target] * cell.concurrency**0.62 * drift
    gain = _gain(cell, system)
    seconds = tokens / (base * gain) * RNG.gauss(1, 0.012)
    return make_row(
        **common, seconds=seconds, num_tokens=tokens,
        gate=gate if cell.temperature == 0 else None,
        counters=_counters(cell, system, tokens, seconds),
    )  # fmt: skip


def _gain(cell: Cell, system: str) -> float:
    first, fall, _, _ = SYSTEMS[system]
    if system in ("plain", "off"):
        return first
    of_set = {"humaneval": 1.15, "gsm8k": 1.08, "sum": 0.8}.get(cell.prompt_set, 1.0)
    deep = 1.12 if "x8" in cell.target else 1.0
    sampled = 0.9 if cell.temperature else 1.0
    gain = first * of_set * deep * sampled / cell.concurrency**fall
    return max(gain, 0.97) if system == "marginal" else gain


def _counters(cell: Cell, system: str, tokens: int, seconds: float) -> dict[str, Any] | None:
    nodes, depth = SYSTEMS[system][2:]
    if system == "plain":
        return None
    if system == "marginal":
        nodes = nodes / cell.concurrency**0.6
        depth = depth / cell.concurrency**0.3
    accepted = int(tokens * (1 - 1 / (1 + 0.42 * nodes**0.55))) if nodes else 0
    verified = int((tokens - accepted) * nodes)
    if system.startswith(("eagle3", "ngram")):
        return {
            "num_drafts": tokens - accepted,
            "num_draft_tokens": verified,
            "num_accepted_tokens": accepted,
        }
    steps = max(1, (tokens - accepted) // cell.concurrency)
    shares = {"draft": 0.09 * depth, "policy": 0.01, "sample": 0.03, "rest": 0.02}
    parts = {name: seconds * share for name, share in shares.items()}
    return {
        "steps": steps,
        "draft_steps": steps if nodes else 0,
        "drafted_trees": tokens - accepted,
        "verified_nodes": verified,
        "accepted_nodes": accepted,
        "head_passes": int(steps * depth),
        "accepted_per_depth": {"1": accepted},
        "seconds": {"target": seconds - sum(parts.values()), **parts},
        "seconds_off": 0.0 if nodes > 4 else 0.4 * seconds,
    }


def served() -> Iterator[Row]:
    target = next(iter(TARGETS))
    loads: list[tuple[int, float | None]] = [(1, None), (4, None), (16, None), (64, None)]
    loads += [(64, 0.5), (64, 1.0), (64, 2.0)]
    for most, rate in loads:
        cell = Cell(
            mode="serving", target=target, prompt_set="mix", concurrency=most, request_rate=rate,
            temperature=0.0, output_len=64, num_prompts=64,
        )  # fmt: skip
        busy = most if rate is None else 6 * rate
        for round_ in range(3):
            for system in ("plain", "eagle3 k=3", "ngram k=4", "marginal"):
                first, fall, _, _ = SYSTEMS[system]
                tpot = 23 * busy**0.35 / (first / busy**fall) * RNG.gauss(1, 0.02)
                yield make_row(
                    cell=cell.model_dump(), system=system, round_=round_, seconds=30.0,
                    num_tokens=4096, serving=_serving(tpot, busy, rate),
                )  # fmt: skip


def _serving(tpot: float, busy: float, rate: float | None) -> Serving:
    ttft = 40 + 6 * busy + tpot
    e2el = ttft + 63 * tpot
    closed = 1000 * busy / e2el
    return Serving(
        request_throughput=closed if rate is None else rate,
        goodput=closed * 0.8 if rate is None else None,
        ttft_p50=ttft, ttft_p99=ttft * 2.6, tpot_p50=tpot, tpot_p99=tpot * 1.5,
        itl_p50=tpot * 1.1, itl_p99=tpot * 3, e2el_p50=e2el, e2el_p99=e2el * 1.4,
        completed=64, failed=0,
    )  # fmt: skip


if __name__ == "__main__":
    everything(Path(sys.argv[1]))
