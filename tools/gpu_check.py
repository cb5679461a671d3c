#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the Triton kernels on this machine's GPU and times them: `make gpu-check`.

Needs torch and triton only: no vLLM, no network, nothing installed. It runs the kernels' test suite (where pytest and
hypothesis are there; it says so where they are not), compares every kernel with its PyTorch reference at serving
sizes, and times it beside the time that the memory and the arithmetic of this GPU allow, both measured here. `--json`
writes all of it. Without a GPU, `--interpret` runs small sizes under Triton's interpreter: a check of this script.
Exit code: 0; 1 where a test fails, a result differs or a kernel does not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "kv_compact",
    "strata_mask",
    "topk_entropy",
    "tree_attention",
    "tree_attention_edges",
    "tree_verify",
)
SETTINGS = ("-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider")
TEST_PACKAGES = ("pytest", "hypothesis", "numpy", "scipy", "numba")


@dataclass(frozen=True)
class Roof:
    """What this GPU can do at most, measured."""

    device: str
    bytes_per_second: float
    flops_per_second: float  # bfloat16 matrix products

    def seconds(self, num_bytes: float, flops: float) -> float:
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


@dataclass(frozen=True)
class Row:
    """One kernel at one size."""

    kernel: str
    case: str
    status: str  # "ok", or what is wrong
    launches: int
    microseconds: float | None = None
    reference_microseconds: float | None = None
    bytes: float | None = None
    flops: float | None = None
    roofline_microseconds: float | None = None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--no-tests", action="store_true", help="leave out the test suite")
    parser.add_argument(
        "--interpret", action="store_true", help="small sizes on the CPU, under the interpreter"
    )
    arguments = parser.parse_args()
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        _make_package(Path(folder))
        sys.path[:0] = [folder, str(ROOT / "tests" / "kernels"), str(ROOT / "tools")]
        return _run(arguments, Path(folder))


def _make_package(folder: Path) -> None:
    """The package as an installation has it: the kernels, and beside them what their tests compare with."""
    package = folder / "heterospec_vllm"
    package.mkdir()
    (package / "__init__.py").touch()
    for part in (ROOT / "heterospec_vllm").glob("[!_]*"):  # the kernels are linked into it
        (package / part.name).symlink_to(part, target_is_directory=part.is_dir())


def _run(arguments: argparse.Namespace, folder: Path) -> int:
    import torch
    import triton

    if not arguments.interpret and not torch.cuda.is_available():
        print("gpu-check: found no GPU, allowed: a CUDA or ROCm device (or --interpret)")
        return 1
    device = torch.device("cpu" if arguments.interpret else "cuda")
    roof = measure_roof(device)
    print(
        f"{roof.device}, torch {torch.__version__}, triton {triton.__version__}: "
        f"{roof.bytes_per_second / 1e12:.2f} TB/s copied, "
        f"{roof.flops_per_second / 1e12:.0f} TFLOP/s in bfloat16 products"
    )
    tests = "left out" if arguments.no_tests else run_tests(folder, arguments.interpret)
    print(f"kernel tests: {tests}")
    only_gpu = [] if arguments.no_tests else gpu_tests(folder)
    for name in only_gpu:
        print(f"  runs on a GPU only: {name}")
    rows = compare_and_time(device, roof, small=arguments.interpret)
    print(table(rows))
    if arguments.json:
        found = {
            "device": roof.device,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "roof": asdict(roof),
            "tests": tests,
            "gpu_only_tests": only_gpu,
            "kernels": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    failed = [row for row in rows if row.status != "ok"]
    return 1 if failed or tests.startswith("failed") else 0


def measure_roof(device) -> Roof:
    """Bandwidth of a copy and rate of a square product: what a kernel is held against."""
    import torch

    size = 2**28 if device.type == "cuda" else 2**22
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device)
    side = 8192 if device.type == "cuda" else 128
    a = torch.randn(side, side, device=device).bfloat16()
    product = median_seconds(lambda: a @ a, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (interpreter)"
    return Roof(name, 2 * size / copy, 2 * side**3 / product)


def median_seconds(run: Callable[[], object], device) -> float:
    """Median of many runs on the device's clock, the L2 cache flushed in between; of three on a CPU."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode="median") / 1e3
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[1]


def run_tests(folder: Path, interpret: bool) -> str:
    """The kernels' own tests, in a process of their own: "passed ...", "failed ..." or why they did not run."""
    missing = [name for name in TEST_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return f"not run, missing packages: {', '.join(missing)}"
    files = _test_files()
    if interpret:
        files = files[:1]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", *SETTINGS, "-q", "--tb=short"]
    done = subprocess.run(
        [*command, *files],
        cwd=folder,  # -m puts it in front of PYTHONPATH: the checkout's package has no kernels
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    last = lines[-1].strip("= ") if lines else "no output"
    if done.returncode:
        print("\n".join(lines[-60:]))
        return f"failed: {last}"
    return f"passed: {last}"


def gpu_tests(folder: Path) -> list[str]:
    """The tests marked `gpu`, which nothing but a GPU runs; [] without pytest."""
    if importlib.util.find_spec("pytest") is None:
        return []
    command = [sys.executable, "-m", "pytest", *SETTINGS, "--collect-only", "-q", "-m", "gpu"]
    done = subprocess.run(
        [*command, *_test_files()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        text=True,
        capture_output=True,
        check=False,
    )
    return [line for line in done.stdout.splitlines() if "::" in line]


def _test_files() -> list[str]:
    return [str(ROOT / "tests" / "kernels" / f"test_{name}.py") for name in TESTS]


def compare_and_time(device, roof: Roof, small: bool) -> list[Row]:
    from gpu_cases import all_cases
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    # Device faults are RuntimeErrors; the compilers raise the rest.
    failures = (RuntimeError, ValueError, TypeError, KeyError, CompilationError, OutOfResources)
    rows = []
    for case in all_cases(device, small):
        try:
            inputs = case.make()
            status = inputs.difference() or "ok"
            seconds = median_seconds(inputs.run, device)
            reference = median_seconds(inputs.reference, device) if inputs.reference else None
        except failures as error:  # a kernel that fails to compile must not hide the others
            rows.append(Row(case.kernel, case.name, f"{type(error).__name__}: {error}"[:300], 0))
            continue
        rows.append(
            Row(
                case.kernel,
                case.name,
                status,
                inputs.launches,
                1e6 * seconds,
                None if reference is None else 1e6 * reference,
                inputs.num_bytes,
                inputs.flops,
                1e6 * roof.seconds(inputs.num_bytes, inputs.flops),
            )
        )
        print(f"  {case.kernel} {case.name}: {status}", flush=True)
    return rows


def table(rows: list[Row]) -> str:
    """The results as text, columns aligned."""
    head = ("kernel", "case", "status", "launches", "us", "roofline us", "of roofline", "torch us")
    lines = [head]
    for row in rows:
        share = (
            f"{100 * row.roofline_microseconds / row.microseconds:.0f} %"
            if row.microseconds and row.roofline_microseconds
            else "-"
        )
        numbers = (row.microseconds, row.roofline_microseconds, row.reference_microseconds)
        us, roofline, torch_us = ("-" if n is None else f"{n:.1f}" for n in numbers)
        lines.append(
            (row.kernel, row.case, row.status, str(row.launches), us, roofline, share, torch_us)
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
