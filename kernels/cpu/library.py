# SPDX-License-Identifier: Apache-2.0
"""Compiles csrc/ on first use and loads it; kept in the user's cache, for this machine.

A library is loaded from a folder that only this account and root can write, and only if it is whole; where the cache
is not such a folder it is compiled for this process alone (private_files.py).

The kernels' library has a plain C entry and includes no torch header: seconds to compile, not a minute. A second, small
one makes operators of torch of some kernels. The first is linked without an OpenMP runtime: its `GOMP_*` symbols bind
to the one that torch has put in the process (or to a preloaded libiomp5), so torch's thread count, vLLM's core binding
and the kernel's threads are the same.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ..private_files import (
    cache_dir,
    is_whole,
    keep,
    locked,
    make_folder,
    temporary_folder,
    warn_once,
)
from .structs import STRUCTS

_SOURCE_DIR = Path(__file__).parents[1] / "csrc"

_COMPILERS = ("g++", "c++")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")

# What the kernels call a dtype (csrc/kernels.cpp: by_dtype).
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class LibraryUnavailable(RuntimeError):
    """The library cannot be built or loaded here; the message says why and what to do."""


BUILDS = ("native", "pairs", "tiles", "avx2", "portable")


class _Chosen:
    """The build that entries come from: "native" outside tests."""

    build = "native"


def choose_build(build: str) -> None:
    """Takes entries from another build from now on (for tests).

    Args:
        build: "native" for this CPU; "pairs" for it without AMX tiles, multiplying bfloat16 in pairs whichever is
            the faster (csrc/product_speed.hpp); "tiles" for it with AMX tiles in memory where it has
            none; "avx2" for any with AVX2; or "portable", which leaves out every CPU-specific instruction path.
    """
    assert build in BUILDS, f"{build!r}, allowed: {BUILDS}"
    _Chosen.build = build
    c_entry.cache_clear()


def load_library() -> ctypes.CDLL:
    """Builds the library unless the cache has it, and loads it. Raises LibraryUnavailable."""
    return _load(_Chosen.build)


@functools.cache
def _load(build: str) -> ctypes.CDLL:
    # No -fopenmp when it is linked: see the module's docstring.
    library = _built("kernels.cpp", ["-fopenmp", *_target_flags(build)], [])
    _check_sizes(library)
    return library


def _check_sizes(library: ctypes.CDLL) -> None:
    """Raises LibraryUnavailable where C++ takes a struct of another size than we pack."""
    size_of = library.heterospec_size_of
    size_of.argtypes, size_of.restype = [ctypes.c_char_p], ctypes.c_int64
    for name, packed in STRUCTS.items():
        found = size_of(name.encode())
        if found != packed.size:
            raise LibraryUnavailable(
                f"csrc/ and cpu/structs.py disagree: {name}: found {found} bytes in C++,"
                f" allowed: {packed.size} ({packed.format})"
            )


@functools.cache
def load_torch_ops() -> None:
    """Registers the CPU kernels of `torch.ops.heterospec` (csrc/torch_ops.cpp), as "native" builds them.

    Raises LibraryUnavailable.
    """
    torch_folder = Path(torch.__file__).parent
    entry = _load("native").heterospec_packed_linear
    flags = ["-isystem", str(torch_folder / "include")]
    ops = _built("torch_ops.cpp", flags, ["-L", str(torch_folder / "lib"), "-ltorch_cpu"])
    ops.heterospec_set_packed_linear(ctypes.cast(entry, ctypes.c_void_p))


def _built(source: str, flags: list[str], linked_with: list[str]) -> ctypes.CDLL:
    """The library made of a source; built unless the cache has it. Raises LibraryUnavailable."""
    compiler = _find_compiler()
    try:
        return _loaded(_kept(make_folder(cache_dir()), compiler, source, flags, linked_with))
    except OSError as error:
        warn_once(f"{error}; so the CPU kernels are compiled at every start, not kept")
    try:
        with temporary_folder("heterospec-build-") as folder:
            # What is loaded stays when its file goes.
            return _loaded(_kept(folder, compiler, source, flags, linked_with))
    except OSError as error:
        raise LibraryUnavailable(f"no folder to compile the CPU kernels in: {error}") from error


def _kept(
    folder: Path, compiler: list[str] | None, source: str, flags: list[str], linked_with: list[str]
) -> Path:
    """The whole library of a source in a folder; built if need be.

    Without a compiler it is the newest that any compiler made of this source. Where it is there no lock is needed, so
    the folder may be read-only.
    """
    any_compilers = f"{Path(source).stem}-{_key(flags)}"
    if compiler is None:
        found = sorted(folder.glob(f"{any_compilers}-*.so"), key=lambda path: -path.stat().st_mtime)
        for path in found:
            if is_whole(path):
                return path
        raise LibraryUnavailable(
            f"no C++ compiler: looked for {os.environ.get('CXX') or ' and '.join(_COMPILERS)} on PATH;"
            " install g++ or point CXX at one"
        )
    path = folder / f"{any_compilers}-{_compiler_key(compiler)}.so"
    if is_whole(path):
        return path
    with locked(path.with_suffix(".lock")):
        if not is_whole(path):
            _compile([*compiler, *_FLAGS, *flags], _SOURCE_DIR / source, linked_with, path)
    return path


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryUnavailable(
            f"{path} does not load: {error}. It needs the OpenMP runtime that torch loads;"
            " delete the file to have it built again"
        ) from error


@functools.cache
def c_entry(name: str) -> "ctypes._NamedFuncPointer":
    """A function of the library that takes the address of packed arguments and returns an int.

    Raises LibraryUnavailable.
    """
    entry = getattr(load_library(), name)
    entry.argtypes = [ctypes.c_char_p]
    entry.restype = ctypes.c_int
    return entry


def _find_compiler() -> list[str] | None:
    """The command of the C++ compiler, None where there is none. Raises LibraryUnavailable for a CXX without sense."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else _COMPILERS:
        try:
            parts = shlex.split(name)
        except ValueError as error:
            raise LibraryUnavailable(
                f"CXX: found {name!r} ({error}), allowed: a command, quoted as in a shell"
            ) from None
        if parts and shutil.which(parts[0]):
            return parts
    return None


def _target_flags(build: str) -> list[str]:
    if build == "portable":
        return ["-DHETEROSPEC_PORTABLE"]
    if build == "pairs":
        without_tiles = ["-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8"]
        return ["-march=native", *without_tiles, "-DHETEROSPEC_PAIRS"]
    if build == "tiles":
        return ["-march=native", "-DHETEROSPEC_EMULATED_TILES"]
    if build == "avx2":
        return ["-mavx2", "-mfma", "-mf16c"]
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return ["-march=native" if is_x86 else "-mcpu=native"]


def _key(flags: list[str]) -> str:
    """Changes with whatever but the compiler may change the library: sources, flags, torch, CPU."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCE_DIR.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    for part in (*_FLAGS, *flags, torch.__version__, _cpu_flags()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _compiler_key(compiler: list[str]) -> str:
    """Changes with the compiler. Raises LibraryUnavailable for one that cannot be run."""
    try:
        version = subprocess.run([compiler[0], "--version"], capture_output=True, check=False)
    except OSError as error:
        raise LibraryUnavailable(f"the C++ compiler {compiler[0]} does not run: {error}") from error
    return hashlib.sha256(shlex.join(compiler).encode() + b"\0" + version.stdout).hexdigest()[:8]


def _cpu_flags() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return line
    return platform.processor()


def _compile(command: list[str], source: Path, linked_with: list[str], path: Path) -> None:
    """Builds the library under its lock."""
    for left in path.parent.glob(f"build-{path.stem}-*"):  # by a process that was killed
        shutil.rmtree(left)
    print("heterospec: compiling the CPU kernels (once) ...", file=sys.stderr)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"build-{path.stem}-") as folder:
        unlinked, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        for step in (
            [*command, "-c", str(source), "-o", str(unlinked)],
            [command[0], "-shared", str(unlinked), "-o", str(linked), *linked_with],
        ):
            result = subprocess.run(step, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                tail = "\n".join(result.stderr.splitlines()[-20:])
                raise LibraryUnavailable(f"`{shlex.join(step)}` failed:\n{tail}")
        keep(linked, path)
    took = time.monotonic() - start
    print(f"heterospec: compiled in {took:.1f} s in {path.parent}", file=sys.stderr)


def is_available() -> bool:
    """Whether the kernels can run here; builds them the first time (seconds). Never raises."""
    return unavailable_reason() is None


@functools.cache
def unavailable_reason() -> str | None:
    """Why the kernels cannot run here, or None if they can; builds them the first time (seconds)."""
    try:
        load_library()
    except LibraryUnavailable as error:
        return str(error)
    return None


def instruction_set() -> str:
    """What the library was compiled for: "amx", "avx512_bf16", "avx512", "avx2" or "portable"."""
    entry = load_library().heterospec_instruction_set
    entry.restype = ctypes.c_char_p
    return entry().decode()
