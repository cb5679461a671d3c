# SPDX-License-Identifier: Apache-2.0
"""An engine in a process of its own: how it is started, asked, watched and ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# What vLLM raises for arguments, models or requests that it cannot serve.
FAILURES = (ValueError, RuntimeError, OSError, AssertionError, KeyError, TypeError)


class EngineFailed(RuntimeError):
    """The engine did not start, died or does not answer; the message says what is known."""


class Child:
    """Runs ``serve(pipe, *arguments)`` in a spawned process; its answers are values or exceptions."""

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, timeout: float | None, *request: Any) -> Any:
        try:
            self._pipe.send(request)
        except OSError:
            raise EngineFailed(self._death()) from None
        return self.receive(timeout)

    def receive(self, timeout: float | None) -> Any:
        """The next answer; EngineFailed after ``timeout`` seconds (None: never) or with what the child raised."""
        try:
            if not self._pipe.poll(timeout):
                raise EngineFailed(f"no answer within {timeout:.0f} s")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise EngineFailed(self._death()) from None
        if isinstance(answer, BaseException):
            raise EngineFailed(str(answer)) from answer
        return answer

    def memory(self) -> int:
        """Bytes that are the child's own."""
        import psutil

        return int(psutil.Process(self._process.pid).memory_full_info().uss)

    def close(self) -> None:
        """Ends the child; safe to call twice."""
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def _death(self) -> str:
        self._process.join(5)
        return f"the engine's process ended with status {self._process.exitcode}"


# ---- in the child


def enter() -> None:
    """Before vLLM is imported. Ctrl-C reaches the whole process group; the parent ends its children."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def thread_binding() -> str:
    """How the loaded engine's threads are bound, in words."""
    import torch

    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    return (
        f"in-process, {torch.get_num_threads()} OpenMP threads, VLLM_CPU_OMP_THREADS_BIND={bound}"
    )


def answer(pipe: Connection, function: Callable[..., Any], *values: Any) -> bool:
    """Sends what the function returns, or its failure as text: vLLM's own exceptions need not survive pickling.

    False after a failure.
    """
    try:
        result, good = function(*values), True
    except FAILURES as error:
        result, good = RuntimeError(f"{type(error).__name__}: {error}"), False
    pipe.send(result)
    return good
