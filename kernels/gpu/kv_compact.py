# SPDX-License-Identifier: Apache-2.0
"""Moves accepted tokens' keys and values of all layers to the slots that follow the context (Triton).

One launch for a step. A program is a single warp and takes one request, one layer and some tiles of the
(head, channel) plane of a token. For d = 1 .. accepted moves it moves a tile from the slot of tree row
rows[d] to the slot of tree row d, skipping what is in place (rows[d] == d). Slots come from the step's
slot mapping, so block tables, block sizes and KV-cache groups are the caller's business: one launch per
group.

Why no move can destroy another's source. Of a tile, a program first issues the loads of all its moves,
then meets a barrier, then issues the stores. On NVIDIA the barrier orders every thread's loads before
every thread's stores. AMD's barrier does not wait for loads, but one wave's memory instructions are
carried out in the order of issue; hence a single warp, and the barrier keeps the compiler from
changing that order. So within a program every source is read before anything is written, whatever the
slots are. Two programs never touch the same memory: tiles and layers are disjoint, and requests own
disjoint slots beyond their contexts, which is where all rows of the step lie. (Rows of a path rise, so
rows[d] >= d and targets are never later sources: the invariant that the sequential CPU kernel builds
on. Here it is not needed.)

Counts, rows and slots are read on the device; the grid follows from capacities. Elements are copied as
integers of their size, so NaN payloads, fp8 and any other format survive.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .aot_registry import AotConfig

MAX_MOVES = 64  # accepted nodes of one request
# A program holds these at a time: more moves, narrower tiles, so registers do not grow.
_ELEMENTS = 512
# Of one request and layer: few, since most requests of most steps have nothing to move.
_MAX_PROGRAMS = 8
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@dataclass(frozen=True)
class KVLayers:
    """Caches of one KV-cache group, alike in shape and strides; filled once, at start-up.

    A layer is logically [num_blocks, num_kv_heads, block_size, channels] in any order of memory; keys and
    values are fused in the channels, or are two layers of this list where an engine keeps them apart.
    """

    caches: tuple[torch.Tensor, ...]  # kept alive: the kernel sees their addresses only
    addresses: torch.Tensor  # [num_layers] int64, on the caches' device

    @classmethod
    def of(cls, caches: Sequence[torch.Tensor]) -> "KVLayers":
        """Raises ValueError if the caches differ in shape, strides, dtype or device, or there are none."""
        if not caches:
            raise ValueError("caches: none given")
        first = caches[0]
        if first.dim() != 4:
            raise ValueError(
                f"caches: shape {tuple(first.shape)}, needed: "
                "[num_blocks, num_kv_heads, block_size, channels]"
            )
        if first.element_size() not in _WORDS:
            raise ValueError(
                f"caches: {first.element_size()} bytes an element, allowed: 1, 2, 4, 8"
            )
        for index, cache in enumerate(caches):
            if _likeness(cache) != _likeness(first):
                raise ValueError(
                    f"caches[{index}]: {_likeness(cache)}, the first: {_likeness(first)}"
                )
        addresses = torch.tensor([c.data_ptr() for c in caches], dtype=torch.int64)
        return cls(tuple(caches), addresses.to(first.device))


def _likeness(cache: torch.Tensor) -> tuple:
    return tuple(cache.shape), cache.stride(), cache.dtype, cache.device


def kv_compact_reference(
    layers: KVLayers,
    # [num_tokens]
    slot_mapping: torch.Tensor,
    # [num_reqs + 1]
    query_start_loc: torch.Tensor,
    # [num_reqs, max_emitted]
    rows: torch.Tensor,
    # [num_reqs]
    num_sampled: torch.Tensor,
) -> None:
    """What `kv_compact` does (same arguments), one move after the other."""
    block_size = layers.caches[0].shape[2]
    for req, start in enumerate(query_start_loc.tolist()[:-1]):
        for depth in range(1, int(num_sampled[req])):
            source = int(slot_mapping[start + int(rows[req, depth])])
            target = int(slot_mapping[start + depth])
            for cache in layers.caches:
                moved = cache[source // block_size, :, source % block_size].clone()
                cache[target // block_size, :, target % block_size] = moved


@triton.jit
def _kv_compact_kernel(
    # [num_layers] addresses
    layers_ptr,
    block_stride,
    head_stride,
    slot_stride,
    channel_stride,
    block_size,
    num_channels,
    # num_kv_heads * num_channels
    plane_size,
    # [num_tokens]
    slot_mapping_ptr,
    # [num_reqs + 1]
    query_start_loc_ptr,
    # [num_reqs, max_emitted]
    rows_ptr,
    rows_stride,
    # [num_reqs]
    num_sampled_ptr,
    WORD: tl.constexpr,
    BLOCK_MOVES: tl.constexpr,
    TILE: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    num_sampled = tl.load(num_sampled_ptr + req)
    depths = tl.arange(0, BLOCK_MOVES) + 1
    accepted = depths < num_sampled
    rows = tl.load(rows_ptr + req * rows_stride + depths, mask=accepted, other=0)
    moves = accepted & (rows != depths)
    if tl.max(moves.to(tl.int32), axis=0) != 0:
        first = tl.load(query_start_loc_ptr + req).to(tl.int64)
        sources = tl.load(slot_mapping_ptr + first + rows, mask=moves, other=-1).to(tl.int64)
        targets = tl.load(slot_mapping_ptr + first + depths, mask=moves, other=-1).to(tl.int64)
        # vLLM marks tokens without a slot by -1.
        moves = moves & (sources >= 0) & (targets >= 0)
        sources = tl.where(moves, sources, 0)
        targets = tl.where(moves, targets, 0)
        source_at = sources // block_size * block_stride + sources % block_size * slot_stride
        target_at = targets // block_size * block_stride + targets % block_size * slot_stride

        layer = tl.load(layers_ptr + tl.program_id(1)).to(tl.pointer_type(WORD))
        for tile in range(tl.program_id(2) * TILE, plane_size, tl.num_programs(2) * TILE):
            elements = tile + tl.arange(0, TILE)
            heads = (elements // num_channels).to(tl.int64)
            channels = (elements % num_channels).to(tl.int64)
            plane_at = heads * head_stride + channels * channel_stride
            mask = moves[:, None] & (elements < plane_size)[None, :]
            moved = tl.load(layer + source_at[:, None] + plane_at[None, :], mask=mask)
            # A thread may hold what another one's store overwrites.
            tl.debug_barrier()
            tl.store(layer + target_at[:, None] + plane_at[None, :], moved, mask=mask)


def _check(
    layers: KVLayers,
    slot_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    rows: torch.Tensor,
    num_sampled: torch.Tensor,
) -> None:
    num_reqs = num_sampled.shape[0]
    max_emitted = rows.shape[-1]
    for name, tensor, shape, dtypes in (
        ("slot_mapping", slot_mapping, slot_mapping.shape[:1], (torch.int64, torch.int32)),
        ("query_start_loc", query_start_loc, (num_reqs + 1,), (torch.int32,)),
        ("rows", rows, (num_reqs, max_emitted), (torch.int32,)),
        ("num_sampled", num_sampled, (num_reqs,), (torch.int32,)),
    ):
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in dtypes:
            raise ValueError(
                f"{name}: {tuple(tensor.shape)} of {tensor.dtype}, needed: {tuple(shape)} of {dtypes}"
            )
        if tensor.device != layers.addresses.device:
            raise ValueError(f"{name}: on {tensor.device}, needed: {layers.addresses.device}")
        if tensor.numel() > 1 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: the last dimension has stride {tensor.stride(-1)}, allowed: 1"
            )
    if max_emitted - 1 > MAX_MOVES:
        raise ValueError(f"rows: {max_emitted - 1} moves a request, allowed: {MAX_MOVES}")


def kv_compact(
    layers: KVLayers,
    # [num_tokens] int64 or int32, slot of every token row of the step, -1: none
    slot_mapping: torch.Tensor,
    # [num_reqs + 1] int32, token row of each request's root, then the end
    query_start_loc: torch.Tensor,
    # [num_reqs, max_emitted] int32, tree row visited at each depth (`TreeWalks.rows`)
    rows: torch.Tensor,
    # [num_reqs] int32, visited rows (`TreeWalks.num_sampled`)
    num_sampled: torch.Tensor,
) -> None:
    """After it, the keys and values of the row visited at depth d are at the slot of tree row d.

    One launch, no host read, nothing else is written. Requests without moves cost at most eight empty
    programs a layer.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above, or `rows` holds more than 64
            moves a request; the message names the argument.
    """
    _check(layers, slot_mapping, query_start_loc, rows, num_sampled)
    num_reqs, max_moves = num_sampled.shape[0], rows.shape[1] - 1
    if num_reqs == 0 or max_moves < 1:
        return
    first = layers.caches[0]
    _, num_kv_heads, block_size, num_channels = first.shape
    block_stride, head_stride, slot_stride, channel_stride = first.stride()
    plane_size = num_kv_heads * num_channels
    block_moves = triton.next_power_of_2(max_moves)
    tile = _ELEMENTS // block_moves
    programs = min(triton.cdiv(plane_size, tile), _MAX_PROGRAMS)
    _kv_compact_kernel[(num_reqs, len(layers.caches), programs)](
        layers.addresses,
        block_stride,
        head_stride,
        slot_stride,
        channel_stride,
        block_size,
        num_channels,
        plane_size,
        slot_mapping,
        query_start_loc,
        rows,
        rows.stride(0),
        num_sampled,
        WORD=_WORDS[first.element_size()],
        BLOCK_MOVES=block_moves,
        TILE=tile,
        num_warps=1,
    )


AOT_CONFIGS = tuple(
    AotConfig(
        _kv_compact_kernel,
        name,
        {
            "layers_ptr": "*i64:16",
            "block_stride": "i64",
            "head_stride": "i64",
            "slot_stride": "i64",
            "channel_stride": "i32",
            "block_size": "i32",
            "num_channels": "i32",
            "plane_size": "i32",
            "slot_mapping_ptr": "*i64:16",
            "query_start_loc_ptr": "*i32:16",
            "rows_ptr": "*i32:16",
            "rows_stride": "i64",
            "num_sampled_ptr": "*i32:16",
        },
        {"WORD": word, "BLOCK_MOVES": moves, "TILE": _ELEMENTS // moves},
        num_warps=1,
    )
    for name, word, moves in (("16bit_8_moves", tl.int16, 8), ("8bit_64_moves", tl.int8, 64))
)
