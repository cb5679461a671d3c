# SPDX-License-Identifier: Apache-2.0
"""`heterospec step-table`: where the time of one decoding step goes, on this machine, for this pair."""

from __future__ import annotations

import json
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from heterospec_vllm.cli.engine import EnforceEager, HeadOption, TargetOption, in_process_llm
from heterospec_vllm.prompts import BUILT_IN, chat_token_ids, texts_of

# (span, indent): vLLM's own share of execute_model and sample_tokens is what the inner spans leave.
ROWS = (
    ("execute_model", 0),
    ("match drafts", 1),
    ("tree layout", 1),
    ("target forward", 1),
    ("tree attention", 2),
    ("sample_tokens", 0),
    ("walk", 1),
    ("sampling", 2),
    ("compaction", 1),
    ("counters", 1),
    ("learn", 1),
    ("take_draft_token_ids", 0),
    ("draft", 1),
    ("draft: accepted tokens", 2),
    ("draft: levels", 2),
    ("draft: cut the tree", 2),
    ("publish", 1),
)
# Parts that lie in several of those.
ACROSS = ("head keys", "head forward", "head logits", "head top-k", "policy")
# What speculation adds to a step, and what of it is the models' work.
OURS = (
    "match drafts",
    "tree layout",
    "walk",
    "compaction",
    "counters",
    "learn",
    "draft",
    "publish",
)
MODELS = ("sampling", "head keys", "head forward", "head logits", "head top-k")


def step_table(
    target: TargetOption,
    head: HeadOption,
    policy: Annotated[
        str, typer.Option(help="plain, chain, static, paper or marginal.")
    ] = "static",
    nodes: Annotated[int, typer.Option(help="num_speculative_tokens, 1..63.")] = 6,
    depth: Annotated[int, typer.Option(help="max_depth, 1..16.")] = 2,
    top_k: Annotated[int, typer.Option(help="top_k, 1..16.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Requests decoded together.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each request.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    max_model_len: Annotated[int, typer.Option(help="Engine's max_model_len.")] = 2048,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL with `prompt` or `turns`; default: our own.")
    ] = None,
    enforce_eager: EnforceEager = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Run the pair in this process (all cores, compiled) and print one step's time by part.

    An indented part lies in the one above it; those below the line lie in several. "policy and bookkeeping" is all that
    speculation adds to a step but the head's passes and sampling. Spans cost about a microsecond each; the run without
    them is timed too and printed beside it.

    Example: `heterospec step-table --target DIR --head builtin:smollm2-135m --batch 4 --policy marginal`
    """
    if tokens > max_model_len - 2:
        raise typer.BadParameter(
            f"found {tokens}, allowed: at most --max-model-len less 2, {max_model_len - 2}",
            param_hint="--tokens",
        )
    try:
        known = texts_of(prompts) if prompts else list(BUILT_IN)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--prompts") from error
    llm = in_process_llm(
        target,
        {
            "model": head,
            "policy": policy,
            "num_speculative_tokens": nodes,
            "max_depth": depth,
            "top_k": top_k,
        },
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max(batch, 2),
        enforce_eager=enforce_eager,
    )
    ids = chat_token_ids(llm.get_tokenizer(), known, max_model_len - tokens - 1)
    prompts_of_batch = [{"prompt_token_ids": one} for one in islice(cycle(ids), batch)]
    _generate(llm, prompts_of_batch, 16)
    bare = _generate(llm, prompts_of_batch, tokens)
    llm.collective_rpc("heterospec_counters", kwargs={"reset": True})
    llm.collective_rpc("heterospec_clock", args=(True,))
    timed = _generate(llm, prompts_of_batch, tokens)
    spans = llm.collective_rpc("heterospec_clock", args=(False,))[0]
    counters = llm.collective_rpc("heterospec_counters")[0]
    result = _result(spans, counters, timed, bare)
    if as_json:
        print(json.dumps(result))
    else:
        _print(result)


def _generate(llm: Any, inputs: list[dict[str, list[int]]], tokens: int) -> dict[str, float]:
    from vllm import SamplingParams

    # An idle engine's threads spin for about a second after their last step.
    time.sleep(2)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens": sum(len(o.outputs[0].token_ids) for o in outputs),
    }


def _result(
    spans: dict[str, tuple[float, int]],
    counters: dict[str, Any],
    timed: dict[str, float],
    bare: dict[str, float],
) -> dict[str, Any]:
    steps = counters["steps"]
    measured = {name: 1000 * seconds / steps for name, (seconds, _) in spans.items()}
    return {
        "steps": steps,
        "ms_per_step": 1000 * timed["seconds"] / steps,
        "tokens_per_second": bare["tokens"] / bare["seconds"],
        "tokens_per_second_with_spans": timed["tokens"] / timed["seconds"],
        "tokens_per_step": timed["tokens"] / steps,
        "spans_ms_per_step": measured,
        "bookkeeping_ms_per_step": bookkeeping(measured),
        "counters": counters,
    }


def bookkeeping(spans: dict[str, float]) -> float:
    """What speculation adds to a step without the models' own work, in the spans' unit."""
    return sum(spans.get(name, 0.0) for name in OURS) - sum(spans.get(name, 0.0) for name in MODELS)


def _print(result: dict[str, Any]) -> None:
    total = result["ms_per_step"]
    table = Table(title=f"One step of {result['steps']}, prefill included")
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    spans = result["spans_ms_per_step"]
    for name, indent in ROWS:
        if name in spans:
            table.add_row(
                "  " * indent + name, f"{spans[name]:.3f}", f"{100 * spans[name] / total:.1f} %"
            )
    rest = total - sum(spans.get(name, 0.0) for name, indent in ROWS if indent == 0)
    table.add_row(
        "scheduler, detokenizer, the rest of vLLM", f"{rest:.3f}", f"{100 * rest / total:.1f} %"
    )
    table.add_row("whole step", f"{total:.3f}", "100 %", end_section=True)
    for name in ACROSS:
        if name in spans:
            table.add_row(
                f"{name}, in all", f"{spans[name]:.3f}", f"{100 * spans[name] / total:.1f} %"
            )
    ours = result["bookkeeping_ms_per_step"]
    table.add_row("policy and bookkeeping", f"{ours:.3f}", f"{100 * ours / total:.1f} %")
    console = Console()
    console.print(table)
    console.print(
        f"{result['tokens_per_step']:.2f} tokens a step, {result['tokens_per_second']:.1f} tokens/s "
        f"({result['tokens_per_second_with_spans']:.1f} with the spans on)"
    )
