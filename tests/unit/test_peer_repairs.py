# SPDX-License-Identifier: Apache-2.0
"""Repairs of the peers: still needed, and right."""

import importlib
import inspect
import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from heterospec_vllm.bench import peer_repairs
from heterospec_vllm.bench.peer_repairs import expand

on_cpus = pytest.mark.skipif(not current_platform.is_cpu(), reason="of vLLM's CPU build")
TEMPERATURES = torch.tensor([0.5, -1.0, 0.7])
CUMULATIVE = torch.tensor([2, 2, 5], dtype=torch.int32)


def test_a_value_is_spread_over_the_draft_tokens_of_its_request() -> None:
    output = torch.full((5,), torch.nan)
    expand(output, TEMPERATURES, CUMULATIVE, -1, 1)
    assert output.tolist() == pytest.approx([0.5, 0.5, 0.7, 0.7, 0.7])
    replaced = torch.full((3,), torch.nan)
    expand(replaced, TEMPERATURES, torch.tensor([0, 2, 3]), -1, 1)
    assert replaced.tolist() == pytest.approx([1.0, 1.0, 0.7])
    counts = torch.zeros(3, dtype=torch.int32)
    expand(counts, torch.tensor([4, 9], dtype=torch.int32), torch.tensor([1, 3]), 0, 0)
    assert counts.tolist() == [4, 9, 9]


@on_cpus
def test_the_repair_is_still_needed_and_fits() -> None:
    """Fails when vLLM is repaired: remove the repair then."""
    stock = getattr(importlib.import_module(peer_repairs.MODULE), peer_repairs.NAME)
    assert list(inspect.signature(stock).parameters) == list(inspect.signature(expand).parameters)
    importlib.import_module("vllm._custom_ops")
    output = torch.full((5,), 7.0)
    stock(output, TEMPERATURES, CUMULATIVE, -1, 1)
    assert output.tolist() == [7.0] * 5


@on_cpus
def test_vllm_registers_the_repaired_kernel() -> None:
    code = (
        "from heterospec_vllm.bench.peer_repairs import repair_sampling_on_cpu\n"
        "repair_sampling_on_cpu()\n"
        "import torch\n"
        "from vllm.platforms import current_platform\n"
        "current_platform.register_triton_kernel_overrides()\n"
        "from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens as spread\n"
        "print(spread(torch.tensor([0.5, 0.7]), torch.tensor([1, 3], dtype=torch.int32), 3))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "tensor([0.5000, 0.7000, 0.7000])" in done.stdout, done.stderr[-2000:]
