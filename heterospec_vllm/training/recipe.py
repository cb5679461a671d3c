# SPDX-License-Identifier: Apache-2.0
"""From feature stores to an exported head: what ``heterospec train-head`` runs after collecting."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from heterospec_vllm.kernels import private_files
from heterospec_vllm.training import checkpoint
from heterospec_vllm.training.data import (
    Corpus,
    StoredFeatures,
    Target,
    answered_sequences,
    stored_sequences,
)
from heterospec_vllm.training.init import (
    draft_vocabulary,
    fit_fc,
    head_config,
    init_from_target,
    load_target,
    special_tokens,
)
from heterospec_vllm.training.inputs import InputError, answer_lines
from heterospec_vllm.training.live import LiveFeatures
from heterospec_vllm.training.loop import HeldOut, Trainer, TrainOptions
from heterospec_vllm.training.model import Eagle3Head

HELD_OUT = 25  # one prompt in that many
VOCABULARY = "draft_vocabulary.json"
LOG = "log.jsonl"


@dataclass(frozen=True)
class TrainingInputs:
    """What is trained on, and where: stores of a collecting pass, or answers to run the target on.

    live: hidden states are computed for every batch (``live``) instead of read from the stores,
    of which only the sequences are used then.
    """

    stores: list[Path]
    answers: list[Path]
    max_tokens: int
    device: torch.device
    live: bool

    def corpus(self, target_folder: Path, layers: list[int]) -> Corpus:
        if not self.live:
            # Read before the features are mapped: a growing store writes those first.
            stored = list(stored_sequences(self.stores, max_tokens=self.max_tokens))
            return Corpus(stored, StoredFeatures(self.stores), held_out=HELD_OUT)
        sequences = answered_sequences(self.answers, self.stores, max_tokens=self.max_tokens)
        features = LiveFeatures(target_folder, layers, self.device, torch.bfloat16)
        return Corpus(sequences, features, held_out=HELD_OUT)


def choose_vocabulary(
    work: Path, corpus: Corpus, answers: list[Path], special: list[int], size: int, vocab: int
) -> Tensor:
    """The draft vocabulary of this work folder: counted once, then kept, so a run can resume."""
    path = work / VOCABULARY
    if not path.exists():
        counts: Counter[int] = corpus.answer_counts()
        for file in answers:
            for line in answer_lines(file):
                counts.update(line["o"])
        path.write_text(json.dumps(draft_vocabulary(counts, special, size, vocab).tolist()))
    return torch.tensor(json.loads(path.read_text()))


def start_head(head: Eagle3Head, target_folder: Path, target: Target, corpus: Corpus) -> None:
    """The best linear guess (``fit_fc``) over a quiet copy of the target's last layer."""
    config = json.loads((target_folder / "config.json").read_text())
    taps = head.config.taps
    init_from_target(head, target_folder, target, config["num_hidden_layers"] - 1, 0.003)
    columns = [corpus.features.layers.index(tap) for tap in taps]
    features, goals = [], []
    for sequence in corpus.train[:300]:
        x = corpus.features.of([sequence])[0]
        features.append(x[sequence.first : -1, columns].flatten(1))
        goals.append(x[sequence.first + 1 :, -1])
    fit_fc(head, torch.cat(features), torch.cat(goals), 1e-3)


def train(
    target_folder: Path,
    material: TrainingInputs,
    work: Path,
    output: Path,
    options: TrainOptions,
    *,
    taps: tuple[int, ...],
    draft_vocab_size: int,
    kv_heads: int | None,
    resume: bool,
    report: Callable[[Trainer, float, list[float], float], None],
    on_held_out: Callable[[HeldOut], None],
) -> HeldOut | None:
    """Trains (or resumes) in ``work`` and exports the averaged weights at every checkpoint.

    ``work`` holds the draft vocabulary, the resumable state and ``log.jsonl``, one line per
    checkpoint. Stores are read anew before every epoch: they may still be growing. Returns the last
    held-out acceptance, None in workers other than the first.
    """
    torch.manual_seed(options.seed)
    work.mkdir(mode=0o700, parents=True, exist_ok=True)

    config = json.loads((target_folder / "config.json").read_text())
    layers = sorted({*taps, config["num_hidden_layers"]})
    corpus = material.corpus(target_folder, layers)
    if not corpus.train:
        raise InputError(
            "--max-sequence",
            f"found {material.max_tokens}, which leaves no answer to train on "
            f"({len(corpus.held_out)} held out), allowed: more tokens than the prompts have, and "
            "more than a few answers",
        )

    def reload() -> Corpus:
        return corpus if material.live else material.corpus(target_folder, layers)

    draft_ids = choose_vocabulary(
        work,
        corpus,
        [] if material.live else material.answers,  # else they are in the corpus
        special_tokens(config),
        draft_vocab_size,
        config["vocab_size"],
    )
    target = load_target(target_folder, config, draft_ids, material.device)
    changes = {"num_key_value_heads": kv_heads} if kv_heads else {}
    head = Eagle3Head(head_config(config, taps, len(draft_ids), **changes), target.embed)
    head.to(material.device)
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
        with open(work / LOG, "a", opener=private_files.opener) as log:
            log.write(json.dumps(record) + "\n")
        on_held_out(latest[0])

    trainer.run(reload, report, on_checkpoint)
    if dist.is_initialized():
        dist.barrier()  # a worker that ends early would have the others stopped
    return latest[0] if latest else None
