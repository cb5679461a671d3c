# SPDX-License-Identifier: Apache-2.0
"""What `gpu_check.py` compares and times: every kernel at serving sizes, and the bytes and flops it takes at least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from strata_mask_inputs import build as build_strata
from strata_mask_inputs import draft, eagle_parents
from tree_attention_inputs import TOLERANCES, Model, Request, build, random_tree

from heterospec_vllm.kernels.gpu.kv_compact import KVLayers, kv_compact, kv_compact_reference
from heterospec_vllm.kernels.gpu.topk_entropy import topk_entropy, topk_entropy_reference
from heterospec_vllm.kernels.gpu.tree_attention import tree_attention
from heterospec_vllm.kernels.gpu.tree_verify import tree_verify
from heterospec_vllm.kernels.reference.tree_verify import (
    SamplingKeys,
    TreeBatch,
    TreeWalks,
    tree_verify_reference,
)


@dataclass(frozen=True)
class Measured:
    """One kernel on tensors that exist."""

    run: Callable[[], object]
    reference: Callable[[], object] | None  # what is timed beside it; None where that takes minutes
    difference: Callable[[], str | None]  # what is wrong with the result, or None
    num_bytes: float
    flops: float
    launches: int


@dataclass(frozen=True)
class Case:
    kernel: str
    name: str
    make: Callable[[], Measured]


def all_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """small: sizes for the interpreter."""
    dtype = torch.float32 if small else torch.bfloat16
    for rows, vocab in [(4, 300)] if small else [(8, 32_000), (64, 32_000), (64, 128_256)]:
        yield Case("topk_entropy", f"{rows} rows of {vocab}", _topk(device, dtype, rows, vocab))
    verify = [(2, 4, 300)] if small else [(1, 16, 128_256), (16, 16, 128_256), (64, 8, 128_256)]
    for reqs, rows, vocab in verify:
        for temperature in (0.0, 1.0):
            name = f"{reqs} x {rows} rows of {vocab}, T={temperature:.0f}"
            yield Case("tree_verify", name, _verify(device, dtype, reqs, rows, vocab, temperature))
    for reqs, layers in [(2, 2)] if small else [(1, 32), (64, 32), (64, 80)]:
        name = f"{reqs} requests, {layers} layers"
        yield Case("kv_compact", name, _compact(device, dtype, reqs, layers))
    attention = [(2, 4, 40)] if small else [(1, 16, 1024), (1, 16, 16_384), (16, 16, 2048), (64, 8, 2048)]  # fmt: skip
    for reqs, rows, context in attention:
        name = f"{reqs} x {rows} rows behind {context}"
        yield Case("tree_attention", name, _attention(device, dtype, reqs, rows, context, small))
    for reqs in [2] if small else [1, 64]:
        yield Case("strata_mask", f"{reqs} pools of 136", _strata(device, reqs))


def _differs(got: torch.Tensor, expected: torch.Tensor, **tolerance: float) -> str | None:
    try:
        torch.testing.assert_close(got, expected, **tolerance)
    except AssertionError as error:
        return " ".join(str(error).split())[:300]
    return None


def _topk(device, dtype, rows: int, vocab: int) -> Callable[[], Measured]:
    def make() -> Measured:
        logits = torch.randn(rows, vocab, device=device).to(dtype)
        temperature = torch.zeros(rows, device=device)

        def plain() -> object:
            return logits.float().log_softmax(dim=-1).topk(8, dim=-1)

        def difference() -> str | None:
            got, expected = (
                topk_entropy(logits, temperature, 8),
                topk_entropy_reference(logits, temperature, 8),
            )
            # float32 sums of a vocabulary in another order than the reference's float64.
            close = {"rtol": 1e-4, "atol": 1e-4}
            return _differs(got.indices, expected.indices) or _differs(
                got.log_probs, expected.log_probs.float(), **close
            )

        size = logits.element_size()
        return Measured(
            lambda: topk_entropy(logits, temperature, 8),
            plain,
            difference,
            rows * vocab * size,
            4 * rows * vocab,
            launches=2,
        )

    return make


def _verify(
    device, dtype, reqs: int, rows: int, vocab: int, temperature: float
) -> Callable[[], Measured]:
    def make() -> Measured:
        logits = torch.randn(reqs * rows, vocab, device=device).to(dtype)
        parents = torch.tensor([random_tree(rows, seed=i) for i in range(reqs)])
        keys = SamplingKeys(
            torch.arange(reqs, device=device).repeat_interleave(rows).int(),
            torch.arange(reqs * rows, device=device),
            torch.full((reqs,), temperature, device=device),
            torch.arange(reqs, device=device),
        )
        tokens = torch.randint(vocab, (reqs, rows - 1), device=device)
        trees = TreeBatch(
            (torch.arange(reqs + 1, device=device) * rows).int(),
            tokens,
            parents.int().to(device),
            torch.full((reqs,), rows - 1, dtype=torch.int32, device=device),
        )
        # Half of the trees are walked: their nodes carry what their parents emit.
        out = TreeWalks.allocate(reqs, rows, device)
        _plant(logits, trees, keys, out)

        def difference() -> str | None:
            got = tree_verify(logits, trees, keys, out, apply_temperature=True)
            expected = TreeWalks.allocate(reqs, rows, device)
            tree_verify_reference(logits, trees, keys, expected, apply_temperature=True)
            if not (got.num_sampled > 1).any():
                return "no tree was walked, the case is void"
            return _differs(got.sampled, expected.sampled) or _differs(got.rows, expected.rows)

        return Measured(
            lambda: tree_verify(logits, trees, keys, out, apply_temperature=True),
            lambda: logits.float().argmax(dim=-1),
            difference,
            reqs * rows * vocab * logits.element_size(),
            reqs * rows * vocab * (30 if temperature else 1),
            launches=2,
        )

    return make


def _plant(logits, trees: TreeBatch, keys: SamplingKeys, out: TreeWalks) -> None:
    """Give the first node below each even request's root the token that the root emits."""
    tree_verify(logits, trees, keys, out, apply_temperature=True)
    trees.tokens[::2, 0] = out.sampled[::2, 0]


def _compact(device, dtype, reqs: int, layers: int) -> Callable[[], Measured]:
    def make() -> Measured:
        num_kv_heads, block_size, channels, rows = 8, 16, 256, 16
        shape = (2 * reqs, num_kv_heads, block_size, channels)
        caches = [torch.randn(shape, device=device).to(dtype) for _ in range(layers)]
        start = (torch.arange(reqs + 1, device=device) * rows).int()
        slots = torch.arange(reqs * rows, device=device)
        # Three of the accepted rows lie off their place.
        walked = torch.tensor([[0, 2, 5, 9]], dtype=torch.int32, device=device).repeat(reqs, 1)
        num_sampled = torch.full((reqs,), 4, dtype=torch.int32, device=device)

        def difference() -> str | None:
            ours, theirs = [c.clone() for c in caches], [c.clone() for c in caches]
            kv_compact(KVLayers.of(ours), slots, start, walked, num_sampled)
            kv_compact_reference(KVLayers.of(theirs), slots, start, walked, num_sampled)
            return _differs(torch.stack(ours), torch.stack(theirs), rtol=0, atol=0)

        held = KVLayers.of(caches)
        moved = 3 * reqs * layers * num_kv_heads * channels * caches[0].element_size()
        return Measured(
            lambda: kv_compact(held, slots, start, walked, num_sampled),
            None,
            difference,
            2 * moved,
            0,
            launches=1,
        )

    return make


def _attention(device, dtype, reqs: int, rows: int, context: int, small: bool):
    def make() -> Measured:
        model = Model(
            group=4, num_kv_heads=2 if small else 8, head_size=64 if small else 128, dtype=dtype
        )
        requests = [Request(context, random_tree(rows, seed=i)) for i in range(reqs)]
        inputs = build(device, model, requests, num_splits=None)  # type: ignore[arg-type]
        length = context + rows
        heads = model.num_kv_heads * model.group
        shape = (reqs, heads, rows, model.head_size)
        query = torch.randn(shape, device=device).to(dtype)
        dense = torch.randn(reqs, heads, length, model.head_size, device=device).to(dtype)
        mask = torch.rand(reqs, 1, rows, length, device=device) < 0.9

        def plain() -> object:
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(query, dense, dense, attn_mask=mask)

        def difference() -> str | None:
            some = build(device, model, requests[:2], num_splits=None)  # type: ignore[arg-type]
            return _differs(some.run(), some.expected(), **TOLERANCES[dtype])

        output = torch.empty_like(inputs.query)
        workspace = inputs.plan.workspace(len(output), device)

        def run() -> None:
            tree_attention(output=output, plan=inputs.plan, workspace=workspace, **inputs.tensors())

        size = inputs.query.element_size()
        keys = 2 * reqs * length * model.num_kv_heads * model.head_size * size
        return Measured(
            run,
            plain,
            difference,
            keys + 2 * inputs.query.numel() * size,
            4 * reqs * rows * heads * length * model.head_size,
            launches=1 if inputs.plan.num_splits == 1 else 2,
        )

    return make


def _strata(device, reqs: int) -> Callable[[], Measured]:
    def make() -> Measured:
        drafts = [draft(eagle_parents(8, 3, seed=i), seed=i) for i in range(reqs)]
        inputs = build_strata(device, drafts)

        def difference() -> str | None:
            got, expected = inputs.run(), inputs.expected()
            close = {"rtol": 1e-6, "atol": 1e-6}
            return _differs(got.survivals, expected.survivals, **close) or _differs(
                got.ancestor_mask, inputs.selected(got).ancestor_mask
            )

        pool = inputs.candidates.parents.shape[1]
        return Measured(inputs.run, None, difference, reqs * pool * 40, 0, launches=1)

    return make
