# SPDX-License-Identifier: Apache-2.0
"""Batches for the trainer: sequences, and the target's hidden states from a store or from the target."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from heterospec_vllm.training.capture import FEATURES, META, SEQUENCES, read_jsonl
from heterospec_vllm.training.inputs import answer_lines
from heterospec_vllm.training.model import TrainingBatch


@dataclass(frozen=True)
class Sequence:
    """One training sequence; ``first`` is its first query (predicts the second answer token).

    ``rows``: tokens that have hidden states; ``store`` and ``row``: where a store keeps them.
    """

    id: str
    ids: list[int]
    first: int
    rows: int
    greedy: bool
    store: int = 0
    row: int = 0


@dataclass(frozen=True)
class Target:
    """What the trainer needs of the target: its embedding, output rows and final norm.

    embed: [vocab, hidden_size]; draft_head: [draft_vocab, hidden_size], its output rows for the
    draft vocabulary, bf16; to_draft: [vocab] draft id of a token, -1 for other words.
    """

    embed: Tensor
    draft_head: Tensor
    norm: Tensor
    eps: float
    to_draft: Tensor


class FeatureSource(Protocol):
    """Hidden states of sequences; ``layers`` names them, the last is the output of the last layer."""

    layers: list[int]

    def of(self, group: list[Sequence]) -> Tensor:
        """[len(group), most rows, layers, hidden_size] in bf16, rows right-padded with anything."""


class StoredFeatures:
    """Read from the stores that a collecting pass wrote (format: ``capture``)."""

    def __init__(self, folders: list[Path]) -> None:
        self.layers: list[int] = []
        self._maps: list[np.memmap] = []
        for folder in folders:
            meta = json.loads((folder / META).read_text())
            if self.layers and meta["layers"] != self.layers:
                raise ValueError(f"{folder} holds layers {meta['layers']}, others {self.layers}")
            self.layers = meta["layers"]
            row = (len(self.layers), meta["hidden_size"])
            file = folder / FEATURES
            rows = file.stat().st_size // (2 * row[0] * row[1])
            self._maps.append(np.memmap(file, dtype=np.int16, mode="r", shape=(rows, *row)))

    def of(self, group: list[Sequence]) -> Tensor:
        shape = self._maps[0].shape[1:]
        found = torch.zeros(len(group), max(s.rows for s in group), *shape, dtype=torch.bfloat16)
        for n, s in enumerate(group):
            rows = np.array(self._maps[s.store][s.row : s.row + s.rows])
            found[n, : s.rows] = torch.from_numpy(rows).view(torch.bfloat16)
        return found


def stored_sequences(folders: list[Path], *, max_tokens: int) -> Iterator[Sequence]:
    """The sequences of ``folders``; longer ones are cut, one without a query is left out."""
    for number, folder in enumerate(folders):
        for line in read_jsonl(folder / SEQUENCES):
            rows = min(line["n"], max_tokens)
            yield from _sequence(line, rows, max_tokens, store=number, row=line["row"])


def answered_sequences(
    files: list[Path], folders: Iterable[Path] = (), *, max_tokens: int
) -> Iterator[Sequence]:
    """The same of the user's files of answers and of stores, where hidden states are computed."""
    given = [answer_lines(file) for file in files]
    own = [read_jsonl(folder / SEQUENCES) for folder in folders]
    for line in chain(*given, *own):
        rows = min(len(line["p"]) + len(line["o"]), max_tokens)
        yield from _sequence(line, rows, max_tokens)


def _sequence(
    line: dict[str, Any], rows: int, max_tokens: int, store: int = 0, row: int = 0
) -> Iterator[Sequence]:
    first = len(line["p"]) - 1
    if rows - 1 > first:
        ids = (line["p"] + line["o"])[:max_tokens]
        yield Sequence(line["id"], ids, first, rows, line["t"] == 0.0, store, row)


class Corpus:
    """Sequences to train on and held-out ones, and where their hidden states come from."""

    def __init__(
        self, sequences: Iterable[Sequence], features: FeatureSource, *, held_out: int
    ) -> None:
        """``held_out``: one prompt in that many is not trained.

        It goes by a hash of the id up to a ``#``, so it is stable as the data grows and further
        answers to a prompt (``id#2``) are held out with it.
        """
        self.features = features
        self.train: list[Sequence] = []
        self.held_out: list[Sequence] = []
        for sequence in sequences:
            digest = hashlib.sha256(sequence.id.partition("#")[0].encode()).digest()
            held = int.from_bytes(digest[:4], "big") % held_out == 0
            (self.held_out if held else self.train).append(sequence)

    def answer_counts(self) -> Counter[int]:
        counts: Counter[int] = Counter()
        for sequence in self.train:
            counts.update(sequence.ids[sequence.first + 1 :])
        return counts

    @torch.no_grad()
    def batch(self, group: list[Sequence], target: Target, taps: tuple[int, ...]) -> TrainingBatch:
        """On the device of ``target``."""
        device = target.embed.device
        columns = [self.features.layers.index(tap) for tap in taps]
        x = self.features.of(group).to(device)
        size, length = x.shape[:2]
        ids = padded_ids(group, length + 1).to(device)
        first = torch.tensor([s.first for s in group], device=device)
        rows = torch.tensor([s.rows for s in group], device=device)
        position = torch.arange(length, device=device)
        predicted = (position > first[:, None]) & (position < rows[:, None])
        final = rms_norm(
            x[..., -1, :][predicted].float(), target.norm.shape, target.norm, target.eps
        )
        logits = final.bfloat16() @ target.draft_head.T
        log_p = logits.new_empty(size, length, len(target.draft_head))
        log_p[predicted] = logits.float().log_softmax(-1).bfloat16()
        return TrainingBatch(
            ids=ids,
            features=x[:, :, columns].flatten(2),
            first=first,
            rows=rows,
            log_p=log_p.flatten(0, 1),
            truth=target.to_draft[ids],
        )


def padded_ids(group: list[Sequence], width: int) -> Tensor:
    """[len(group), width] token ids, cut or padded with 0 on the right."""
    ids = torch.zeros(len(group), width, dtype=torch.long)
    for row, sequence in zip(ids, group, strict=True):
        known = sequence.ids[:width]
        row[: len(known)] = torch.tensor(known)
    return ids


def plan(sequences: list[Sequence], tokens: int, seed: int | None = None) -> list[list[Sequence]]:
    """Groups of similar length with at most ``tokens`` padded rows each (at least one sequence).

    With a seed the neighbours vary and the groups are shuffled: one epoch's order.
    """
    rng = random.Random(seed)
    spread = 0.0 if seed is None else 0.1
    keyed = sorted(((s.rows * (1 + spread * rng.random()), s) for s in sequences), key=_first)
    groups: list[list[Sequence]] = []
    group: list[Sequence] = []
    for _, sequence in keyed:
        if group and max(s.rows for s in [*group, sequence]) * (len(group) + 1) > tokens:
            groups.append(group)
            group = []
        group.append(sequence)
    if group:
        groups.append(group)
    if seed is not None:
        rng.shuffle(groups)
    return groups


def _first(pair: tuple[float, Sequence]) -> float:
    return pair[0]
