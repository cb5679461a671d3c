# SPDX-License-Identifier: Apache-2.0
"""Which tokens may follow a node: what a grammar allows behind the node's path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from heterospec_vllm.arrays import NO_ROW, Floats, Ints, Ints32

# Tokens behind those that a request has emitted; () is the root's.
Path = tuple[int, ...]


@dataclass(frozen=True)
class TokenMasks:
    """Masks over the target's vocabulary, packed as xgrammar packs them: bit 1 is an allowed token."""

    bits: Ints32  # [num_masks, num_words]
    of_row: Ints32  # [num_rows] the mask of each row, NO_ROW where every token is allowed

    def only_tokens(self) -> Ints:
        """[num_rows] the token of each row that allows a single one, NO_ROW elsewhere."""
        words = self.bits.view(np.uint32)
        single = np.bitwise_count(words).sum(axis=1) == 1
        tokens = np.full(single.size + 1, NO_ROW)  # the last for rows without a mask
        for mask in np.flatnonzero(single).tolist():
            word = int(words[mask].argmax())
            tokens[mask] = 32 * word + int(words[mask, word]).bit_length() - 1
        return tokens[self.of_row]


class Constraints(Protocol):
    """What is known of the requests' grammars, for drafting."""

    def masks_behind(
        self,
        req_ids: list[str],  # [num_rows] whose rows they are
        paths: list[Path],  # [num_rows]
    ) -> TokenMasks | None:
        """The masks of the tokens behind each row's path; None where none of the requests has a grammar."""


def put_only_tokens(
    masks: TokenMasks,
    tokens: Ints,  # [num_rows, top_k] written
    log_probs: Floats,  # [num_rows, top_k] written
) -> None:
    """A single allowed token is certain, whether the head's vocabulary has it or not."""
    only = masks.only_tokens()
    rows = np.flatnonzero(only != NO_ROW)
    tokens[rows, 0] = only[rows]
    log_probs[rows] = -np.inf
    log_probs[rows, 0] = 0.0
