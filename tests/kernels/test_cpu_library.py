# SPDX-License-Identifier: Apache-2.0
"""Building the CPU library on first use: the cache, races, and machines without a compiler."""

import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from heterospec_vllm.kernels.cpu import library
from heterospec_vllm.kernels.cpu.structs import STRUCTS

BUILD_IN_NEW_PROCESS = [
    sys.executable,
    "-c",
    "from heterospec_vllm.kernels.cpu import library; print(library.is_available())",
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing loaded, nothing cached; what other tests loaded is back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    caches = (library._load, library.c_entry, library.unavailable_reason)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not library.is_available()
    assert "no C++ compiler: looked for g++ and c++" in (library.unavailable_reason() or "")
    with pytest.raises(library.LibraryUnavailable, match="install g\\+\\+"):
        library.load_library()


def test_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'internal error 42' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    reason = library.unavailable_reason() or ""
    assert "failed" in reason and "internal error 42" in reason
    assert not list(library.cache_dir().glob("*.so"))
    assert not list(library.cache_dir().glob("build-*"))


def test_quotes_of_cxx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", 'g++ "')
    with pytest.raises(library.LibraryUnavailable) as raised:
        library.load_library()
    assert str(raised.value).startswith("CXX: found 'g++ \"' (No closing quotation), allowed: ")


def test_compiler_that_is_no_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cxx").write_bytes(b"\x00\x01")
    (tmp_path / "cxx").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    with pytest.raises(library.LibraryUnavailable, match="cxx does not run"):
        library.load_library()


def test_damaged_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_rubbish(command: list[str], source: Path, linked_with: list[str], path: Path) -> None:
        path.write_bytes(b"not a library")

    monkeypatch.setattr(library, "_compile", write_rubbish)
    assert "does not load" in (library.unavailable_reason() or "")


def test_key_follows_sources_flags_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["-O3"]
    keys = {library._key(flags), library._key(["-O2"])}
    monkeypatch.setattr(library, "_cpu_flags", lambda: "flags: none")
    keys.add(library._key(flags))
    monkeypatch.setattr(library.torch, "__version__", "0.0")
    keys.add(library._key(flags))
    assert len(keys) == 4
    of_compilers = {library._compiler_key([name]) for name in ("true", "ls", "cat")}
    assert len(of_compilers) == 3


def test_a_struct_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")  # the library that the user has
    library.load_library()
    library._load.cache_clear()
    wrong = {**STRUCTS, "WalkArguments": struct.Struct("=6q12Q")}
    monkeypatch.setattr(library, "STRUCTS", wrong)
    with pytest.raises(
        library.LibraryUnavailable, match="WalkArguments: found 168 bytes in C.., allowed: 144"
    ):
        library.load_library()
    monkeypatch.setattr(library, "STRUCTS", {"Unknown": struct.Struct("=q")})
    assert "Unknown: found -1 bytes" in (library.unavailable_reason() or "")


def test_every_struct_is_checked_on_both_sides() -> None:
    folder = Path(library.__file__).parents[1]
    sources = "".join(path.read_text() for path in (folder / "csrc").iterdir())
    asserted = dict(re.findall(r"static_assert\(sizeof\((\w+)\) == (\d+)\)", sources))
    assert asserted == {name: str(packed.size) for name, packed in STRUCTS.items()}
    packing = [path.name for path in folder.rglob("*.py") if "struct.Struct(" in path.read_text()]
    assert packing == ["structs.py"]


@pytest.mark.full
def test_processes_that_start_together_build_once() -> None:
    runs = [
        subprocess.Popen(
            BUILD_IN_NEW_PROCESS,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ.copy(),
        )
        for _ in range(3)
    ]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert [out.strip() for out, _ in outputs] == ["True"] * 3
    assert sum("compiling" in err for _, err in outputs) == 1
    assert len(list(library.cache_dir().glob("*.so"))) == 1


OPENMP_PROBE = """
import sys
from pathlib import Path
import torch
from heterospec_vllm.kernels.cpu import library
library.choose_build(sys.argv[1])
threads = library.load_library().heterospec_max_threads
for count in (3, 1):
    torch.set_num_threads(count)
    assert threads() == count, (threads(), count)
maps = Path("/proc/self/maps").read_text().split()
runtimes = {path for path in maps if "libgomp" in path or "libomp" in path}
assert len(runtimes) == 1, runtimes
"""


@pytest.mark.parametrize("build_kind", ["native", "portable"])
def test_shares_torchs_openmp_runtime(build_kind: str) -> None:
    """A second runtime would have threads of its own, beside those that vLLM binds to cores.

    In a process of its own: other tests load libraries that bring their own runtime.
    """
    probe = [sys.executable, "-c", OPENMP_PROBE, build_kind]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
