# SPDX-License-Identifier: Apache-2.0
"""From feature stores to an exported head: what ``heterospec train-head`` runs after collecting."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from heterospec_vllm.training import checkpoint
from heterospec_vllm.training.capture import read_jsonl
from heterospec_vllm.training.data import Corpus, Target
from heterospec_vllm.training.init import (
    draft_vocabulary,
    fit_fc,
    head_config,
    init_from_target,
    load_target,
)
from heterospec_vllm.training.loop import HeldOut, Trainer, TrainOptions
from heterospec_vllm.training.model import Eagle3Head

VOCABULARY = "draft_vocabulary.json"
LOG = "log.jsonl"


def choose_vocabulary(
    work: Path, corpus: Corpus, answers: Path | None, special: list[int], size: int, vocab: int
) -> Tensor:
    """The draft vocabulary of this work folder: counted once, then kept, so a run can resume."""
    path = work / VOCABULARY
    if not path.exists():
        counts: Counter[int] = corpus.answer_counts()
        for line in read_jsonl(answers) if answers else ():
            counts.update(line["o"])
        path.write_text(json.dumps(draft_vocabulary(counts, special, size, vocab).tolist()))
    return torch.tensor(json.loads(path.read_text()))


def start_head(head: Eagle3Head, target_folder: Path, target: Target, corpus: Corpus) -> None:
    """The best linear guess (``fit_fc``) over a quiet copy of the target's last layer."""
    config = json.loads((target_folder / "config.json").read_text())
    taps = head.config.taps
    init_from_target(head, target_folder, target, config["num_hidden_layers"] - 1, 0.003)
    columns = [corpus.layers.index(tap) for tap in taps]
    features, goals = [], []
    for sequence in corpus.train[:300]:
        x = corpus.features(sequence)
        features.append(x[sequence.first : -1, columns].flatten(1))
        goals.append(x[sequence.first + 1 :, -1])
    fit_fc(head, torch.cat(features), torch.cat(goals), 1e-3)


def train(
    target_folder: Path,
    stores: list[Path],
    work: Path,
    output: Path,
    options: TrainOptions,
    *,
    taps: tuple[int, ...],
    draft_vocab_size: int,
    kv_heads: int | None,
    answers: Path | None,
    resume: bool,
    max_tokens: int,
    report: Callable[[Trainer, float, list[float], float], None],
    on_held_out: Callable[[HeldOut], None],
) -> HeldOut | None:
    """Trains (or resumes) in ``work`` and exports the averaged weights at every checkpoint.

    ``work`` holds the draft vocabulary, the resumable state and ``log.jsonl``, one line per
    checkpoint. The stores are read anew before every epoch: they may still be growing. Returns the
    last held-out acceptance, None in workers other than the first.
    """
    torch.manual_seed(options.seed)
    work.mkdir(parents=True, exist_ok=True)

    def reload() -> Corpus:
        return Corpus(stores, max_tokens=max_tokens, held_out=25)

    corpus = reload()
    config = json.loads((target_folder / "config.json").read_text())
    special = [config[name] for name in ("bos_token_id", "eos_token_id")]
    draft_ids = choose_vocabulary(
        work, corpus, answers, special, draft_vocab_size, config["vocab_size"]
    )
    target = load_target(target_folder, config, draft_ids)
    changes = {"num_key_value_heads": kv_heads} if kv_heads else {}
    head = Eagle3Head(head_config(config, taps, len(draft_ids), **changes), target.embed)
    if not resume:
        start_head(head, target_folder, target, corpus)
    trainer = Trainer(head, target, draft_ids, options, work)
    if resume:
        trainer.restore(checkpoint.load_state(work))
    latest: list[HeldOut] = []

    def on_checkpoint(trainer: Trainer) -> None:
        latest[:] = [trainer.held_out(corpus, batches=8)]
        checkpoint.export(trainer.average, head.config, draft_ids, output)
        record = {"time": time.time(), **asdict(trainer.progress), **asdict(latest[0])}
        with open(work / LOG, "a") as log:
            log.write(json.dumps(record) + "\n")
        on_held_out(latest[0])

    trainer.run(reload, report, on_checkpoint)
    if dist.is_initialized():
        dist.barrier()  # a worker that ends early would have the others stopped
    return latest[0] if latest else None
