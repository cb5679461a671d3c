# SPDX-License-Identifier: Apache-2.0
"""Batches for the trainer from a feature store (see ``capture``)."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from heterospec_vllm.training.capture import FEATURES, META, SEQUENCES, read_jsonl
from heterospec_vllm.training.model import Batch


@dataclass(frozen=True)
class Sequence:
    """One training sequence; ``first`` is its first query (predicts the second answer token)."""

    id: str
    ids: list[int]
    first: int
    rows: int
    store: int
    row: int
    greedy: bool


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


class Corpus:
    """Sequences of one or more stores that captured the same layers of the same target."""

    def __init__(self, folders: list[Path], *, max_tokens: int, held_out: int) -> None:
        """``held_out``: one id in that many (by hash, so stable as the data grows) is not trained.

        ``max_tokens``: longer sequences are cut; one whose prompt leaves no query is left out.
        """
        self.layers: list[int] = []
        self._maps: list[np.memmap] = []
        self.train: list[Sequence] = []
        self.held_out: list[Sequence] = []
        for number, folder in enumerate(folders):
            meta = json.loads((folder / META).read_text())
            if self.layers and meta["layers"] != self.layers:
                raise ValueError(f"{folder} holds layers {meta['layers']}, others {self.layers}")
            self.layers = meta["layers"]
            shape = (len(self.layers), meta["hidden_size"])
            lines = list(read_jsonl(folder / SEQUENCES))
            rows = lines[-1]["row"] + lines[-1]["n"] if lines else 0
            self._maps.append(
                np.memmap(folder / FEATURES, dtype=np.int16, mode="r", shape=(rows, *shape))
            )
            for line in lines:
                ids = (line["p"] + line["o"])[:max_tokens]
                rows, first = min(line["n"], len(ids)), len(line["p"]) - 1
                if rows - 1 <= first:
                    continue
                sequence = Sequence(
                    line["id"], ids, first, rows, number, line["row"], line["t"] == 0.0
                )
                digest = hashlib.sha256(line["id"].encode()).digest()
                held = int.from_bytes(digest[:4], "big") % held_out == 0
                (self.held_out if held else self.train).append(sequence)

    def answer_counts(self) -> Counter[int]:
        counts: Counter[int] = Counter()
        for sequence in self.train:
            counts.update(sequence.ids[sequence.first + 1 :])
        return counts

    def features(self, sequence: Sequence) -> Tensor:
        """[rows, layers, hidden_size] in bf16."""
        rows = self._maps[sequence.store][sequence.row : sequence.row + sequence.rows]
        return torch.from_numpy(np.array(rows)).view(torch.bfloat16)

    def batch(self, group: list[Sequence], target: Target, taps: tuple[int, ...]) -> Batch:
        columns = [self.layers.index(tap) for tap in taps]
        length = max(s.rows for s in group)
        size, hidden = len(group), target.embed.shape[1]
        ids = torch.zeros(size, length + 1, dtype=torch.long)
        features = torch.zeros(size, length, len(taps) * hidden, dtype=torch.bfloat16)
        log_p = torch.empty(size, length, len(target.draft_head), dtype=torch.bfloat16)
        for n, s in enumerate(group):
            x = self.features(s)
            ids[n, : len(s.ids)] = torch.tensor(s.ids[: length + 1])
            features[n, : s.rows] = x[:, columns].flatten(1)
            rows = slice(s.first + 1, s.rows)
            final = rms_norm(
                x[rows, -1].float(), target.norm.shape, target.norm, target.eps
            ).bfloat16()
            logits = final @ target.draft_head.T
            log_p[n, rows] = logits.float().log_softmax(-1).bfloat16()
        return Batch(
            ids=ids,
            features=features,
            first=torch.tensor([s.first for s in group]),
            rows=torch.tensor([s.rows for s in group]),
            log_p=log_p.flatten(0, 1),
            truth=target.to_draft[ids],
        )


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
