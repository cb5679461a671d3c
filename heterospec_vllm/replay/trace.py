# SPDX-License-Identifier: Apache-2.0
"""Traces: every candidate that the head proposed, position by position, with nothing of the target but its tokens.

A trace is taken with wide trees of which nothing is verified, so that there is one draft at every position of every
answer. Whatever a policy would have chosen at a position can be replayed from it: the target's tokens are known.
Columns of the file (``heterospec calibrate --trace``; numpy ``.npz``):

* ``request`` ``[num_drafts]``: number of the request;
* ``position`` ``[num_drafts]``: place in the text of the root, the last token that is known when the draft begins;
* ``tokens``, ``log_probs``, ``entropies``, ``parents``, ``ranks`` ``[num_drafts, pool_size]``: the candidates in
  expansion order (see ``CandidatePool``);
* ``text``, ``text_start`` ``[num_requests + 1]``: token ids of prompts and answers, one after the other;
* ``answer_start`` ``[num_requests]``: first answer token of each request within its text;
* ``sampled`` ``[num_requests]``: 1 where the answer was sampled, 0 where it was greedy.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from heterospec_vllm.arrays import Floats, Ints
from heterospec_vllm.kernels import private_files

# What numpy raises for files that are empty, cut short, damaged, of another kind or with other columns.
_UNREADABLE = (
    OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """A recorded trace (columns: module docstring)."""

    request: Ints
    position: Ints
    tokens: Ints
    log_probs: Floats
    entropies: Floats
    parents: Ints
    ranks: Ints
    text: Ints
    text_start: Ints
    answer_start: Ints
    sampled: Ints

    def save(self, path: Path) -> None:
        """Writes the file atomically; it is private, since it holds prompts and answers."""
        columns = {name: getattr(self, name) for name in self.__dataclass_fields__}
        with private_files.beside(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **columns)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Raises ValueError naming the file for one that is no trace."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(**{name: file[name] for name in cls.__dataclass_fields__})
        except _UNREADABLE as error:
            raise ValueError(
                f"trace: found no readable trace at {path} ({error}), "
                "allowed: a file written by `heterospec calibrate --trace`"
            ) from None

    @cached_property
    def depths(self) -> Ints:
        """[num_drafts, pool_size] depth of each candidate, 1 for the root's children."""
        depths = np.ones(self.parents.shape, dtype=np.int64)
        rows = np.arange(self.parents.shape[0])
        for column in range(self.parents.shape[1]):
            parent = self.parents[:, column]
            above = depths[rows, np.maximum(parent, 0)]
            depths[:, column] = np.where(parent >= 0, above + 1, 1)
        return depths

    def accepted(self) -> np.ndarray:
        """[num_drafts, pool_size] candidates that lie on the answer's own path."""
        depths = self.depths
        start = self.text_start[self.request] + self.position
        stop = self.text_start[self.request + 1]
        at = start[:, None] + depths
        inside = at < stop[:, None]
        truth = self.text[np.minimum(at, self.text.size - 1)]
        match = (self.tokens == truth) & inside & (self.log_probs > -np.inf)
        on_path = np.zeros(match.shape, dtype=np.bool_)
        rows = np.arange(match.shape[0])
        for column in range(match.shape[1]):
            parent = self.parents[:, column]
            above = np.where(parent >= 0, on_path[rows, np.maximum(parent, 0)], True)
            on_path[:, column] = match[:, column] & above
        return on_path
