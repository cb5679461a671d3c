# SPDX-License-Identifier: Apache-2.0
"""The training loop: schedule, optimiser, averaging, held-out acceptance, checkpoints."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from heterospec_vllm.training import checkpoint
from heterospec_vllm.training.data import Corpus, Sequence, Target, plan
from heterospec_vllm.training.inputs import InputError
from heterospec_vllm.training.model import Eagle3Head


@dataclass(frozen=True)
class TrainOptions:
    """How to train; every field is an option of ``heterospec train-head``."""

    minutes: float | None  # length of the schedule in training time; or
    epochs: int | None  # in passes over the corpus
    ttt_steps: int
    step_decay: float  # weight of a step's loss relative to the step before
    keep_rank: int  # a query goes on while the true token is among the head's first this many
    learning_rate: float
    matrix_learning_rate: float  # 0: AdamW for everything, else Muon for the layer's matrices
    batch_tokens: int
    average: float  # decay of the moving average of the weights
    seed: int
    checkpoint_minutes: float
    sync_steps: int = 8  # with several workers: steps between two averagings of the weights


@dataclass
class Progress:
    step: int = 0
    epoch: int = 0
    group: int = 0  # next group of this epoch
    seconds: float = 0.0  # training time; pauses of the process do not count
    queries: int = 0


@dataclass(frozen=True)
class HeldOut:
    """acceptance[j]: share of queries whose first j + 1 greedy drafts are the target's tokens."""

    acceptance: list[float]
    loss: float
    queries: int


class Trainer:
    """Trains ``head`` on ``corpus``; ``reload`` is asked for the corpus before every epoch."""

    def __init__(
        self,
        head: Eagle3Head,
        target: Target,
        draft_ids: Tensor,
        options: TrainOptions,
        work: Path,
    ) -> None:
        self.head, self.target, self.draft_ids = head, target, draft_ids
        self.options, self.work = options, work
        self.device = target.embed.device
        self.progress = Progress()
        self.average = {name: p.detach().clone() for name, p in head.named_parameters()}
        self.optimizers = make_optimizers(head, options)
        self._step_seconds: list[float] = []
        several = dist.is_initialized()
        self.rank = dist.get_rank() if several else 0
        self.workers = dist.get_world_size() if several else 1

    def state(self) -> dict[str, Any]:
        return {
            "head": self.head.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "progress": asdict(self.progress),
            "rng": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._require_fitting(state)
        self.head.load_state_dict(state["head"])
        self.average = {name: p.to(self.device) for name, p in state["average"].items()}
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            rates = [group["base_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["base_lr"] = rate  # a resumed run may ask for another one
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["rng"])

    def _require_fitting(self, state: dict[str, Any]) -> None:
        """Refuses the state of a run with other options."""
        path = self.work / checkpoint.STATE
        for name, weights in self.head.state_dict().items():
            found = tuple(state["head"][name].shape) if name in state["head"] else None
            if found != tuple(weights.shape):
                raise InputError(
                    "--resume",
                    f"{path}: found {name} of shape {found}, allowed: {tuple(weights.shape)}, "
                    "which this run's --target, --taps and --kv-heads ask for",
                )
        if len(state["optimizers"]) != len(self.optimizers):
            rate = self.options.matrix_learning_rate
            allowed = "0" if rate > 0 else "more than 0"
            raise InputError(
                "--matrix-learning-rate",
                f"found {rate}, allowed: {allowed}, which {path} was begun with",
            )

    def fraction(self, groups: int) -> float:
        """Part of the schedule done, 0 to 1."""
        o, p = self.options, self.progress
        if o.epochs is not None:
            return (p.epoch * groups + p.group) / max(1, o.epochs * groups)
        assert o.minutes is not None
        return p.seconds / (60 * o.minutes)

    def run(
        self,
        reload: Callable[[], Corpus],
        report: Callable[[Trainer, float, list[float], float], None],
        on_checkpoint: Callable[[Trainer], None],
    ) -> None:
        """Trains to the end of the schedule.

        ``report(trainer, fraction, accuracy by step, loss)`` after every step; ``on_checkpoint``
        after every checkpoint (the state is on disk by then).
        """
        saved = time.monotonic()
        corpus = reload()
        groups = self._groups(corpus)
        while (fraction := self.fraction(len(groups))) < 1 or self._between_syncs():
            loss, hits = self.train_step(corpus, groups[self.progress.group], min(1.0, fraction))
            self.progress.group += 1
            if not self._between_syncs():
                self._synchronize()
            report(self, fraction, hits, loss)
            if time.monotonic() - saved > 60 * self.options.checkpoint_minutes and self.rank == 0:
                self.save()
                on_checkpoint(self)
                saved = time.monotonic()
            if self.progress.group == len(groups):
                self.progress.epoch += 1
                self.progress.group = 0
                corpus = reload()
                groups = self._groups(corpus)
        if self.rank == 0:
            self.save()
            on_checkpoint(self)

    def _groups(self, corpus: Corpus) -> list[list[Sequence]]:
        """This worker's share of the epoch; all workers have the same number of groups."""
        groups = plan(corpus.train, self.options.batch_tokens, self._epoch_seed())
        share = groups[self.rank :: self.workers][: len(groups) // self.workers]
        if not share:
            raise InputError(
                "--batch-tokens",
                f"found {self.options.batch_tokens}, which makes {len(groups)} batches, allowed: "
                f"a number that makes one or more for each of {self.workers} workers",
            )
        return share

    def _between_syncs(self) -> bool:
        return self.workers > 1 and self.progress.step % self.options.sync_steps != 0

    @torch.no_grad()
    def _synchronize(self) -> None:
        """Averages the workers' weights (local SGD) and their clocks, so all stop together."""
        if self.workers == 1:
            return
        clock = torch.tensor([self.progress.seconds])
        flat = torch.cat([p.flatten() for p in self.head.parameters()] + [clock])
        dist.all_reduce(flat)
        flat /= self.workers
        start = 0
        for p in self.head.parameters():
            p.copy_(flat[start : start + p.numel()].view_as(p))
            start += p.numel()
        self.progress.seconds = flat[-1].item()

    def save(self) -> None:
        checkpoint.save_state(self.work, self.state())

    def train_step(
        self, corpus: Corpus, group: list[Sequence], fraction: float
    ) -> tuple[float, list[float]]:
        o, start = self.options, time.monotonic()
        scale = min(1.0, (self.progress.step + 1) / 30) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fraction))
        )
        for optimizer in self.optimizers:
            for param_group in optimizer.param_groups:
                param_group["lr"] = param_group["base_lr"] * scale
        batch = corpus.batch(group, self.target, self.head.config.taps)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss, results = self.head(batch, o.ttt_steps, decay=o.step_decay, keep_rank=o.keep_rank)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            # A short memory at first: the start must not linger in the average.
            decay = min(o.average, (1 + self.progress.step) / (10 + self.progress.step))
            for name, p in self.head.named_parameters():
                self.average[name].lerp_(p, 1 - decay)
        self.progress.step += 1
        self.progress.queries += results[0].queries
        self.progress.seconds += self._counted(time.monotonic() - start)
        return loss.item(), [r.hits.float().mean().item() for r in results]

    def _counted(self, seconds: float) -> float:
        """The step's time; of a process that was stopped meanwhile, a usual step's time."""
        recent = self._step_seconds[-20:]
        if len(recent) == 20 and seconds > 10 * statistics.median(recent):
            seconds = statistics.median(recent)
        self._step_seconds = [*recent, seconds]
        return seconds

    def _epoch_seed(self) -> int:
        return self.options.seed * 1000 + self.progress.epoch

    @torch.no_grad()
    def held_out(self, corpus: Corpus, *, batches: int) -> HeldOut:
        """Of the averaged weights, on held-out sequences answered at temperature 0."""
        mine = {name: p.detach().clone() for name, p in self.head.named_parameters()}
        self.head.load_state_dict(self.average)
        groups = plan([s for s in corpus.held_out if s.greedy], self.options.batch_tokens)
        groups = groups[:: max(1, len(groups) // batches)]
        steps = self.options.ttt_steps
        hits, loss, queries = torch.zeros(steps, device=self.device), 0.0, 0
        for group in groups:
            batch = corpus.batch(group, self.target, self.head.config.taps)
            with torch.autocast(self.device.type, torch.bfloat16):
                _, results = self.head(batch, steps, decay=1.0, keep_rank=1)
            for j, result in enumerate(results):
                hits[j] += result.hits.sum()
            loss += results[0].loss.item()
            queries += results[0].queries
        self.head.load_state_dict(mine)
        return HeldOut((hits / max(1, queries)).tolist(), loss / max(1, queries), queries)


def make_optimizers(head: Eagle3Head, o: TrainOptions) -> list[torch.optim.Optimizer]:
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, p in head.named_parameters():
        inner = p.dim() == 2 and name != "lm_head.weight" and o.matrix_learning_rate > 0
        (matrices if inner else others).append(p)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            others, lr=o.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=o.matrix_learning_rate,
                weight_decay=0.0,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers
