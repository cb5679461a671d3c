# SPDX-License-Identifier: Apache-2.0
"""How the step's loops over nodes and rows are compiled.

A draft level has tens of numbers, and thirty numpy calls on them cost more than the head's matrices. So what the step
does to nodes one by one is written as loops and compiled by numba (which vLLM itself needs) for fixed types when the
module is imported: about ten seconds the first time on a machine, then read from numba's cache on disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite.binding import ffi
from numba import njit


def compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function for the types of numba's ``signature``; a call with others is a TypeError."""

    def compile_now(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(signature, cache=True, error_model="numpy")(function)
        except RuntimeError:
            # Nowhere to keep it: neither beside the source nor in the user's cache.
            return njit(signature, error_model="numpy")(function)

    return compile_now


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
