# SPDX-License-Identifier: Apache-2.0
"""`heterospec train-head`: trains, resumes and evaluates an EAGLE-3 head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heterospec_vllm.prompts import texts_of
from heterospec_vllm.training import inputs

if TYPE_CHECKING:
    import torch

STORE = "store"  # where answers are collected; further `store*` folders are trained on too


@contextmanager
def _one_sentence_errors() -> Iterator[None]:
    try:
        yield
    except inputs.InputError as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from error


@_one_sentence_errors()
def train_head(
    target: Annotated[
        Path,
        typer.Option(
            exists=True, file_okay=False, help="Hugging Face folder of the target (Llama-shaped)."
        ),
    ],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSONL, a prompt a line: `prompt` or `turns` (the first is used), and an `id` "
            "if you like. With --evaluate: the prompt files to measure on; may be repeated.",
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSONL of the target's own answers, if you have some: `id`, `p` (prompt token "
            "ids), `o` (answer token ids), `t` (temperature). Prompts without one are answered. "
            "With --features live they are all it takes.",
        ),
    ] = None,
    work: Annotated[
        Path,
        typer.Option(
            file_okay=False,
            help="Folder of answers and hidden states (`store*`) and of the training state.",
        ),
    ] = Path("head-work"),
    output: Annotated[
        Path, typer.Option(file_okay=False, help="The head is written to this folder.")
    ] = Path("head"),
    collect_minutes: Annotated[
        float,
        typer.Option(min=0, help="Time for answering prompts; 0 trains on what --work holds."),
    ] = 20.0,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Training time; sets the schedule. [default: 60]")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the answers, instead of --minutes.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the state in --work (same options).")
    ] = False,
    ttt_steps: Annotated[
        int, typer.Option(min=1, max=16, help="Training-time-test steps: drafted tokens in a row.")
    ] = 4,
    keep_rank: Annotated[
        int,
        typer.Option(
            min=1,
            help="A position stays in the next step while its true token is among the head's "
            "first this many: a chain needs 1, trees more. The vocabulary size keeps all.",
        ),
    ] = 3,
    step_decay: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="Loss weight of a step relative to the step before."),
    ] = 1.0,
    draft_vocab_size: Annotated[
        int, typer.Option(min=16, help="Draft words: the most frequent tokens of the answers.")
    ] = 8192,
    taps: Annotated[
        str,
        typer.Option(
            help="Layers whose input the head reads, comma separated; the number of layers stands "
            "for the output of the last. [default: 2, half, 5/6 and all of the layers]",
        ),
    ] = "",
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="KV heads of the head. [default: the target's]")
    ] = None,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak, AdamW.")] = 1e-3,
    matrix_learning_rate: Annotated[
        float, typer.Option(min=0, help="Above 0: Muon for the layer's matrices, at this rate.")
    ] = 4e-3,
    batch_tokens: Annotated[int, typer.Option(min=16, help="Rows of a batch, padded.")] = 3072,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest answer.")] = 320,
    max_sequence: Annotated[
        int, typer.Option(min=16, help="Longer prompt-and-answer sequences are cut.")
    ] = 640,
    greedy_share: Annotated[
        float, typer.Option(min=0, max=1, help="Answers at temperature 0; the others at 0.9.")
    ] = 1.0,
    device: Annotated[
        str, typer.Option(help="Where to train: `cpu`, `cuda`, or `auto`: a GPU if there is one.")
    ] = "auto",
    features: Annotated[
        str,
        typer.Option(
            help="Hidden states of the target: `stored` by the collecting pass, `live` computed for "
            "every batch through transformers (needs only --answers), or `auto`: live on a GPU."
        ),
    ] = "auto",
    threads: Annotated[
        int, typer.Option(min=0, help="Torch threads of the trainer; 0 leaves it to torch.")
    ] = 0,
    checkpoint_minutes: Annotated[
        float,
        typer.Option(min=0.1, help="Time between two checkpoints; each also writes the head."),
    ] = 5.0,
    seed: Annotated[
        int, typer.Option(help="Of the order of prompts and batches, and of sampled answers.")
    ] = 0,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Measure this head instead of training: acceptance by draft position through "
            "stock vLLM's `eagle3` counters, on the --prompts files, at temperature 0.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --evaluate: prompts of a file.")
    ] = None,
) -> None:
    """Train an EAGLE-3 draft head for a target from the target's own answers.

    A head drafts well only what *its* target would say, so nothing but prompts is needed: vLLM
    answers them and hands over the hidden states of the same pass. Training reads those from disk,
    writes a checkpoint every few minutes and the head (averaged weights) beside it; both can be
    used while it goes on. Held-out acceptance by draft position is printed at every checkpoint.

        heterospec train-head --target MODEL --prompts prompts.jsonl --output head

        heterospec train-head --target MODEL --output head --collect-minutes 0 --resume

        heterospec train-head --target MODEL --answers answers.jsonl --output head --device cuda

        heterospec train-head --target MODEL --evaluate head --prompts questions.jsonl

    Several processes train together under `torchrun --no-python --nproc-per-node N heterospec
    train-head ...` (collect first: they share --work). See docs/train-head.md for sizes, times and
    what the options cost.
    """
    if evaluate is not None:
        _evaluate(target, evaluate, prompts or [], max_tokens, limit)
        return
    if minutes is not None and epochs is not None:
        raise typer.BadParameter(
            "found both, allowed: --minutes or --epochs", param_hint="--epochs"
        )
    config = inputs.target_config(target)
    inputs.check_kv_heads(config, kv_heads)
    inputs.check_files(prompts if collect_minutes > 0 else None, answers)
    tap_layers = _tap_layers(config["num_hidden_layers"], taps)
    where, live = _where(device, features)
    answered = live and answers is not None  # then nothing has to be collected
    collects = collect_minutes > 0 and bool(prompts or not (resume or answered))
    _check_work(work, target, config, tap_layers, resume=resume, collects=collects, live=live)
    if collects:
        _collect(
            target, config, _only(prompts, where), answers, work / STORE, tap_layers,
            collect_minutes, max_tokens, greedy_share, seed,
        )  # fmt: skip
    stores = _stores(work)
    if not stores and not answered:
        raise typer.BadParameter(
            f"{work} holds no answers, allowed: a folder of answers, or --prompts to collect some",
            param_hint="--work",
        )
    from heterospec_vllm.training import recipe
    from heterospec_vllm.training.display import Display
    from heterospec_vllm.training.loop import TrainOptions

    _set_up_torch(threads)
    options = TrainOptions(
        minutes=minutes if minutes is not None or epochs is not None else 60.0,
        epochs=epochs,
        ttt_steps=ttt_steps,
        step_decay=step_decay,
        keep_rank=keep_rank,
        learning_rate=learning_rate,
        matrix_learning_rate=matrix_learning_rate,
        batch_tokens=batch_tokens,
        average=0.99,
        seed=seed,
        checkpoint_minutes=checkpoint_minutes,
    )
    with Display() as display:
        recipe.train(
            target,
            recipe.TrainingInputs(stores, [answers] if answers else [], max_sequence, where, live),
            work,
            output,
            options,
            taps=tap_layers,
            draft_vocab_size=draft_vocab_size,
            kv_heads=kv_heads,
            resume=resume,
            report=display.step,
            on_held_out=display.held_out,
        )
    typer.echo(f"head written to {output}")


def _where(device: str, features: str) -> tuple[torch.device, bool]:
    """The device to train on, and whether hidden states are computed there as they are needed."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(
            f"found {device!r}, allowed: auto, cpu, cuda", param_hint="--device"
        )
    if features not in ("auto", "stored", "live"):
        raise typer.BadParameter(
            f"found {features!r}, allowed: auto, stored, live", param_hint="--features"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "found no GPU for torch, allowed: auto, cpu", param_hint="--device"
        )
    return torch.device(device), features == "live" or (features == "auto" and device == "cuda")


def _set_up_torch(threads: int) -> None:
    """Bound the threads and join the other processes of a `torchrun`."""
    import os

    import torch

    if threads:
        torch.set_num_threads(threads)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")


def _tap_layers(count: int, taps: str) -> tuple[int, ...]:
    """Of a target of ``count`` layers."""
    if not taps:
        return tuple(sorted({min(2, count), count // 2, min(count, count * 5 // 6 + 1), count}))
    try:
        layers = tuple(sorted({int(tap) for tap in taps.split(",")}))
    except ValueError:
        layers = ()
    if not layers or not all(0 <= layer <= count for layer in layers):
        raise typer.BadParameter(
            f"found {taps!r}, allowed: comma separated layers from 0 to {count}",
            param_hint="--taps",
        )
    return layers


def _stores(work: Path) -> list[Path]:
    """Folders that hold answers."""
    files = work.glob("store*/sequences.jsonl")
    return sorted(file.parent for file in files if file.stat().st_size)


def _check_work(
    work: Path,
    target: Path,
    config: dict[str, Any],
    taps: tuple[int, ...],
    *,
    resume: bool,
    collects: bool,
    live: bool,
) -> None:
    """Refuses a folder that earlier runs with other options have left."""
    from heterospec_vllm.training import capture, checkpoint

    last = config["num_hidden_layers"]
    if resume:
        checkpoint.require_state(work)
    if collects:
        layers = sorted({*taps, last})
        meta = capture.store_meta(str(target), layers, config["hidden_size"])
        capture.require_same(work / STORE, meta)
    for folder in [] if live else _stores(work):
        if not (collects and folder.name == STORE):
            capture.require_layers(folder, taps, last)


def _only(prompts: list[Path] | None, where: torch.device) -> Path:
    """The file to collect answers to."""
    if where.type == "cuda":
        raise typer.BadParameter(
            "found cuda, where no prompts are answered, allowed: cpu, or --answers FILE "
            "(tools/answer_on_gpu.py writes one) and no --prompts",
            param_hint="--device",
        )
    if not prompts or len(prompts) != 1:
        raise typer.BadParameter(
            f"found {len(prompts or [])} files, allowed: one to collect answers to, or "
            "--collect-minutes 0, which trains on the answers that --work holds",
            param_hint="--prompts",
        )
    return prompts[0]


def _collect(
    target: Path,
    config: dict[str, Any],
    prompts: Path,
    answers: Path | None,
    store: Path,
    taps: tuple[int, ...],
    minutes: float,
    max_tokens: int,
    greedy_share: float,
    seed: int,
) -> None:
    from rich.console import Console
    from transformers import AutoTokenizer

    from heterospec_vllm.training import capture

    console = Console()
    layers = sorted({*taps, config["num_hidden_layers"]})
    jobs = capture.make_jobs(
        prompts,
        answers,
        AutoTokenizer.from_pretrained(target),
        seed=seed,
        greedy_share=greedy_share,
        max_prompt_tokens=1000,
    )
    features = capture.FeatureStore(store, str(target), layers, config["hidden_size"])

    def report(features: capture.FeatureStore, seconds: float, flying: int) -> None:
        console.print(
            f"{seconds / 60:.1f} of {minutes:g} min: {len(features.done)} answers, "
            f"{features.answer_tokens} tokens, {flying} in flight"
        )

    capture.collect(
        str(target), jobs, features,
        seconds=60 * minutes, max_tokens=max_tokens, seed=seed, report=report,
    )  # fmt: skip
    features.close()


def _evaluate(
    target: Path, head: Path, files: list[Path], max_tokens: int, limit: int | None
) -> None:
    if not files:
        raise typer.BadParameter(
            "found no file, allowed: one or more to measure --evaluate on", param_hint="--prompts"
        )
    inputs.require_config(target, "--target")
    inputs.require_config(head, "--evaluate")
    try:
        sets = [(file.stem, texts_of(file)[:limit]) for file in files]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--prompts") from error
    from rich.console import Console
    from rich.table import Table

    from heterospec_vllm.training.evaluate import measure, total

    results = measure(str(target), str(head), sets, num_speculative_tokens=4, max_tokens=max_tokens)
    table = Table("prompts", "requests", "tokens", "drafts", "1", "2", "3", "4")
    for result in [*results, total(results)]:
        counts = (result.prompts, result.tokens, result.drafts)
        rates = (f"{rate:.3f}" for rate in result.rates)
        table.add_row(result.name, *map(str, counts), *rates)
    Console().print(table)
