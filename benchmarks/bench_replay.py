# SPDX-License-Identifier: Apache-2.0
"""Replayed against measured: what `heterospec simulate` says of the policies and what one engine does with them.

    python benchmarks/bench_replay.py --target TARGET --dtype float32 --prompts a.jsonl --prompts b.jsonl

One engine traces the prompts and decodes every group of prompts under one policy right after the other (reading
prompts is not timed); between the rounds it times its steps. Then the trace is replayed with those costs. Both are
given in multiples of plain decoding; asked: within 10 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from heterospec_vllm.cli.calibrate import record_trace, time_steps
from heterospec_vllm.cli.engine import in_process_llm
from heterospec_vllm.cli.progress import watched
from heterospec_vllm.cli.simulate import compare
from heterospec_vllm.policy.cost import StepCosts
from heterospec_vllm.policy.profile import Profile, load_profile
from heterospec_vllm.prompts import chat_token_ids, texts_of
from heterospec_vllm.replay import calibration
from heterospec_vllm.replay.simulate import Replay

HEAD = "builtin:smollm2-135m"
PROFILE = Path(__file__).parents[1] / "configs/profiles/smollm2-135m.json"
BOUNDS = 16, 6, 8  # nodes, depth and top_k of `marginal`
MAX_MODEL_LEN = 2048


def system(policy: str, nodes: int, depth: int, top_k: int) -> tuple[str, dict[str, int]]:
    """What `set_heterospec_policy` takes."""
    return policy, {"num_speculative_tokens": nodes, "max_depth": depth, "top_k": top_k}


# Names are those of `heterospec simulate`.
SYSTEMS = {
    "plain": system("plain", 1, 1, 1),
    "chain k=2": system("chain", 2, 2, 1),
    "chain k=3": system("chain", 3, 3, 1),
    "static 4 nodes, depth 2, top 4": system("static", 4, 2, 4),
    "static 6 nodes, depth 2, top 4": system("static", 6, 2, 4),
    "static 8 nodes, depth 3, top 4": system("static", 8, 3, 4),
    "marginal": system("marginal", *BOUNDS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", required=True, help="folder or hub id")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=Path, action="append", required=True, help="JSONL")
    parser.add_argument("--per-file", type=int, default=2, help="prompts of each file")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3, help="after one that is not counted")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    console = Console(width=120)
    llm = in_process_llm(
        args.target,
        {"model": HEAD, "num_speculative_tokens": 32, "max_depth": BOUNDS[1], "top_k": BOUNDS[2]},
        dtype=args.dtype,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max(8, *args.batches),
    )
    texts = [text for path in args.prompts for text in texts_of(path)[: args.per_file]]
    ids = chat_token_ids(llm.get_tokenizer(), texts, MAX_MODEL_LEN - args.tokens - 1)
    trace = record_trace(llm, ids, args.tokens, 8, False, console)
    results = {}
    for batch in args.batches:
        rates, costs = measured(llm, ids, args, batch, console)
        profile = with_costs(load_profile(PROFILE), costs.as_dict())
        replayed = compare(Replay(trace), profile, batch, len(ids), BOUNDS)
        results[batch] = rows = joined(replayed, rates)
        show(console, batch, rows, replayed["marginal"]["share_of_oracle"])
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1))


@dataclass
class Decoded:
    """What a system emitted behind the first tokens, and in which time."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def measured(
    llm: Any, ids: list[list[int]], args: argparse.Namespace, batch: int, console: Console
) -> tuple[dict[str, list[float]], StepCosts]:
    """Tokens a second of every system, round by round, and what steps cost in those minutes."""
    rates: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= batch]
    samples = []
    groups = [ids[first : first + batch] for first in range(0, len(ids), batch)]
    for turn in watched(range(args.rounds + 1), f"{batch} at once", console):
        decoded = {name: Decoded() for name in SYSTEMS}
        for number, group in enumerate(groups):
            # The machine changes its speed by the second, so nobody is always the first.
            first = (turn + number) % len(SYSTEMS)
            names = [*SYSTEMS][first:] + [*SYSTEMS][:first]
            for name in names:
                policy, bounds = SYSTEMS[name]
                llm.collective_rpc("set_heterospec_policy", args=(policy,), kwargs=bounds)
                decode(llm.llm_engine, group, args.tokens, decoded[name])
        if turn:
            for name in SYSTEMS:
                rates[name].append(decoded[name].rate)
            # As often as rates: this machine may be another one a minute later.
            samples += time_steps(llm, ids, sizes, 2 * args.tokens, Console(quiet=True))
    return rates, calibration.fit_costs(samples)


def decode(engine: Any, group: list[list[int]], tokens: int, decoded: Decoded) -> None:
    """Answers some requests together; counts from the step on in which each has its first token."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens)
    for number, one in enumerate(group):
        engine.add_request(f"{time.monotonic_ns()}-{number}", {"prompt_token_ids": one}, params)
    counts: dict[str, int] = {}
    start, begun = 0.0, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
        if not start and len(counts) == len(group):
            start, begun = time.perf_counter(), sum(counts.values())
    decoded.tokens += sum(counts.values()) - begun
    decoded.seconds += time.perf_counter() - start


def with_costs(profile: Profile, costs: dict[str, Any]) -> Profile:
    """The profile with the costs of this machine today."""
    return Profile(**{**profile.model_dump(), "costs": costs})


def joined(replayed: dict[str, Any], rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """By system: the replay's and the measured multiple of plain decoding, and how far they are apart."""
    rows = {}
    for name, values in rates.items():
        pairs = zip(values, rates["plain"], strict=True)
        ratio = statistics.median(rate / plain for rate, plain in pairs)
        said = replayed[name]["ratio_to_plain"]
        rows[name] = {
            "replayed": said,
            "measured": ratio,
            "difference": said / ratio - 1.0,
            "tokens_per_second": statistics.median(values),
        }
    return rows


def show(console: Console, batch: int, rows: dict[str, dict[str, float]], share: float) -> None:
    title = f"{batch} at once, times plain; marginal is {100 * share:.0f} % of the oracle"
    table = Table("policy", title=title)
    for column in ("replayed", "measured", "difference", "tok/s measured"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['replayed']:.2f}",
            f"{row['measured']:.2f}",
            f"{100 * row['difference']:+.1f} %",
            f"{row['tokens_per_second']:.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
