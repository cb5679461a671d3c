# SPDX-License-Identifier: Apache-2.0
"""Records of tree verification, and the truth that `tree_verify` is tested against: plain PyTorch."""

from dataclasses import dataclass

import torch

_UINT32 = 0xFFFFFFFF


@dataclass(frozen=True)
class TreeBatch:
    """The trees of a step and how their rows lie in it; everything on one device, filled by the runner.

    A request's rows are its root and then its nodes, parents first. Capacities may exceed the step:
    a request without rows emits nothing, and rows of the logits that no request has are mapped to -1.
    """

    cu_num_logits: (
        torch.Tensor
    )  # [num_reqs + 1] int32, first logits row of each request, then the end
    tokens: torch.Tensor  # [num_reqs, max_nodes] int64 draft token of each node
    parents: torch.Tensor  # [num_reqs, max_nodes + 1] int32 parent row, -1 for the root
    num_nodes: torch.Tensor  # [num_reqs] int32, at most the request's rows - 1


@dataclass(frozen=True)
class SamplingKeys:
    """What, beside the logits, decides which token a row emits; named and laid out as in vLLM."""

    expanded_idx_mapping: torch.Tensor  # [num_rows] int32 request state of each row, -1: no row
    positions: torch.Tensor  # [num_rows] int64 position of the row's own token
    temperature: torch.Tensor  # [max_num_reqs] float32, by request state; 0: greedy
    seeds: torch.Tensor  # [max_num_reqs] int64, by request state


@dataclass(frozen=True)
class TreeWalks:
    """What the walks emitted; column d is the row visited at depth d. -1 beyond `num_sampled`."""

    sampled: torch.Tensor  # [num_reqs, max_depth + 1] int64 emitted tokens
    rows: torch.Tensor  # [num_reqs, max_depth + 1] int32 visited rows of the tree, 0 = its root
    logits_rows: torch.Tensor  # [num_reqs, max_depth + 1] int32 the same as rows of the logits
    num_sampled: torch.Tensor  # [num_reqs] int32 accepted draft tokens + 1; 0 without rows
    last_sampled: torch.Tensor  # [num_reqs] int64 the last emitted token, -1 if there is none

    @classmethod
    def allocate(cls, num_reqs: int, max_depth: int, device: torch.device) -> "TreeWalks":
        """Uninitialised buffers, for CUDA graphs that must write to the same addresses."""
        shape = (num_reqs, max_depth + 1)
        return cls(
            torch.empty(shape, dtype=torch.int64, device=device),
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.empty(num_reqs, dtype=torch.int32, device=device),
            torch.empty(num_reqs, dtype=torch.int64, device=device),
        )


def _hash_round(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """One body round of MurmurHash3 x86_32; uint32 values held in int64."""
    word = (word * 0xCC9E2D51) & _UINT32
    word = ((word << 15 | word >> 17) & _UINT32) * 0x1B873593 & _UINT32
    state = state ^ word
    return ((state << 13 | state >> 19) & _UINT32) * 5 + 0xE6546B64 & _UINT32


def uniform_noise(
    # [num_rows] int64
    seeds: torch.Tensor,
    # [num_rows] int64
    positions: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """[num_rows, vocab_size] float32 in (0, 1): what the noise of each row and token is made of."""
    state = torch.zeros_like(seeds)
    for word in (seeds, seeds >> 32, positions):
        state = _hash_round(state, word & _UINT32)
    tokens = torch.arange(vocab_size, device=seeds.device)
    state = _hash_round(state[:, None], tokens) ^ 16
    state = (state ^ state >> 16) * 0x85EBCA6B & _UINT32
    state = (state ^ state >> 13) * 0xC2B2AE35 & _UINT32
    state = state ^ state >> 16
    high, low = (state >> 16).float(), (state & 0xFFFF).float()
    return high * 2**-16 + (low + 0.5) * 2**-32


def gumbel_noise(uniform: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, -log(-log1p(-u)), float32, in the steps that the kernel (and vLLM) takes."""
    series = torch.full_like(uniform, 1 / 8)
    for term in range(7, 0, -1):
        series = 1 / term + uniform * series
    direct = torch.log(torch.clamp(1 - uniform, min=2**-24))
    return -torch.log(-torch.where(uniform < 0.25, -uniform * series, direct))


def sample_rows_reference(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    keys: SamplingKeys,
    *,
    apply_temperature: bool,
) -> torch.Tensor:
    """[num_rows] int64: the token each row emits, the first of equals; -1 where there is no row."""
    present = keys.expanded_idx_mapping >= 0
    state = keys.expanded_idx_mapping.clamp(min=0).long()
    temperature = keys.temperature[state][:, None]
    scores = logits.float()
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    noise = gumbel_noise(uniform_noise(keys.seeds[state], keys.positions, logits.shape[1]))
    divisor = torch.where((temperature == 0) | (not apply_temperature), 1.0, temperature)
    scores = torch.where(temperature == 0, scores, scores / divisor + noise)
    return scores.argmax(dim=-1).masked_fill(~present, -1)


def tree_verify_reference(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    trees: TreeBatch,
    keys: SamplingKeys,
    out: TreeWalks,
    *,
    apply_temperature: bool,
) -> TreeWalks:
    """What `tree_verify` does (same arguments), one request and one depth at a time."""
    row_tokens = sample_rows_reference(logits, keys, apply_temperature=apply_temperature).tolist()
    for tensor in (out.sampled, out.rows, out.logits_rows, out.last_sampled):
        tensor.fill_(-1)
    starts = trees.cu_num_logits.tolist()
    for req, first in enumerate(starts[:-1]):
        num_rows = starts[req + 1] - first
        num_nodes = min(int(trees.num_nodes[req]), num_rows - 1)
        drafted, parents = trees.tokens[req].tolist(), trees.parents[req].tolist()
        row: int | None = 0 if num_rows > 0 else None
        depth = 0
        while row is not None and depth < out.sampled.shape[1]:
            token = row_tokens[first + row]
            out.sampled[req, depth] = out.last_sampled[req] = token
            out.rows[req, depth] = row
            out.logits_rows[req, depth] = first + row
            children = range(row + 1, num_nodes + 1)
            row = next((c for c in children if parents[c] == row and drafted[c - 1] == token), None)
            depth += 1
        out.num_sampled[req] = depth
    return out
