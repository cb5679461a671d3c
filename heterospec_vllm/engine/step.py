# SPDX-License-Identifier: Apache-2.0
"""What the hooks of one step share, and small functions over vLLM's records."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput

from heterospec_vllm.arrays import Ints
from heterospec_vllm.compiled import compiled
from heterospec_vllm.engine.pending import MatchedDrafts
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify.walk import Walk


@compiled("i8[::1](i4[:], i4[:], i4[:])")
def prompt_left(
    num_prompt_tokens,  # [num_reqs]
    num_computed_tokens,  # [num_reqs or more] before the step
    query_start_loc,  # [num_reqs + 1 or more]
):
    """[num_reqs] tokens of each prompt that later steps read."""
    out = np.empty(num_prompt_tokens.size, np.int64)
    for req in range(out.size):
        done = num_computed_tokens[req] + query_start_loc[req + 1] - query_start_loc[req]
        out[req] = max(0, num_prompt_tokens[req] - done)
    return out


@compiled("Tuple((i8[::1], i8[::1]))(i8[:], i8[:], i8[:,:], i8[:])")
def walked_rows(
    starts,  # [num_reqs + 1] where each request's rows of the step start
    root_rows,  # [num_reqs]
    rows,  # [num_reqs, max_emitted] visited rows of each tree
    num_emitted,  # [num_reqs]
):
    """The step's rows with accepted tokens (those before each root and the visited ones), their number by request."""
    num_reqs = root_rows.size
    num_tokens = np.empty(num_reqs, np.int64)
    total = 0
    for req in range(num_reqs):
        num_tokens[req] = root_rows[req] - starts[req] + num_emitted[req]
        total += num_tokens[req]
    out = np.empty(total, np.int64)
    at = 0
    for req in range(num_reqs):
        for row in range(starts[req], root_rows[req]):
            out[at] = row
            at += 1
        for depth in range(num_emitted[req]):
            out[at] = root_rows[req] + rows[req, depth]
            at += 1
    return out, num_tokens


@dataclass
class Step:
    """What the hooks of one step share: trees in batch order and where their rows lie."""

    matched: MatchedDrafts = field(default_factory=MatchedDrafts)  # the drafts that it verifies
    num_tokens: int = 0  # scheduled, drafts included
    trees: DraftTrees | None = (
        None  # [num_reqs], in the order of the batch; None where nothing is verified
    )
    num_masked_reqs: int = 0  # leading requests that attend by a mask
    root_rows: Ints | None = None  # [num_reqs] token row of each root
    walked: Walk | None = None
    kinds: Ints | None = None  # [num_reqs] below NUM_KINDS (policy/survival.py)

    def attending(self) -> DraftTrees:
        """The trees of the leading requests that attend by a mask, empty ones among them."""
        count = self.num_masked_reqs
        if self.trees is None:
            return DraftTrees.empty(count)
        if count == self.trees.num_reqs:
            return self.trees
        return self.trees.take(np.arange(count), self.trees.num_nodes[:count])


def accepted_rows(step: Step, starts: Ints) -> tuple[Ints, Ints]:
    """(rows of the step that hold accepted tokens, request by request, number of them for each request)."""
    if step.walked is None:
        return np.arange(starts[-1]), np.diff(starts)
    assert step.root_rows is not None
    return walked_rows(starts, step.root_rows, step.walked.rows, step.walked.num_emitted)


def with_drafts(
    scheduler_output: SchedulerOutput, verified: dict[str, list[int]]
) -> SchedulerOutput:
    """A copy of the scheduler's output that verifies these drafts instead of its own."""
    num_scheduled = dict(scheduler_output.num_scheduled_tokens)
    total = scheduler_output.total_num_scheduled_tokens
    for req_id, token_ids in scheduler_output.scheduled_spec_decode_tokens.items():
        dropped = len(token_ids) - len(verified.get(req_id, ()))
        num_scheduled[req_id] -= dropped
        total -= dropped
    return replace(
        scheduler_output,
        num_scheduled_tokens=num_scheduled,
        total_num_scheduled_tokens=total,
        scheduled_spec_decode_tokens=verified,
    )


def without_speculation(vllm_config: VllmConfig) -> VllmConfig:
    """A shallow copy whose only use is to be asked whether speculation is configured."""
    plain = copy(vllm_config)
    plain.speculative_config = None
    return plain
