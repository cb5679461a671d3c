# SPDX-License-Identifier: Apache-2.0
"""Text goes to the op that is clearly the faster one, decided when an engine starts."""

import pytest
import torch

from heterospec_vllm.kernels.cpu.library import is_available
from heterospec_vllm.layers import op_choice
from heterospec_vllm.layers.op_choice import DECODES, PROMPTS, OpChoice, choose_op
from heterospec_vllm.layers.op_timing import Case, Heads, Timing, build_calls
from heterospec_vllm.tree import trees as tree_trees
from heterospec_vllm.tree.rows import place_rows

HEADS = Heads(4, 2, 64)
needs_kernel = pytest.mark.skipif(not is_available(), reason="needs a C++ compiler")


@pytest.mark.parametrize(
    ("decodes", "prompts", "choice"),
    [
        (0.8, 0.5, OpChoice(True, True)),
        (0.99, 0.5, OpChoice(False, True)),  # alike: vLLM's
        (0.8, 1.3, OpChoice(True, False)),
        (1.0, 1.0, OpChoice(False, False)),
    ],
)
def test_ours_where_it_is_clearly_faster(monkeypatch, decodes, prompts, choice) -> None:
    ratios = {DECODES: decodes, PROMPTS: prompts}

    def measure(case: Case, *args, **kwargs) -> Timing:
        return Timing(vllm=2.0, ours=2.0 * ratios[case])

    monkeypatch.setattr(op_choice, "measure", measure)
    assert choose_op(HEADS, torch.float32, "vec") == choice


@needs_kernel
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("context", [0, 7, 130])
def test_text_in_pieces_is_what_vllm_computes(rows: int, context: int) -> None:
    """`build_calls` compares the outputs of both ops: 1e-2, though float32 differs by less than 1e-5."""
    torch.manual_seed(0)
    case = Case(context=context, rows=rows, requests=2)
    calls = build_calls(case, HEADS, torch.float32, piece_rows=32, copies=2, check=True)
    assert len(calls.ours) == len(calls.vllm) == 2


@needs_kernel
def test_a_wrong_mask_is_noticed(monkeypatch) -> None:
    """The comparison above can fail."""
    right = place_rows

    def blind(*args):
        positions, starts, seq_lens, masks, reqs = right(*args)
        return positions, starts, seq_lens, masks & -2, reqs  # nobody sees a piece's first row

    monkeypatch.setattr(tree_trees, "place_rows", blind)
    with pytest.raises(AssertionError):
        build_calls(Case(0, 40, 1), HEADS, torch.float32, piece_rows=32, copies=1, check=True)
