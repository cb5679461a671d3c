# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for real GPUs without one: `python -m heterospec_vllm.kernels.gpu.aot`.

Prints a table, or with `--json` a JSON list, of what each configuration needs on each target:

* registers: 32-bit vector registers a thread;
* spills: bytes of memory a thread for registers that did not fit. NVIDIA: the stack frame and local
  memory that cuobjdump names; AMD: the private segment. Triton's kernels have no other use for either.
  Scalar registers that AMD's compiler keeps in lanes of a vector register cost no memory: not counted;
* shared_memory: bytes a program.

Exits with 1 if a configuration does not compile, spills or needs more shared memory than the target has,
with 2 if the request itself is wrong.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from .aot_registry import AotConfig, all_configs

# What a compiler raises for a kernel it cannot compile; MLIR's passes raise RuntimeError.
_COMPILE_ERRORS = (
    CompilationError,
    OutOfResources,
    PTXASError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
)


@dataclass(frozen=True)
class CompileTarget:
    """A GPU to compile for."""

    name: str
    gpu: GPUTarget
    max_shared_memory: int  # bytes a program may use


TARGETS = (
    CompileTarget("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024),
    CompileTarget("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024),
    CompileTarget("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024),
    CompileTarget("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024),
)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes."""

    registers: int
    spills: int
    shared_memory: int  # bytes


@dataclass(frozen=True)
class CompiledKernel:
    """One line of the report; numbers are None where compilation failed."""

    kernel: str
    config: str
    target: str
    registers: int | None
    spills: int | None
    shared_memory: int | None
    problem: str | None  # why this row fails the check

    def as_json(self) -> dict[str, str | int | None]:
        """The row without a `problem` key where there is none."""
        return {key: value for key, value in asdict(self).items() if key != "problem" or value}


Compile = Callable[[AotConfig, CompileTarget], Resources]


def compile_config(config: AotConfig, target: CompileTarget) -> Resources:
    """Compiles one configuration for one target, with Triton's cache.

    Raises:
        RuntimeError, triton.compiler.errors.CompilationError, ...: it does not compile.
    """
    names = list(config.kernel.arg_names)
    given = {*config.signature, *config.constexprs}
    if given != set(names):
        raise ValueError(f"arguments {sorted(given ^ set(names))} are not both named and taken")
    types = {name: config.signature.get(name, "constexpr").split(":")[0] for name in names}
    hints = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in config.signature.items()
        if kind.endswith(":16")
    }
    source = ASTSource(config.kernel, types, dict(config.constexprs), hints)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=target.gpu, options=options)
    shared_memory = int(compiled.metadata.shared)
    if target.gpu.backend == "hip":
        return _amd_resources(compiled.asm["amdgcn"], shared_memory)
    return _nvidia_resources(compiled.asm["cubin"], shared_memory)


def _nvidia_resources(cubin: bytes, shared_memory: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if "REG" not in usage:
        raise RuntimeError(f"cuobjdump names no registers: {text!r}")
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], shared_memory)


def _amd_resources(assembly: str, shared_memory: int) -> Resources:
    counts = {
        name: int(value)
        for name, value in re.findall(
            r"^\s*\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly, re.M
        )
    }
    return Resources(counts["vgpr_count"], counts["private_segment_fixed_size"], shared_memory)


def check_config(
    config: AotConfig, target: CompileTarget, compile_one: Compile = compile_config
) -> CompiledKernel:
    """Compiles one configuration and judges it."""
    key = (config.kernel_name, config.name, target.name)
    try:
        found = compile_one(config, target)
    except _COMPILE_ERRORS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return CompiledKernel(*key, None, None, None, f"does not compile: {reason[:500]}")
    problem = None
    if found.spills:
        problem = f"spills {found.spills} bytes"
    elif found.shared_memory > target.max_shared_memory:
        problem = f"needs more shared memory than {target.max_shared_memory} bytes"
    return CompiledKernel(*key, found.registers, found.spills, found.shared_memory, problem)


def table(rows: Sequence[CompiledKernel]) -> str:
    """The report as aligned plain text."""
    head = ("kernel", "config", "target", "registers", "spills", "shared memory", "")
    lines = [head] + [
        (
            row.kernel,
            row.config,
            row.target,
            *("-" if n is None else str(n) for n in (row.registers, row.spills, row.shared_memory)),
            row.problem or "",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(6)] + [0]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 3 <= column <= 5 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m heterospec_vllm.kernels.gpu.aot")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument(
        "--target", action="append", choices=[t.name for t in TARGETS], help="default: all"
    )
    return parser.parse_args(argv)


def _check_all(
    work: list[tuple[AotConfig, CompileTarget]], compile_one: Compile
) -> list[CompiledKernel]:
    """All configurations, on all processors where the real compiler runs."""
    if compile_one is not compile_config or len(work) < 4:
        return [check_config(config, target, compile_one) for config, target in work]
    # Forked, as kernels cannot be pickled: the children know the list.
    context = multiprocessing.get_context("fork")
    global _work
    _work = work
    with context.Pool(len(os.sched_getaffinity(0))) as pool:
        return pool.map(_check_at, range(len(work)), chunksize=1)


_work: list[tuple[AotConfig, CompileTarget]] = []


def _check_at(index: int) -> CompiledKernel:
    return check_config(*_work[index])


def main(
    argv: Sequence[str] | None = None,
    configs: Sequence[AotConfig] | None = None,
    compile_one: Compile = compile_config,
) -> int:
    """Runs the check and returns the exit status; `configs` default to the registry's."""
    arguments = _arguments(argv)
    if os.environ.get("TRITON_INTERPRET") == "1" and compile_one is compile_config:
        print("unset TRITON_INTERPRET: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    chosen = [
        config
        for config in (all_configs() if configs is None else configs)
        if not arguments.kernel or arguments.kernel in config.kernel_name
    ]
    if not chosen:
        print(f"no kernel's name contains {arguments.kernel!r}", file=sys.stderr)
        return 2
    targets = [t for t in TARGETS if not arguments.target or t.name in arguments.target]
    rows = _check_all([(c, t) for c in chosen for t in targets], compile_one)
    print(json.dumps([row.as_json() for row in rows], indent=1) if arguments.json else table(rows))
    failed = [row for row in rows if row.problem]
    if failed:
        print(f"{len(failed)} of {len(rows)} configurations failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
