# SPDX-License-Identifier: Apache-2.0
"""The trainer on a terminal."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from heterospec_vllm.training.loop import HeldOut, Trainer


class Display:
    """A progress bar with the time left; on a pipe rich prints the held-out lines only."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("{task.percentage:.1f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]:.0f} tokens/s, loss {task.fields[loss]:.3f}"),
        )
        self._task = self._bar.add_task("train", total=1.0, step=0, rate=0.0, loss=0.0)
        self._loss: float | None = None

    def __enter__(self) -> Display:
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
