# SPDX-License-Identifier: Apache-2.0
"""An alarm for drafts of which next to nothing is accepted: the answers are right, and the head runs for nothing."""

from __future__ import annotations

import logging

# A child of vLLM's logger, so that its handlers and levels apply.
logger = logging.getLogger("vllm.heterospec")

# Drafts that are looked at together, and the accepted nodes a draft below which something is wrong. A head that fits
# has 0.5 to 4; one of another model has about as many as tokens drawn by lot.
WINDOW = 400
LEAST_ACCEPTED = 0.03


class AcceptanceAlarm:
    """On while hardly any draft node is accepted; says so once."""

    def __init__(self) -> None:
        self.on = False
        self._was_said = False
        self._num_trees = self._num_accepted = 0

    def walked(self, num_trees: int, num_accepted: int) -> None:
        """A step verified so many drafts and accepted so many of their nodes."""
        self._num_trees += num_trees
        self._num_accepted += num_accepted
        if self._num_trees < WINDOW:
            return
        self.on = self._num_accepted < LEAST_ACCEPTED * self._num_trees
        if self.on and not self._was_said:
            self._was_said = True
            logger.warning(
                "heterospec: of the last %d drafts %d tokens were accepted in all. Answers are right, but drafting "
                "gains nothing. Likely causes: a draft head of another model, other aux layers than it was trained "
                "with, another chat template, or text unlike what it was trained on.",
                self._num_trees,
                self._num_accepted,
            )
        self._num_trees = self._num_accepted = 0
