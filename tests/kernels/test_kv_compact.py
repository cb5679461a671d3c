# SPDX-License-Identifier: Apache-2.0
"""KV moves on the device: Triton against the reference, in every order of memory."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heterospec_vllm.kernels.gpu import kv_compact as ops

NUM_BLOCKS, NUM_HEADS, BLOCK_SIZE, CHANNELS = 9, 5, 16, 136
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64]
# Orders in which vLLM may lay out [block, head, slot, channel] of one layer, and a transposed one.
ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2)]


def _layers(device, dtype=torch.bfloat16, order=(0, 1, 2, 3), count=3, seed=0) -> ops.KVLayers:
    """Random bit patterns, NaN among them, as logical views of memory ordered by `order`.

    The layers lie in one buffer with gaps between them, like views of a page that layers share.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_BLOCKS, NUM_HEADS, BLOCK_SIZE, CHANNELS)
    stored = [shape[axis] for axis in order]
    back = [order.index(axis) for axis in range(4)]
    width = torch.empty(0, dtype=dtype).element_size()
    size = (stored[0], count, *stored[1:3], stored[3] * width)
    memory = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).to(device)
    shared = memory.view(dtype)
    return ops.KVLayers.of([shared[:, layer].permute(back) for layer in range(count)])


def _bits(layers: ops.KVLayers) -> list[torch.Tensor]:
    """Comparable although patterns may be NaN."""
    return [cache.contiguous().view(torch.uint8) for cache in layers.caches]


def _int32(values, device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _check(device, layers_of, paths: list[list[int]], slots: list[list[int]], max_emitted=8):
    """`paths`: visited rows of each request, root first; `slots`: of its token rows."""
    rows = _int32([p + [-1] * (max_emitted - len(p)) for p in paths], device)
    arguments = (
        torch.tensor([s for own in slots for s in own], dtype=torch.int64, device=device),
        _int32([0, *itertools.accumulate(len(s) for s in slots)], device),
        rows.reshape(len(paths), max_emitted),
        _int32([len(p) for p in paths], device),
    )
    got, expected = layers_of(), layers_of()
    ops.kv_compact(got, *arguments)
    ops.kv_compact_reference(expected, *arguments)
    for a, b in zip(_bits(got), _bits(expected), strict=True):
        assert torch.equal(a, b)
    return got


@st.composite
def _steps(draw) -> tuple[list[list[int]], list[list[int]]]:
    """Rising paths through trees of up to 20 rows, slots scattered over the pages."""
    free = draw(st.permutations(range(NUM_BLOCKS * BLOCK_SIZE)))
    paths, slots = [], []
    for _ in range(draw(st.integers(0, 4))):
        num_rows = draw(st.integers(1, 20))
        visited = draw(st.sets(st.integers(1, max(num_rows - 1, 1)), max_size=min(7, num_rows - 1)))
        paths.append([0, *sorted(visited)])
        slots.append(free[:num_rows])
        free = free[num_rows:]
    return paths, slots


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(dtype=st.sampled_from(DTYPES), order=st.sampled_from(ORDERS), step=_steps())
def test_equals_the_reference(device, dtype, order, step) -> None:
    """Whatever must not be written is compared too: all of every page."""
    _check(device, lambda: _layers(device, dtype, order), *step)


def test_chained_moves_read_before_they_are_overwritten(device) -> None:
    """Every source is the previous move's neighbour: 2 to 1, 3 to 2, ... 8 to 7."""
    path = [0, *range(2, 9)]
    before = _layers(device)
    got = _check(device, lambda: _layers(device), [path], [list(range(20, 29))])
    for layer, old in zip(_bits(got), _bits(before), strict=True):
        pages, were = (x.transpose(1, 2).reshape(-1, NUM_HEADS, CHANNELS * 2) for x in (layer, old))
        assert torch.equal(pages[21:28], were[22:29])


def test_any_permutation_is_safe(device) -> None:
    """Not a tree's path: sources below their targets, a cycle. The claim is that order never matters."""
    layers, before = _layers(device), _layers(device)
    ops.kv_compact(
        layers,
        torch.arange(30, 36, device=device),
        _int32([0, 6], device),
        _int32([[0, 3, 1, 2, 5, 4]], device),
        _int32([6], device),
    )
    for layer, old in zip(_bits(layers), _bits(before), strict=True):
        pages, were = (x.transpose(1, 2).reshape(-1, NUM_HEADS, CHANNELS * 2) for x in (layer, old))
        assert torch.equal(pages[30:36], were[[30, 33, 31, 32, 35, 34]])


@pytest.mark.parametrize(
    "paths",
    [[[0]], [[0, 1, 2, 3]], [[], [0]], [[0], [0, 1]]],
    ids=["rejected", "in place", "no rows", "batch"],
)
def test_in_place_paths_change_nothing(device, paths) -> None:
    before = _layers(device)
    slots = [list(range(10 * i, 10 * i + 4)) for i in range(len(paths))]
    got = _check(device, lambda: _layers(device), paths, slots)
    for a, b in zip(_bits(got), _bits(before), strict=True):
        assert torch.equal(a, b)


def test_tokens_without_a_slot_stay(device) -> None:
    layers, before = _layers(device), _layers(device)
    ops.kv_compact(
        layers,
        torch.tensor([5, -1, 7, 8], device=device),
        _int32([0, 4], device),
        _int32([[0, 2, 3]], device),  # row 2 to row 1, which has none; row 3 to row 2
        _int32([3], device),
    )
    for layer, old in zip(_bits(layers), _bits(before), strict=True):
        pages, were = (x.transpose(1, 2).reshape(-1, NUM_HEADS, CHANNELS * 2) for x in (layer, old))
        were[7] = were[8]
        assert torch.equal(pages, were)


def test_32_bit_slots_and_spare_columns(device) -> None:
    layers, expected = _layers(device), _layers(device)
    wide = _int32([[0, 4, -9, -9], [0, 2, 3, -9]], device)
    slots = _int32([9, 8, 7, 6, 5, 40, 41, 42, 43, 44], device)
    arguments = (slots, _int32([0, 5, 10], device), wide[:, :3], _int32([2, 3], device))
    ops.kv_compact(layers, *arguments)
    ops.kv_compact_reference(expected, *arguments)
    for a, b in zip(_bits(layers), _bits(expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("caches", "message"),
    [
        ([], "caches: none"),
        ([torch.zeros(2, 3, 4)], "caches: shape"),
        ([torch.zeros(2, 2, 2, 2, dtype=torch.complex128)], "caches: 16 bytes"),
        ([torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 6)], r"caches\[1\]: "),
        ([torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 3, 5).transpose(1, 2)], r"caches\[1\]: "),
    ],
)
def test_refuses_caches_that_differ(caches, message) -> None:
    with pytest.raises(ValueError, match=message):
        ops.KVLayers.of(caches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_mapping": torch.zeros(4)}, "^slot_mapping: "),
        ({"slot_mapping": torch.zeros(8, dtype=torch.int64)[::2]}, "^slot_mapping: "),
        ({"query_start_loc": torch.zeros(1, dtype=torch.int32)}, "^query_start_loc: "),
        ({"rows": torch.zeros(1, 3, dtype=torch.int64)}, "^rows: "),
        ({"rows": torch.zeros(1, 66, dtype=torch.int32)}, "^rows: 65 moves"),
        ({"num_sampled": torch.zeros(1, dtype=torch.int64)}, "^num_sampled: "),
    ],
)
def test_names_the_wrong_argument(change, message) -> None:
    cpu = torch.device("cpu")
    arguments = {
        "slot_mapping": torch.zeros(4, dtype=torch.int64),
        "query_start_loc": torch.zeros(2, dtype=torch.int32),
        "rows": torch.zeros(1, 3, dtype=torch.int32),
        "num_sampled": torch.zeros(1, dtype=torch.int32),
    } | change
    with pytest.raises(ValueError, match=message):
        ops.kv_compact(_layers(cpu), **arguments)
