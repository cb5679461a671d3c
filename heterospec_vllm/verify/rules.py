# SPDX-License-Identifier: Apache-2.0
"""What a request's parameters make of its logits: penalties, bad words, minimum lengths, biases, allowed tokens.

A walk visits one row a depth, so each visited row has one past: the request's outputs and what the walk emitted. Counts
are kept token by token; vLLM counts [num_reqs, vocab_size] anew in every step.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from vllm.sampling_params import SamplingParams

from heterospec_vllm.arrays import Ints
from heterospec_vllm.kernels.cpu.structs import STRUCTS
from heterospec_vllm.kernels.cpu.walk import num_words_of

_RULES = STRUCTS["RowRules"]
UNUSED = bytes(_RULES.size)  # of a request without rules


def has_rules(params: SamplingParams) -> bool:
    """Whether anything here changes a request's logits."""
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.min_tokens
        or params.bad_words_token_ids
        or params.logit_bias
        or params.allowed_token_ids
    )


class RequestRules:
    """One request's rules as the C++ walk reads them, and the counts behind its penalties."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Iterable[int],
        vocab_size: int,
    ) -> None:
        self._params = params
        self._penalties = (
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        self._counts_outputs = self._penalties != (1.0, 0.0, 0.0)
        prompt: Ints = np.empty(0, np.int64)
        if params.repetition_penalty != 1.0:
            prompt = np.unique(np.fromiter(prompt_token_ids, np.int64))
        self._prompt = prompt[(prompt >= 0) & (prompt < vocab_size)]
        stops = params.all_stop_token_ids if params.min_tokens else ()
        self._stops = np.array([t for t in sorted(stops) if t < vocab_size], np.int64)
        biases = params.logit_bias or {}
        self._bias_tokens = np.array(list(biases), np.int64)
        self._biases = np.array(list(biases.values()), np.float32)
        self._allowed = _packed(params.allowed_token_ids, vocab_size)
        words = params.bad_words_token_ids or []
        self._bad_words = np.array([token for word in words for token in word], np.int64)
        self._bad_word_starts = np.cumsum([0, *map(len, words)], dtype=np.int64)
        self._num_back = max(map(len, words), default=1) - 1  # tokens that bad words look back
        self._past = np.empty(0, np.int64)
        # Of each token emitted so far, in the order of their first: the token and its count.
        self._places: dict[int, int] = {}
        self._tokens = np.empty(64, np.int64)
        self._counts = np.empty(64, np.int64)
        self._num_followed = 0

    def packed(
        self,
        output_token_ids: list[int],  # all that the request has emitted
    ) -> bytes:
        """`RowRules` for the next walk; it points into this object."""
        self._follow(output_token_ids)
        repetition, presence, frequency = self._penalties
        return _RULES.pack(
            1,
            repetition,
            presence,
            frequency,
            self._prompt.size,
            len(self._places),
            self._prompt.ctypes.data,
            self._tokens.ctypes.data,
            self._counts.ctypes.data,
            max(0, self._params.min_tokens - len(output_token_ids)),
            self._stops.size,
            self._stops.ctypes.data,
            self._bias_tokens.size,
            self._bias_tokens.ctypes.data,
            self._biases.ctypes.data,
            0 if self._allowed is None else self._allowed.ctypes.data,
            self._bad_word_starts.size - 1,
            self._bad_word_starts.ctypes.data,
            self._bad_words.ctypes.data,
            self._past.size,
            self._past.ctypes.data,
        )

    def _follow(self, output_token_ids: list[int]) -> None:
        if self._num_back:
            self._past = np.array(output_token_ids[-self._num_back :], np.int64)
        if not self._counts_outputs:
            return
        for token in output_token_ids[self._num_followed :]:
            place = self._places.get(token)
            if place is None:
                place = self._places[token] = len(self._places)
                if place == self._tokens.size:
                    self._tokens = np.resize(self._tokens, 2 * place)
                    self._counts = np.resize(self._counts, 2 * place)
                self._tokens[place] = token
                self._counts[place] = 0
            self._counts[place] += 1
        self._num_followed = len(output_token_ids)


def _packed(token_ids: list[int] | None, vocab_size: int) -> np.ndarray | None:
    """[num_words] uint32 with bit 1 for the tokens; None where all are allowed."""
    if not token_ids:
        return None
    allowed = np.zeros(num_words_of(vocab_size) * 32, np.bool_)
    allowed[token_ids] = True
    return np.packbits(allowed, bitorder="little").view(np.uint32)
