# SPDX-License-Identifier: Apache-2.0
"""`heterospec explain`: one request, step by step: what was drafted, what was verified and why, what was accepted."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from heterospec_vllm.cli.engine import EnforceEager, HeadOption, TargetOption, in_process_llm
from heterospec_vllm.cli.extras import require_extra
from heterospec_vllm.cli.files import check_output
from heterospec_vllm.kernels import private_files
from heterospec_vllm.prompts import chat_token_ids

MAX_MODEL_LEN = 2048
STYLES = {
    "accepted": "bold green",
    "rejected": "red",
    "not verified": "dim",
}


def explain(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    target: TargetOption,
    head: HeadOption,
    policy: Annotated[str, typer.Option(help="chain, static, paper or marginal.")] = "marginal",
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Calibration profile. [default: one that comes with us and fits, if any]"
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(help="num_speculative_tokens, 1..63.")] = 16,
    depth: Annotated[int, typer.Option(help="max_depth, 1..16.")] = 6,
    top_k: Annotated[int, typer.Option(help="top_k, 1..16.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, max=1024, help="Tokens of the answer.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    warm_up: Annotated[
        int,
        typer.Option(
            min=0, max=1024, help="Tokens decoded first, so that costs have been learned."
        ),
    ] = 64,
    svg: Annotated[
        Path | None, typer.Option(help="Write what the terminal shows here, too (.svg).")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Draw the trees of the first steps here (.png).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    enforce_eager: EnforceEager = False,
) -> None:
    """Answer one prompt and draw each step's tree.

    A node shows its token, its survival S (the calibrated chance of being accepted), the entropy
    along its path in nats and its stratum. Green: accepted. Red: verified and rejected. Dim: drafted
    and not verified, because S was below what a node costs now, or cut by the node limit.

    Example: `heterospec explain "Why is the sky blue?" --target DIR --head builtin:smollm2-135m --png steps.png`
    (the demo model's DIR is what `heterospec demo-model` prints).
    """
    check_output(svg, "--svg", ".svg")
    check_output(png, "--png", ".png")
    if png is not None:
        require_extra("calibrate", "matplotlib", option="--png")
    from heterospec_vllm.observe.step_picture import draw_steps
    from heterospec_vllm.observe.steps import read_steps

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import SamplingParams

    config: dict[str, Any] = {
        "model": head,
        "policy": policy,
        "num_speculative_tokens": nodes,
        "max_depth": depth,
        "top_k": top_k,
        "profile": None if profile is None else str(profile),
    }
    llm = in_process_llm(
        target,
        config,
        dtype=dtype,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=2,
        kv_cache_gib=1,
        enforce_eager=enforce_eager,
    )
    tokenizer = llm.get_tokenizer()
    (ids,) = chat_token_ids(tokenizer, [prompt], MAX_MODEL_LEN - max(tokens, warm_up))
    message = {"prompt_token_ids": ids}
    if warm_up:
        llm.generate(message, SamplingParams(temperature=0.0, max_tokens=warm_up), use_tqdm=False)
    llm.collective_rpc("heterospec_steps", args=(True,))
    params = SamplingParams(temperature=temperature, max_tokens=tokens, seed=0)
    output = llm.generate(message, params, use_tqdm=False)[0].outputs[0]
    steps = read_steps(llm.collective_rpc("heterospec_steps", args=(False,))[0])
    console = Console(record=svg is not None)
    for number, step in enumerate(steps, 1):
        console.print(draw(step, tokenizer, number))
    accepted = sum(step.num_accepted for step in steps)
    console.print(
        f"{len(output.token_ids)} tokens in {len(steps)} drafted steps, "
        f"{accepted} drafted tokens accepted"
    )
    console.print(Text(output.text.strip(), style="italic"))
    if svg is not None:
        with private_files.beside(svg) as part:
            console.save_svg(str(part), title=f"heterospec explain, policy {policy}")
    if png is not None:
        draw_steps(steps, partial(_shown, tokenizer), png, f"{prompt}\npolicy {policy}")


def draw(step: Any, tokenizer: Any, number: int) -> Tree:
    """One step as a tree of its drafted candidates; of those not verified, the best few of a node."""
    price = f", price {step.price:.0f} tokens/s" if step.price else ""
    title = (
        f"step {number}: {_shown(tokenizer, step.root)} "
        f"({step.num_verified} of {step.num_drafted} nodes verified, {step.num_levels} levels"
        f"{price}, {step.seconds * 1e3:.1f} ms drafting)"
    )
    tree = Tree(Text(title, style="bold"))
    branches = {-1: tree}
    hidden: dict[int, int] = {}
    for node in step.nodes:
        above = branches.get(node.parent)
        if above is None:
            continue
        if node.state == "not verified" and node.rank > 2:
            hidden[node.parent] = hidden.get(node.parent, 0) + 1
            continue
        label = Text(
            f"{_shown(tokenizer, node.token)}  S {node.survival:.2f}  "
            f"H {node.entropy:.2f}  stratum {node.stratum}",
            style=STYLES[node.state],
        )
        if node.reason:
            label.append(f"  ({node.reason})", style="dim")
        branches[node.column] = above.add(label)
    for parent, count in hidden.items():
        branches[parent].add(Text(f"... and {count} more", style="dim"))
    return tree


def _shown(tokenizer: Any, token: int) -> str:
    return repr(tokenizer.decode([token]))
