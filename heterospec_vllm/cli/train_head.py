# SPDX-License-Identifier: Apache-2.0
"""`heterospec train-head`: trains, resumes and evaluates an EAGLE-3 head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from heterospec_vllm.training.loop import HeldOut, Trainer


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
            help="JSONL, a prompt a line: `id`, and `prompt` or `turns` (the first is used). "
            "With --evaluate: the prompt files to measure on; may be repeated.",
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
            help="Folder of answers and hidden states (`store*`) and of the training state."
        ),
    ] = Path("head-work"),
    output: Annotated[Path, typer.Option(help="The head is written here.")] = Path("head"),
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
        float, typer.Option(min=0.01, max=1, help="Loss weight of a step relative to the last.")
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
    checkpoint_minutes: Annotated[float, typer.Option(min=0.1)] = 5.0,
    seed: int = 0,
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
        raise typer.BadParameter("give --minutes or --epochs, not both")
    tap_layers = _tap_layers(target, taps)
    where, live = _where(device, features)
    answered = live and answers is not None  # then nothing has to be collected
    store = work / "store"
    if collect_minutes > 0 and (prompts or not (resume or answered)):
        if where.type == "cuda":
            raise typer.BadParameter(
                "answers are collected on CPUs only; on a GPU give --answers FILE "
                "(tools/answer_on_gpu.py writes one) and no --prompts"
            )
        if not prompts or len(prompts) != 1:
            raise typer.BadParameter(
                "one --prompts FILE is needed to collect answers (JSONL with `id` and `prompt` or "
                "`turns`); with --collect-minutes 0 the answers already in --work are used"
            )
        _collect(
            target, prompts[0], answers, store, tap_layers, collect_minutes, max_tokens,
            greedy_share, seed,
        )  # fmt: skip
    stores = sorted(path for path in work.glob("store*") if path.is_dir())
    if not stores and not answered:
        raise typer.BadParameter(f"--work {work} holds no answers: collect some first")
    from heterospec_vllm.training import recipe
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
    with _Display() as display:
        recipe.train(
            target,
            recipe.Material(stores, [answers] if answers else [], max_sequence, where, live),
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
        raise typer.BadParameter(f"--device: found {device!r}, allowed: auto, cpu, cuda")
    if features not in ("auto", "stored", "live"):
        raise typer.BadParameter(f"--features: found {features!r}, allowed: auto, stored, live")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: torch finds no GPU here")
    return torch.device(device), features == "live" or (features == "auto" and device == "cuda")


def _set_up_torch(threads: int) -> None:
    """Bound the threads and join the other processes of a `torchrun`."""
    import os

    import torch

    if threads:
        torch.set_num_threads(threads)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")


class _Display:
    """A progress bar with the time left; on a pipe rich prints the held-out lines only."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("{task.percentage:.1f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]:.0f} tokens/s, loss {task.fields[loss]:.3f}"),
        )
        self._task = self._bar.add_task("train", total=1.0, step=0, rate=0.0, loss=0.0)
        self._loss: float | None = None

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, trainer: Trainer, fraction: float, hits: list[float], loss: float) -> None:
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        p = trainer.progress
        self._bar.update(
            self._task,
            completed=fraction,
            step=p.step,
            rate=p.queries / max(p.seconds, 1e-9),
            loss=self._loss,
        )

    def held_out(self, result: HeldOut) -> None:
        rates = " / ".join(f"{rate:.3f}" for rate in result.acceptance)
        self._bar.console.print(
            f"held-out acceptance by position {rates} (loss {result.loss:.3f}, "
            f"{result.queries} positions)"
        )


def _tap_layers(target: Path, taps: str) -> tuple[int, ...]:
    import json

    count = json.loads((target / "config.json").read_text())["num_hidden_layers"]
    if not taps:
        return tuple(sorted({min(2, count), count // 2, min(count, count * 5 // 6 + 1), count}))
    try:
        layers = tuple(sorted({int(tap) for tap in taps.split(",")}))
    except ValueError:
        layers = ()
    if not layers or not all(0 <= layer <= count for layer in layers):
        raise typer.BadParameter(
            f"--taps: comma separated layers from 0 to {count} are allowed, found {taps!r}"
        )
    return layers


def _collect(
    target: Path,
    prompts: Path,
    answers: Path | None,
    store: Path,
    taps: tuple[int, ...],
    minutes: float,
    max_tokens: int,
    greedy_share: float,
    seed: int,
) -> None:
    import json

    from rich.console import Console
    from transformers import AutoTokenizer

    from heterospec_vllm.training import capture

    console = Console()
    config = json.loads((target / "config.json").read_text())
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
        raise typer.BadParameter("--evaluate needs at least one --prompts FILE")
    from rich.console import Console
    from rich.table import Table

    from heterospec_vllm.training.evaluate import measure, total

    results = measure(
        str(target), str(head), files,
        num_speculative_tokens=4, max_tokens=max_tokens, limit=limit,
    )  # fmt: skip
    table = Table("prompts", "requests", "tokens", "drafts", "1", "2", "3", "4")
    for result in [*results, total(results)]:
        counts = (result.prompts, result.tokens, result.drafts)
        rates = (f"{rate:.3f}" for rate in result.rates)
        table.add_row(result.name, *map(str, counts), *rates)
    Console().print(table)
