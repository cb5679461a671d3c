# SPDX-License-Identifier: Apache-2.0
"""The linear layers of a model on CPU through our products, where they are the faster ones.

A tree is cheap where a step of several rows takes little longer than one of a single row. vLLM's products (oneDNN) read
a weight and multiply one after the other, and take the instructions made for bfloat16 where those are the slower ones;
ours fetch what comes next meanwhile and take the faster ones (docs/results/2026-11-28-products). A row's result does
not depend on how many rows there are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from heterospec_vllm.kernels.cpu import packed_linear
from heterospec_vllm.kernels.cpu.library import (
    LibraryUnavailable,
    instruction_set,
    load_torch_ops,
    unavailable_reason,
)
from heterospec_vllm.patching import Wrap

logger = init_logger(__name__)

# Measured against vLLM's products; those on AMX tiles are faster, elsewhere and in float16 nothing was measured.
_WORTH = {
    "amx": (torch.float32,),
    "avx512_bf16": (torch.float32, torch.bfloat16),
    "avx512": (torch.float32, torch.bfloat16),
    "avx2": (torch.float32, torch.bfloat16),
}

# Set on a layer that was loaded for us.
_OURS = "_heterospec_packed"

_library = torch.library.Library("heterospec", "DEF")
_library.define("packed_linear(Tensor rows, Tensor packed, Tensor? bias) -> Tensor")


@torch.library.register_fake("heterospec::packed_linear")
def _shape(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return rows.new_empty((rows.shape[0], packed.shape[0] * packed_linear.LANES))


@functools.cache
def _implement_op() -> None:
    """Once a process; in C++ the arguments of a call, a hundred a step, take a third of the time."""
    try:
        load_torch_ops()
    except LibraryUnavailable as error:
        logger.info("heterospec: our CPU products are called through Python: %s", error)
        _library.impl("packed_linear", packed_linear.packed_linear_cpu, "CPU")


def _packed_linear(
    # [..., depth]
    x: torch.Tensor,
    # as packed
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    out = torch.ops.heterospec.packed_linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], out.shape[-1])


# Models whose loading goes on now, one inside another.
_num_loading = 0


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """The linear layers of models that are loaded meanwhile are ours, now and whenever they are loaded again.

    Raises ValueError where vLLM's dispatch cannot be wrapped.
    """
    global _num_loading
    reason = DISPATCH.reason()
    if reason is not None:
        raise ValueError(f"heterospec: {reason}")
    DISPATCH.apply()
    _num_loading += 1
    try:
        yield
    finally:
        _num_loading -= 1


@torch.no_grad()
def renew_embeddings(model: Any) -> None:
    """Drops the packed copies of embeddings and output weights after a model's weights were loaded again.

    An output weight that is the embedding's is not loaded again, so vLLM keeps the copy that its product made of it.
    """
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, UnquantizedEmbeddingMethod) and not layer.weight.is_meta:
            method.process_weights_after_loading(layer)


def packed_weight(layer: Any) -> torch.Tensor | None:
    """A layer's weight as `pack_weight` left it, if the layer goes through our product."""
    is_ours = getattr(layer, "cpu_linear", None) is _packed_linear
    return layer.weight.data if is_ours else None


def _wrap_dispatch(original: Callable[..., None]) -> Callable[..., None]:
    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        if not _num_loading and not getattr(layer, _OURS, False):
            return original(layer, remove_weight)
        # Its weight has this layout from now on, so a reload must pack it, too, whoever starts one.
        setattr(layer, _OURS, True)
        reason = _misfit(layer)
        if reason is not None:
            logger.debug("heterospec: a linear layer goes through vLLM's product: %s", reason)
            return original(layer, remove_weight)
        _implement_op()
        logger.info_once("heterospec: linear layers go through our CPU products")
        if remove_weight:
            layer.weight = torch.nn.Parameter(
                packed_linear.pack_weight(layer.weight.data), requires_grad=False
            )
            layer.cpu_linear = _packed_linear
        else:
            # An embedding, whose rows are looked up; few are multiplied with, so packed when that happens.
            packed = functools.cache(lambda: packed_linear.pack_weight(layer.weight.data))
            layer.cpu_linear = lambda x, weight, bias: _packed_linear(x, packed(), bias)
        return None

    return dispatch_cpu_unquantized_gemm


def _misfit(layer: Any) -> str | None:
    """Why our product cannot or should not take a layer, or None where it should."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if weight.is_meta:
        return "it has no weight"
    reason = unavailable_reason() or packed_linear.misfit(weight)
    if reason is None and weight.dtype not in _WORTH.get(instruction_set(), ()):
        reason = f"nothing is to be gained for {weight.dtype} with {instruction_set()}"
    if reason is None and bias is not None and bias.dtype != weight.dtype:
        reason = f"the bias is {bias.dtype}"
    return reason


# Applied when our runner first loads a model; layers of other models go to vLLM's.
DISPATCH = Wrap(
    module="vllm.model_executor.layers.utils",
    owner=None,
    name="dispatch_cpu_unquantized_gemm",
    parameters=("layer", "remove_weight"),
    why="It picks the product of each linear layer on CPU and knows no other than vLLM's.",
    remove_when="vLLM lets a plugin register a CPU product, or its own overlaps reading a weight "
    "with multiplying.",
    make=_wrap_dispatch,
)
