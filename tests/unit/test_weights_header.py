# SPDX-License-Identifier: Apache-2.0
"""A head's files of weights are looked at before anything is loaded."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

pytest.importorskip("vllm")

from head_folders import (
    assert_refused,
    reason,
    rewrite_header,
    torch_head,
    torch_tensors,
    write_head,
)


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return write_head(tmp_path / "head")


def _entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["norm.weight"].update(changes)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "no object": (lambda header: b"[]", ["found b'[]'", "a safetensors header"]),
    "a number": (lambda header: b"{1", ["Expecting property name"]),
    "other bytes": (lambda header: b"{\xff\xfe", ["codec can't decode"]),
    "deep": (lambda header: b'{"a":' + b"[" * 100_000, ["nested too deeply"]),
    "a key twice": (lambda header: b'{"a": 1, "a": 2}', ["the key 'a' twice"]),
    "an entry that is a list": (lambda header: header.update(x=[]), ["found the type None of 'x'"]),
    "an unknown type": (_entry(dtype="F99"), ["found the type 'F99' of 'norm.weight'", "F32"]),
    "a type that is a list": (_entry(dtype=["F32"]), ["found the type ['F32']"]),
    "no shape": (_entry(shape=None), ["found the shape None"]),
    "a negative size": (_entry(shape=[-1]), ["found the shape [-1]"]),
    "a size that is true": (_entry(shape=[True, 128]), ["found the shape [True, 128]"]),
    "another shape": (_entry(shape=[129]), ["found the offsets", "258 bytes for F16 of [129]"]),
    "a huge shape": (_entry(shape=[2**62] * 8), ["found the offsets", "bytes for F16"]),
    "one offset": (_entry(data_offsets=[0]), ["found the offsets [0]"]),
    "text for offsets": (_entry(data_offsets="0,1"), ["found the offsets '0,1'"]),
    "an overlap": (_entry(data_offsets=[0, 256]), ["at byte", "where the tensor before it ends"]),
    "far behind": (_entry(data_offsets=[2**60, 2**60 + 256]), ["at byte", "of the data"]),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def testrewrite_header(head: Path, name: str) -> None:
    change, parts = HEADERS[name]
    rewrite_header(head, change)
    assert_refused(head, str(head / "model.safetensors"), *parts)


def test_files_that_are_no_weights(head: Path) -> None:
    file = head / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(b"")
    assert_refused(head, "found 0 bytes", "a safetensors file")
    file.write_bytes(np.random.default_rng(0).bytes(4096))
    assert_refused(head, "found a header of", "bytes in")
    file.write_bytes(struct.pack("<Q", 2**60) + whole[8:])
    assert_refused(head, "found a header of 1152921504606846976 bytes", "allowed: at most")
    file.write_bytes(whole[:-1])
    assert_refused(head, f"found {len(whole) - 1} bytes", f"allowed: {len(whole)}")
    file.write_bytes(whole + b"\0")
    assert_refused(head, f"found {len(whole) + 1} bytes", f"allowed: {len(whole)}")
    file.write_bytes(whole)
    assert reason(head) is None


def test_files_that_are_no_files(head: Path) -> None:
    file = head / "model.safetensors"
    file.unlink()
    assert_refused(head, "no weights", "*.safetensors or *.bin")
    file.mkdir()
    assert_refused(head, "found no readable file (Is a directory)", str(file))
    file.rmdir()
    os.mkfifo(file)  # opening one waits for a writer
    assert_refused(head, "found no readable file (a pipe)", str(file))
    file.unlink()
    file.symlink_to(head / "nowhere")
    assert_refused(head, "no readable file", "No such file")
    file.unlink()
    file.symlink_to(file)
    assert_refused(head, "no readable file", "symbolic links")


def _shards(head: Path, cut: int = 5) -> dict[str, str]:
    tensors = load_file(head / "model.safetensors")
    (head / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[:cut], "b.safetensors": names[cut:]}
    for file, kept in files.items():
        save_file({name: tensors[name] for name in kept}, head / file)
    return {name: file for file, kept in files.items() for name in kept}


def test_shards(head: Path) -> None:
    shards = _shards(head)
    assert reason(head) is None
    index = head / "model.safetensors.index.json"
    # With an index, files that it does not name are not read.
    save_file({"rubbish": np.zeros(1)}, head / "other.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert reason(head) is None
    index.write_text(json.dumps({"weight_map": {**shards, "x": "c.safetensors"}}))
    assert_refused(head, "found 'c.safetensors'", str(index), "the same folder")
    index.write_text(json.dumps({"weight_map": {**shards, "x": "../../b.safetensors"}}))
    assert_refused(head, "found '../../b.safetensors'")
    for content in ("{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"x": 5}}'):
        index.write_text(content)
        assert_refused(head, str(index))
    index.write_text("[" * 100_000)
    assert_refused(head, "nested too deeply", str(index))


# ---- files of torch


class _Runs:
    """Unpickled without care, it leaves a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return (open, (str(self._file), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(head: Path, tmp_path: Path, zipped: bool) -> None:
    tensors = torch_tensors()
    how = {"_use_new_zipfile_serialization": zipped}
    torch.save({"lr": 1}, head / "training_args.bin")
    bfloat16 = {name: w.bfloat16() if "." in name else w for name, w in tensors.items()}
    for good in (tensors, bfloat16):
        assert reason(torch_head(head, good, **how)) is None
    torch_head(head, {**tensors, "d2t": tensors["d2t"] + 10**12}, **how)
    assert_refused(head, "found 1000000000000 for token 0 in 'd2t'", "pytorch_model.bin")
    torch_head(head, {**tensors, "extra": tensors["d2t"]}, **how)
    assert_refused(head, "the weight 'extra'")
    for wrong in ([1], {"a": 1}, {1: torch.zeros(1)}, tensors["d2t"], {"a": {"b": torch.ones(3)}}):
        assert_refused(torch_head(head, wrong, **how), "allowed: tensors by their parameters'")
    planted = tmp_path / "planted"
    for file in (head / "pytorch_model.bin",):
        with file.open("wb") as out:
            pickle.dump({"a": _Runs(planted)}, out)
        assert_refused(head, "torch cannot load with weights_only")
        assert not planted.exists()


def test_torch_files_of_junk(head: Path) -> None:
    (head / "model.safetensors").unlink()
    file = head / "pytorch_model.bin"
    torch_head(head, torch_tensors())
    whole = file.read_bytes()
    for junk in (b"", b"\x80", whole[: len(whole) // 2], b"PK\x03\x04" + b"\0" * 99, b"junk" * 99):
        file.write_bytes(junk)
        assert_refused(head, "torch cannot load with weights_only", str(file))
