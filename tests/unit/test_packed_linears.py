# SPDX-License-Identifier: Apache-2.0
"""Which linear layers go through our products, and that these stand for vLLM's."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers import utils
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from heterospec_vllm import patching
from heterospec_vllm.kernels.cpu import packed_linear
from heterospec_vllm.kernels.cpu.library import is_available
from heterospec_vllm.layers import linears_cpu
from heterospec_vllm.layers.linears_cpu import DISPATCH

pytestmark = pytest.mark.skipif(not is_available(), reason="needs a C++ compiler")


@pytest.fixture
def isa(monkeypatch: pytest.MonkeyPatch):
    """Sets what the kernels say they were built for."""

    def named(name: str) -> None:
        monkeypatch.setattr(linears_cpu, "instruction_set", lambda: name)

    named("avx2")
    return named


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """The layers that were left to vLLM."""
    left: list = []

    def dispatch_cpu_unquantized_gemm(layer, remove_weight) -> None:
        left.append((layer, remove_weight))

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", dispatch_cpu_unquantized_gemm)
    applied = dict(patching._applied)
    patching._applied.pop(DISPATCH, None)
    yield left
    patching._applied.clear()
    patching._applied.update(applied)


def dispatched(columns=48, depth=32, dtype=torch.float32, bias=True, remove_weight=True):
    torch.manual_seed(0)
    layer = torch.nn.Linear(depth, columns, bias=bias, dtype=dtype)
    with linears_cpu.loading(), torch.no_grad():
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=remove_weight)
    return layer


@pytest.mark.parametrize("shape", [(5, 32), (32,), (2, 3, 32), (0, 32)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("remove_weight", [True, False])
@torch.no_grad()
def test_computes_the_layer(isa, theirs, shape, bias, remove_weight) -> None:
    layer = dispatched(bias=bias, remove_weight=remove_weight)
    assert not theirs
    torch.manual_seed(0)
    whole = torch.nn.Linear(32, 48, bias=bias)
    x = torch.randn(shape)
    got = utils.cpu_unquantized_gemm(layer, x, layer.weight, layer.bias)
    torch.testing.assert_close(got, whole(x))


@torch.no_grad()
def test_an_embedding_keeps_its_weight_and_is_packed_when_used(isa, theirs, monkeypatch) -> None:
    packs = []
    pack = linears_cpu.packed_linear.pack_weight
    monkeypatch.setattr(
        linears_cpu.packed_linear, "pack_weight", lambda w: packs.append(1) or pack(w)
    )
    layer = dispatched(remove_weight=False)
    assert layer.weight.shape == (48, 32) and not packs
    for _ in range(2):
        utils.cpu_unquantized_gemm(layer, torch.randn(2, 32), layer.weight, None)
    assert len(packs) == 1


@torch.no_grad()
def test_compiles_for_any_number_of_rows(isa, theirs) -> None:
    """One graph, as vLLM compiles it."""
    layer = dispatched()

    @torch.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    def forward(x: torch.Tensor) -> torch.Tensor:
        return utils.cpu_unquantized_gemm(layer, x * 2, layer.weight, layer.bias) + 1

    for rows in (3, 7):
        x = torch.randn(rows, 32)
        expected = utils.cpu_unquantized_gemm(layer, x * 2, layer.weight, layer.bias) + 1
        torch.testing.assert_close(forward(x), expected)


@pytest.mark.parametrize(
    ("name", "dtype", "ours"),
    [
        ("avx2", torch.bfloat16, True),
        ("avx512", torch.float32, True),
        ("avx512_bf16", torch.bfloat16, True),
        ("amx", torch.float32, True),
        ("amx", torch.bfloat16, False),
        ("avx2", torch.float16, False),
        ("portable", torch.float32, False),
    ],
)
def test_only_where_it_was_measured_to_be_faster(isa, theirs, name, dtype, ours) -> None:
    isa(name)
    dispatched(dtype=dtype)
    assert bool(theirs) is not ours


def test_what_does_not_fit_is_left_to_vllm(isa, theirs, monkeypatch) -> None:
    odd, remove = dispatched(columns=40), dispatched(remove_weight=False, depth=8)
    assert theirs == [(odd, True), (remove, False)]
    monkeypatch.setattr(linears_cpu, "unavailable_reason", lambda: "no compiler")
    dispatched()
    assert len(theirs) == 3


@torch.no_grad()
def test_only_layers_that_were_loaded_for_us_are_ours_and_stay_so(isa, theirs) -> None:
    """Whoever loads weights again, in whatever way, ends here; another engine's layers do, too."""
    layer, other = dispatched(), torch.nn.Linear(32, 48)
    packed = layer.weight
    utils.dispatch_cpu_unquantized_gemm(other, remove_weight=True)
    assert theirs == [(other, True)]
    layer.weight = torch.nn.Parameter(torch.randn(48, 32))
    expected = torch.nn.functional.linear(x := torch.randn(2, 32), layer.weight, layer.bias)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert theirs == [(other, True)] and layer.weight.shape == packed.shape
    got = utils.cpu_unquantized_gemm(layer, x, layer.weight, layer.bias)
    torch.testing.assert_close(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("ours", [True, False])
def test_copies_of_embeddings_are_renewed(isa, theirs, ours) -> None:
    """Tied to the embedding, an output weight changes without being loaded."""
    layer = dispatched(remove_weight=False, bias=False) if ours else torch.nn.Linear(32, 48)
    layer.quant_method = UnquantizedEmbeddingMethod()
    x = torch.randn(2, 32)
    if ours:
        utils.cpu_unquantized_gemm(layer, x, layer.weight, None)
    layer.weight.data.copy_(torch.randn(48, 32))
    linears_cpu.renew_embeddings(torch.nn.Sequential(layer))
    if ours:
        got = utils.cpu_unquantized_gemm(layer, x, layer.weight, None)
        torch.testing.assert_close(got, torch.nn.functional.linear(x, layer.weight))
    assert theirs == ([] if ours else [(layer, False)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_operator_is_the_launcher(dtype) -> None:
    """What a compiled graph calls, in C++, passes on the same arguments."""
    linears_cpu._implement_op()
    packed = packed_linear.pack_weight(torch.randn(48, 32).to(dtype))
    bias, wide = torch.randn(48).to(dtype), torch.randn(7, 80).to(dtype)
    for rows in (wide[:, 16:48], wide[:1, :32], wide[:0, :32]):
        for given in (None, bias):
            got = torch.ops.heterospec.packed_linear(rows, packed, given)
            assert torch.equal(got, packed_linear.packed_linear_cpu(rows, packed, given))


@torch.no_grad()
def test_the_operator_refuses_what_does_not_fit() -> None:
    linears_cpu._implement_op()
    operator = torch.ops.heterospec.packed_linear
    packed, rows = packed_linear.pack_weight(torch.zeros(48, 32)), torch.zeros(2, 32)
    for wrong in (
        (rows.bfloat16(), packed, None),
        (rows[:, :16], packed, None),
        (torch.zeros(32, 2).T, packed, None),
        (rows, packed, torch.zeros(32)),
        (rows.double(), packed.double(), None),
    ):
        with pytest.raises(RuntimeError, match="packed_linear: "):
            operator(*wrong)


WITHOUT_OPERATORS = """
import torch
from heterospec_vllm.layers import linears_cpu
from heterospec_vllm.kernels.cpu.packed_linear import pack_weight
def unavailable():
    raise linears_cpu.LibraryUnavailable("no headers")
linears_cpu.load_torch_ops = unavailable
linears_cpu._implement_op()
rows, weight = torch.randn(3, 32), torch.randn(48, 32)
torch.testing.assert_close(torch.ops.heterospec.packed_linear(rows, pack_weight(weight), None), rows @ weight.T)
"""


def test_without_the_operators_library_the_launcher_is_called() -> None:
    """In a process of its own: an operator is implemented once."""
    probe = [sys.executable, "-c", WITHOUT_OPERATORS]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
