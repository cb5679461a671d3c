# SPDX-License-Identifier: Apache-2.0
"""`heterospec calibrate`: learn a (target, head) pair's strata, survivals and costs into one profile file."""

from __future__ import annotations

import os
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from heterospec_vllm.cli.engine import EnforceEager, HeadOption, TargetOption, in_process_llm
from heterospec_vllm.cli.extras import require_extra
from heterospec_vllm.cli.files import check_output
from heterospec_vllm.cli.progress import watched
from heterospec_vllm.cli.sizes import sizes_of
from heterospec_vllm.prompts import BUILT_IN, chat_token_ids, texts_of

if TYPE_CHECKING:
    from heterospec_vllm.replay.trace import Trace

# (nodes, depth, top_k) whose steps are timed, 0 nodes: plain decoding. Chains too, or a level of one node would be
# priced like the narrowest bushy one.
TREES = ((0, 1, 1), (1, 1, 1), (3, 3, 1), (2, 1, 2), (4, 2, 4), (8, 2, 4), (16, 3, 8))
MOST_TOKENS = 600  # of a timed step


def calibrate(
    target: TargetOption,
    head: HeadOption,
    output: Annotated[Path, typer.Option(help="The profile is written here (JSON).")] = Path(
        "profile.json"
    ),
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSONL with `prompt` or `turns`; may be given more than once. Take prompts like "
            "those you will serve. [default: 24 of our own]"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of an answer.")] = 96,
    batch: Annotated[int, typer.Option(min=1, help="Requests traced together.")] = 8,
    depth: Annotated[
        int,
        typer.Option(
            min=1, max=16, help="Levels recorded, and the depth for which `paper` gets its strata."
        ),
    ] = 6,
    top_k: Annotated[int, typer.Option(min=2, max=16, help="Children and beam recorded.")] = 8,
    paper_nodes: Annotated[
        int, typer.Option(min=2, help="Kept nodes among which the paper's regression ranks.")
    ] = 59,
    sampled: Annotated[
        bool, typer.Option(help="Answer every prompt a second time, at temperature 1.")
    ] = True,
    timed_batches: Annotated[
        str, typer.Option(help="Batch sizes whose steps are timed, comma-separated.")
    ] = "1,2,4,8,16,32,64",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    max_model_len: Annotated[int, typer.Option(help="Engine's max_model_len.")] = 2048,
    trace: Annotated[
        Path | None, typer.Option(help="Keep the trace here (.npz), for `heterospec simulate`.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Reliability diagram (PNG). [default: beside the profile]")
    ] = None,
    enforce_eager: EnforceEager = False,
) -> None:
    """Trace the pair over some prompts, time its steps, and write what was learned as a profile.

    While it traces, the head drafts a wide tree at every position and nothing is verified, so the
    target's answers are plain decoding's. Strata and survivals are fitted on four requests in five
    and checked on the fifth; costs are timed over batch sizes and trees on the running engine.
    Use the profile with `"profile": "profile.json"` in the speculative config.

    Example: `heterospec calibrate --target DIR --head builtin:smollm2-135m --prompts mine.jsonl --output profile.json`
    """
    picture = picture or output.with_suffix(".png")
    check_output(output, "--output")
    check_output(picture, "--picture", ".png")
    check_output(trace, "--trace", ".npz")
    require_extra("calibrate", "sklearn", "matplotlib")
    console = Console()
    try:
        texts = [text for path in prompts for text in texts_of(path)] if prompts else list(BUILT_IN)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--prompts") from error
    sizes = sizes_of(timed_batches, "--timed-batches")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    console.print("loading the engine (a deep model compiles for minutes at its first start) ...")
    llm = in_process_llm(
        target,
        {
            "model": head,
            "policy": "plain",
            "num_speculative_tokens": 32,
            "max_depth": depth,
            "top_k": top_k,
        },
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max(batch, *sizes),
        enforce_eager=enforce_eager,
    )
    ids = chat_token_ids(llm.get_tokenizer(), texts, max_model_len - tokens - 1)
    recorded = record_trace(llm, ids, tokens, batch, sampled, console)
    if trace is not None:
        recorded.save(trace)
    samples = time_steps(llm, ids, sizes, 2 * tokens, console)

    from heterospec_vllm.replay import calibration
    from heterospec_vllm.replay.simulate import Replay

    console.print("fitting ...")
    try:
        fit = calibration.fit(Replay(recorded), depth, paper_nodes)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    costs = calibration.fit_costs(samples)
    _save(output, target, head, fit, costs, dtype, depth, len(texts))
    calibration.draw_reliability(fit.held_out, fit.survivals, picture)
    _print(console, fit, costs)
    console.print(f"profile: {output}   reliability diagram: {picture}")


def record_trace(
    llm: Any, ids: list[list[int]], tokens: int, batch: int, sampled: bool, console: Console
) -> Trace:
    """Every position's draft of the answers to some prompts, ``batch`` requests at a time."""
    import numpy as np
    from vllm import SamplingParams

    from heterospec_vllm.replay.trace import Trace

    jobs = [(one, 0.0) for one in ids] + ([(one, 1.0) for one in ids] if sampled else [])
    llm.collective_rpc("heterospec_trace", args=(True,))
    outputs = []
    for start in watched(range(0, len(jobs), batch), "tracing", console):
        part = jobs[start : start + batch]
        params = [
            SamplingParams(temperature=t, max_tokens=tokens, seed=start + i)
            for i, (_, t) in enumerate(part)
        ]
        inputs = [{"prompt_token_ids": one} for one, _ in part]
        outputs += llm.generate(inputs, params, use_tqdm=False)
    arrays = llm.collective_rpc("heterospec_trace", args=(False,))[0]
    number = {output.request_id: i for i, output in enumerate(outputs)}
    # vLLM's engine appends "-" and a random suffix to a request's id.
    request = np.array([number[name.rpartition("-")[0]] for name in arrays.pop("names")])
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    text = [prompt + answer for (prompt, _), answer in zip(jobs, answers, strict=True)]
    starts = np.cumsum([0, *map(len, text)])
    return Trace(
        request=request,
        **arrays,
        text=np.array([token for one in text for token in one]),
        text_start=starts,
        answer_start=np.array([len(prompt) for prompt, _ in jobs]),
        sampled=np.array([int(t > 0) for _, t in jobs]),
    )


def time_steps(
    llm: Any, ids: list[list[int]], sizes: list[int], tokens_at_most: int, console: Console
) -> list[dict[str, list]]:
    """What steps cost, over batch sizes, trees and contexts."""
    from vllm import SamplingParams

    samples = []
    for size in watched(sizes, "timing", console):
        trees = [tree for tree in TREES if size * (1 + tree[0]) <= MOST_TOKENS]
        # Small batches keep their contexts, so that what a context costs can be told apart.
        longest = 1024 if size <= 8 else 48
        part = [{"prompt_token_ids": one[:longest]} for one in islice(cycle(ids), size)]
        # A step yields less than two tokens on average: some ten steps of every tree.
        tokens = min(tokens_at_most, 200 if size <= 4 else 100)
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        time.sleep(0.2)
        llm.collective_rpc("heterospec_record_costs", args=(trees,))
        llm.generate(part, params, use_tqdm=False)
        samples.append(llm.collective_rpc("heterospec_recorded_costs")[0])
    return samples


def _save(output: Path, target, head, fit, costs, dtype: str, depth: int, num_prompts: int) -> None:
    from heterospec_vllm.config import BUILTIN_HEAD, ConfigSource, parse
    from heterospec_vllm.machine import machine_name
    from heterospec_vllm.policy.profile import Profile, fingerprint

    if head == BUILTIN_HEAD:
        head = parse(ConfigSource({"method": "heterospec", "model": head}, None)).model
    Profile(
        version=1,
        target=fingerprint(target),
        head=fingerprint(head),
        machine=machine_name(),
        dtype=dtype,
        created=time.strftime("%Y-%m-%d", time.gmtime()),
        versions={name: _version(name) for name in ("vllm", "torch", "heterospec-vllm")},
        num_prompts=num_prompts,
        num_nodes=fit.num_nodes,
        edges=[list(edges) for edges in fit.strata.edges],
        paper_depth=depth,
        paper_edges=list(fit.paper_edges),
        survivals=fit.survivals.of_ordinary_requests().round(4).tolist(),
        costs=costs.as_dict(),
        held_out=fit.figures,
    ).save(output)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _print(console: Console, fit, costs) -> None:
    table = Table(title="held-out nodes: log-loss in nats (lower is better)")
    for column in ("survival", "path probability", "one constant", "nodes"):
        table.add_column(column, justify="right")
    f = fit.figures
    table.add_row(
        f"{f['log_loss']:.4f}",
        f"{f['log_loss_path_probability']:.4f}",
        f"{f['log_loss_constant']:.4f}",
        f"{f['nodes']:.0f}",
    )
    console.print(table)
    table = Table(title="milliseconds")
    for column in ("tokens or nodes", "target step", "head over accepted tokens", "draft level"):
        table.add_column(column, justify="right")
    for count in (1, 4, 8, 16, 32, 64):
        cells = (costs.step(count, 1, 0), costs.first_pass.at(count), costs.level.at(count))
        table.add_row(str(count), *(f"{1e3 * cell:.2f}" for cell in cells))
    console.print(table)
