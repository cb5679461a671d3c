# SPDX-License-Identifier: Apache-2.0
"""What tensors a folder of weights holds, read from its files' headers: a few KB, whatever their size.

vLLM reads the same files, but only after the target's weights. Nothing here trusts a file: lengths, offsets, types and
shapes are checked before anything is read by them. Every fault is a ValueError "found ..., allowed: ..." with the file.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterospec_vllm.errors import shown, shown_message
from heterospec_vllm.input_files import opened, parse_object, read_bytes

# Bits of an element by the type's name in a safetensors header.
DTYPE_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# The safetensors library allows 100 MB. Thousands of tensors fit into this.
MAX_HEADER = 16_000_000
_FILE = "a file of weights"
_LENGTH = 8  # bytes in front of the header that hold its length
_INDEX = "model.safetensors.index.json"
# What transformers' trainer leaves beside weights; vLLM passes it over.
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin")
# Types of whole and of floating numbers that numpy reads, by their names in a header.
_NUMPY = {
    **{f"I{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
}
# What torch's reader raises for files that it did not write.
_TORCH_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    read: Callable[[], Any]  # its elements as a numpy array; only for the types in `_NUMPY`


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors that vLLM finds in a folder, by name. Raises ValueError for an unusable file."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        read = read_header if file.suffix == ".safetensors" else _read_torch_file
        tensors.update(read(file))
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that vLLM reads: those of an index, else *.safetensors, else *.bin.

    Raises ValueError where there are none or one is missing.
    """
    found = sorted(folder.glob("*.safetensors"))
    if found and (folder / _INDEX).exists():
        found = _indexed(folder, {file.name for file in found})
    if not found:
        found = [f for f in sorted(folder.glob("*.bin")) if not f.name.endswith(_NO_WEIGHTS)]
    if not found:
        raise ValueError(
            f"found no weights in {folder}, allowed: a folder with *.safetensors or *.bin"
        )
    return found


def _indexed(folder: Path, present: set[str]) -> list[Path]:
    path = folder / _INDEX
    with opened(path, _FILE) as (file, length):
        text = read_bytes(file, path, 0, min(length, MAX_HEADER))
    content = parse_object(text, f"in {path}", "JSON")
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f"found no weight_map in {path}, allowed: file names by the tensor's name")
    missing = sorted(set(shards.values()) - present)
    if missing or not shards:
        named = shown(missing[0]) if missing else "no file"
        raise ValueError(
            f"found {named} in {path}, allowed: *.safetensors files of the same folder"
        )
    return [folder / name for name in sorted(set(shards.values()))]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. Raises ValueError where header and file do not agree."""
    with opened(path, _FILE) as (file, length):
        if length < _LENGTH:
            raise ValueError(f"found {length} bytes in {path}, allowed: a safetensors file")
        size = int.from_bytes(read_bytes(file, path, 0, _LENGTH), "little")
        if size > min(MAX_HEADER, length - _LENGTH):
            raise ValueError(
                f"found a header of {size} bytes in {path}, "
                f"allowed: at most {min(MAX_HEADER, length - _LENGTH)} in a file of {length}"
            )
        content = read_bytes(file, path, _LENGTH, size)
    if not content.startswith(b"{"):
        raise ValueError(f"found {shown(content[:8])} in {path}, allowed: a safetensors header")
    header = parse_object(content, f"in {path}", "a safetensors header")
    header.pop("__metadata__", None)
    begin = _LENGTH + size
    spans = [_span(path, name, entry) for name, entry in header.items()]
    end = 0
    for first, last, name in sorted((first, last, name) for name, _, _, first, last in spans):
        if first != end:
            raise ValueError(
                f"found {shown(name)} at byte {first} of the data in {path}, "
                f"allowed: {end}, where the tensor before it ends"
            )
        end = last
    if begin + end != length:
        raise ValueError(
            f"found {length} bytes in {path}, allowed: {begin + end}, as its header says"
        )
    return {
        name: StoredTensor(path, dtype, shape, _reader(path, dtype, shape, begin + first))
        for name, dtype, shape, first, _ in spans
    }


def _span(path: Path, name: str, entry: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """(name, dtype, shape, first byte, byte behind the last) of a header's entry."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(
            f"found the type {shown(dtype)} of {shown(name)} in {path}, "
            f"allowed: {', '.join(DTYPE_BITS)}"
        )
    if not _are_sizes(shape):
        raise ValueError(
            f"found the shape {shown(shape)} of {shown(name)} in {path}, allowed: a list of sizes"
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(
            f"found the offsets {shown(offsets)} of {shown(name)} in {path}, allowed: two of them"
        )
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if 8 * (offsets[1] - offsets[0]) != num_bits:
        raise ValueError(
            f"found the offsets {shown(offsets)} of {shown(name)} in {path}, "
            f"allowed: {shown(num_bits // 8)} bytes for {dtype} of {shown(shape)}"
        )
    return name, dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )


def _reader(path: Path, dtype: str, shape: tuple[int, ...], first: int) -> Callable[[], Any]:
    def read() -> Any:
        import numpy as np  # not at the top: vLLM's plugins are imported by every process

        kind = np.dtype(_NUMPY[dtype])
        with opened(path, _FILE) as (file, _):
            content = read_bytes(file, path, first, math.prod(shape) * kind.itemsize)
        return np.frombuffer(content, dtype=kind).reshape(shape)

    return read


def _read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that `torch.save` wrote, through torch's reader that runs no code."""
    import torch

    with opened(path, _FILE):
        pass
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's older format cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _TORCH_FAULTS as error:
        raise ValueError(
            f"found a file that torch cannot load with weights_only ({shown_message(error)}) "
            f"at {path}, allowed: the weights of a model"
        ) from None
    if not isinstance(content, Mapping):
        raise ValueError(
            f"found {shown(content)} in {path}, allowed: tensors by their parameters' names"
        )
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"found {shown(tensor)} under {shown(name)} in {path}, "
                "allowed: tensors by their parameters' names"
            )
        dtype = torch_dtype_name(tensor.dtype)
        tensors[name] = StoredTensor(path, dtype, tuple(tensor.shape), tensor.numpy)
    return tensors


_TORCH_NAMES = {
    "torch.bool": "BOOL",
    "torch.bfloat16": "BF16",
    **{f"torch.int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"torch.uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{f"torch.float{bits}": f"F{bits}" for bits in (16, 32, 64)},
}


def torch_dtype_name(dtype: Any) -> str:
    """A torch dtype as safetensors names it."""
    return _TORCH_NAMES.get(str(dtype), str(dtype))


def is_number_type(dtype: str) -> bool:
    """Whether `StoredTensor.read` reads it."""
    return dtype in _NUMPY
