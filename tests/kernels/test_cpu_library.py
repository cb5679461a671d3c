# SPDX-License-Identifier: Apache-2.0
"""Building the CPU library on first use: the cache, races, and machines without a compiler."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from heterospec_vllm.kernels import cpu_library
from heterospec_vllm.kernels import tree_attention_cpu as kernel

BUILD_IN_NEW_PROCESS = [
    sys.executable,
    "-c",
    "from heterospec_vllm.kernels import tree_attention_cpu as k; print(k.is_available())",
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing loaded, nothing cached; what other tests loaded is back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    caches = (cpu_library._load, cpu_library.c_entry, kernel.unavailable_reason)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not kernel.is_available()
    assert "no C++ compiler: looked for g++ and c++" in (kernel.unavailable_reason() or "")
    with pytest.raises(cpu_library.LibraryUnavailable, match="install g\\+\\+"):
        cpu_library.load_library()


def test_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'internal error 42' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    reason = kernel.unavailable_reason() or ""
    assert "failed" in reason and "internal error 42" in reason
    assert not list(cpu_library.cache_dir().glob("*.so"))
    assert not list(cpu_library.cache_dir().glob("build-*"))


def test_quotes_of_cxx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", 'g++ "')
    with pytest.raises(cpu_library.LibraryUnavailable) as raised:
        cpu_library.load_library()
    assert str(raised.value).startswith("CXX: found 'g++ \"' (No closing quotation), allowed: ")


def test_compiler_that_is_no_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cxx").write_bytes(b"\x00\x01")
    (tmp_path / "cxx").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    with pytest.raises(cpu_library.LibraryUnavailable, match="cxx does not run"):
        cpu_library.load_library()


def test_damaged_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_rubbish(command: list[str], source: Path, linked_with: list[str], path: Path) -> None:
        path.write_bytes(b"not a library")

    monkeypatch.setattr(cpu_library, "_compile", write_rubbish)
    assert "does not load" in (kernel.unavailable_reason() or "")


def test_key_follows_sources_flags_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["-O3"]
    keys = {cpu_library._key(flags), cpu_library._key(["-O2"])}
    monkeypatch.setattr(cpu_library, "_cpu_flags", lambda: "flags: none")
    keys.add(cpu_library._key(flags))
    monkeypatch.setattr(cpu_library.torch, "__version__", "0.0")
    keys.add(cpu_library._key(flags))
    assert len(keys) == 4
    of_compilers = {cpu_library._compiler_key([name]) for name in ("true", "ls", "cat")}
    assert len(of_compilers) == 3


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
    assert len(list(cpu_library.cache_dir().glob("*.so"))) == 1


OPENMP_PROBE = """
import sys
from pathlib import Path
import torch
from heterospec_vllm.kernels import cpu_library
cpu_library.choose_build(sys.argv[1])
threads = cpu_library.load_library().heterospec_tree_attention_threads
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
