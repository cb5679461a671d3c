# SPDX-License-Identifier: Apache-2.0
"""`heterospec simulate`: replay a recorded trace under every policy, and under an oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from heterospec_vllm.cli.sizes import sizes_of

CHAINS = (1, 2, 3, 5)
OPTIONS = {"num_speculative_tokens": "--nodes", "max_depth": "--depth"}  # by key of our config
# (nodes, depth, top_k)
TREES = ((4, 2, 4), (6, 2, 4), (8, 3, 4), (12, 4, 8))


def simulate(
    trace: Annotated[Path, typer.Argument(help="A trace of `heterospec calibrate --trace`.")],
    profile: Annotated[Path, typer.Option(help="Profile with the costs and, for `paper`, strata.")],
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,4,16",
    greedy_only: Annotated[bool, typer.Option(help="Leave sampled requests out.")] = True,
    nodes: Annotated[int, typer.Option(help="Bound of `marginal` and `paper`, 1..63.")] = 16,
    depth: Annotated[
        int, typer.Option(help="Bound of `marginal`; default depth of `paper`; 1..16.")
    ] = 6,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Expected tokens a second of every policy on recorded drafts, and their share of an oracle.

    What would have been accepted is exact, because the target's tokens are known; what it would
    have cost comes from the profile's tables. The oracle sees, in hindsight, where to stop drafting
    and how many of the best nodes to verify.
    """
    from heterospec_vllm.policy.profile import load_profile
    from heterospec_vllm.replay.simulate import Replay
    from heterospec_vllm.replay.trace import Trace

    sizes = sizes_of(batches, "--batches")
    _check_bounds(nodes, depth)
    try:
        loaded, recorded = load_profile(profile), Trace.load(trace)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    replay = Replay(recorded)
    requests = int((recorded.sampled == 0).sum()) if greedy_only else replay.num_requests
    results: dict[str, dict[str, dict[str, float]]] = {}
    for size in track(sizes, description="replaying", disable=as_json):
        results[str(size)] = compare(replay, loaded, size, requests, (nodes, depth, replay.top_k))
    if as_json:
        print(json.dumps(results))
        return
    for name, rows in results.items():
        _print(name, rows)


def _check_bounds(nodes: int, depth: int) -> None:
    """Raises BadParameter naming the option that our config would refuse."""
    from pydantic import ValidationError

    from heterospec_vllm.config import HeteroSpecConfig
    from heterospec_vllm.errors import faults_of

    bounds: dict[str, Any] = {"num_speculative_tokens": nodes, "max_depth": depth}
    try:
        HeteroSpecConfig(method="heterospec", model="trace", **bounds)
    except ValidationError as error:
        fault = faults_of(error, HeteroSpecConfig, bounds)[0]
        raise typer.BadParameter(
            f"found {fault.found}, allowed: {fault.allowed}", param_hint=OPTIONS[fault.key]
        ) from None


def compare(
    replay: Any, profile: Any, batch: int, requests: int, bounds: tuple[int, int, int]
) -> dict[str, dict[str, float]]:
    """Outcome by policy at one batch size; greedy requests come first in a trace."""
    from heterospec_vllm.policy.cost import StepCosts
    from heterospec_vllm.replay.simulate import oracle
    from heterospec_vllm.replay.simulate import replay as run

    def costs() -> StepCosts:
        return StepCosts.from_dict(profile.costs.model_dump())

    makers = makers_of(profile, bounds, costs)
    outcomes = {
        name: run(replay, make, costs(), batch, max_requests=requests)
        for name, make in makers.items()
    }
    best = oracle(replay, makers["marginal"](), costs(), batch, max_requests=requests)
    outcomes["oracle"] = best
    base = outcomes["plain"].tokens_per_second
    return {
        name: {
            "tokens_per_second": o.tokens_per_second,
            "ratio_to_plain": o.tokens_per_second / base,
            "share_of_oracle": o.tokens_per_second / best.tokens_per_second,
            "tokens_a_step": o.tokens / o.steps / batch,
            "nodes_a_step": o.nodes / o.steps,
            "levels_a_step": o.levels / o.steps,
        }
        for name, o in outcomes.items()
    }


def makers_of(profile: Any, bounds: tuple[int, int, int], costs: Any) -> dict[str, Any]:
    """Policy by name; each call makes a fresh one."""
    from heterospec_vllm.config import HeteroSpecConfig
    from heterospec_vllm.engine.make_policy import make_policy

    def maker(policy: str, nodes: int, depth: int, top_k: int, with_profile: bool = True) -> Any:
        config = HeteroSpecConfig(
            method="heterospec",
            model="trace",
            policy=policy,  # type: ignore[arg-type]
            num_speculative_tokens=nodes,
            max_depth=depth,
            top_k=top_k,
        )
        return lambda: make_policy(config, 63, profile if with_profile else None, costs())

    return {
        "plain": maker("plain", 1, 1, 1),
        **{f"chain k={k}": maker("chain", k, k, 1) for k in CHAINS},
        **{f"static {n} nodes, depth {d}, top {k}": maker("static", n, d, k) for n, d, k in TREES},
        "paper": maker("paper", *bounds),
        "marginal": maker("marginal", *bounds),
        "marginal, no profile": maker("marginal", *bounds, with_profile=False),
    }


def _print(batch: str, rows: dict[str, dict[str, float]]) -> None:
    table = Table(title=f"batch {batch}")
    table.add_column("policy")
    names = ("tok/s", "x plain", "of oracle", "tokens a step", "nodes a step", "levels a step")
    for name in names:
        table.add_column(name, justify="right")
    for policy, row in rows.items():
        table.add_row(
            policy,
            f"{row['tokens_per_second']:.1f}",
            f"{row['ratio_to_plain']:.3f}",
            f"{100 * row['share_of_oracle']:.0f} %",
            f"{row['tokens_a_step']:.2f}",
            f"{row['nodes_a_step']:.1f}",
            f"{row['levels_a_step']:.2f}",
        )
    Console().print(table)
