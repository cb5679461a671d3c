# SPDX-License-Identifier: Apache-2.0
"""How the step's loops over nodes and rows are compiled.

A draft level has tens of numbers, and thirty numpy calls on them cost more than the head's matrices. So what the step
does to nodes one by one is written as loops and compiled by numba (which vLLM itself needs) for fixed types when the
module is imported: about ten seconds the first time on a machine, then read from numba's cache on disk.

What numba reads there is a pickle, which can run code. So its cache is a folder of our own, in NUMBA_CACHE_DIR or else
in the user's cache folder, that nobody else can write (private_files.py); without one nothing is kept.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llvmlite.binding import ffi
from numba import config, njit
from numba.core.caching import FunctionCache

from heterospec_vllm.kernels import private_files


def compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function for the types of numba's ``signature``; a call with others is a TypeError."""

    def compile_now(function: Callable[..., Any]) -> Callable[..., Any]:
        kept = _cache.compile(function, signature)
        return kept if kept is not None else njit(signature, error_model="numpy")(function)

    return compile_now


class _Cache:
    """The folder in which numba keeps what it compiled; given up at the first fault, which is said once."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._given_up = False

    def compile(self, function: Callable[..., Any], signature: str) -> Callable[..., Any] | None:
        """The function, compiled and kept or read from the cache; None where there is none to rely on."""
        if self._given_up:
            return None
        try:
            if self._folder is None:
                root = Path(config.CACHE_DIR) if config.CACHE_DIR else private_files.cache_dir()
                self._folder = private_files.make_folder(root / "heterospec-loops")
            # One at a time, so that of two processes that start together the second reads what the first one wrote.
            with private_files.locked(self._folder / "lock"), _numba_keeps_in(self._folder):
                return _read_or_kept(function, signature, self._folder)
        except (OSError, EOFError, pickle.UnpicklingError, RuntimeError) as error:
            self._given_up = True
            private_files.warn_once(
                f"{error}; so the compiled loops are not kept: every start takes some ten seconds longer"
            )
            return None


_cache = _Cache()


@contextlib.contextmanager
def _numba_keeps_in(folder: Path) -> Iterator[None]:
    """Sets numba's NUMBA_CACHE_DIR, which else may be where others can write."""
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        yield
    finally:
        config.CACHE_DIR = before


def _read_or_kept(function: Callable[..., Any], signature: str, folder: Path) -> Callable[..., Any]:
    """The function from numba's cache, or compiled into it; damaged files there are compiled again.

    Raises OSError where numba would keep it elsewhere or cannot write.
    """
    place = Path(FunctionCache(function).cache_path)
    if place.parent != folder:
        raise OSError(
            f"{folder}: found a folder in which numba keeps nothing, allowed: one to write"
        )
    for path in _files(place, function):
        if not private_files.is_whole(path):
            private_files.warn_once(f"{place}: found damaged files; their loops are compiled again")
            path.unlink()
    dispatcher = njit(signature, cache=True, error_model="numpy")(function)
    if dispatcher.stats.cache_misses:
        for path in _files(place, function):
            private_files.keep(path, path)
    return dispatcher


def _files(place: Path, function: Callable[..., Any]) -> list[Path]:
    """Numba's index and data of a function: ``<module>.<function>-<line>.<Python>.nbi`` and ``.<number>.nbc``."""
    name = f"*.{function.__qualname__}-{function.__code__.co_firstlineno}.*.nb"
    return [*place.glob(f"{name}i"), *place.glob(f"{name}c")]


def _let_vllm_look_at_llvmlite() -> None:
    """Wraps ``llvmlite.binding.ffi._lib_wrapper.__getattr__``: names that begin with two underscores are not functions.

    Why: at the start of a CPU engine vLLM 0.32 reads ``vars()`` of everything in every loaded module
    (``triton_utils.dispatcher._rebind_kernels``), llvmlite's library answers any name with a C function, and vLLM
    fails on it (``'_lib_fn_wrapper' object has no attribute 'get'``) once numba has been imported.
    Remove when: vLLM's scan passes by what it cannot read, or llvmlite refuses such names.
    """
    owner = type(ffi.lib)
    original = owner.__getattr__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def without_dunders(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return original(self, name)

    owner.__getattr__ = without_dunders


_let_vllm_look_at_llvmlite()
