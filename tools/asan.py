# SPDX-License-Identifier: Apache-2.0
"""Runs the CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (`make asan`). Needs g++.

The kernels are compiled with both through CXX; their runtimes are preloaded, as Python has neither. A report ends the
process of the tests. Two builds run side by side: the one of this processor, with AMX tiles in memory where a
sanitizer sees what they read, and the portable one.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from heterospec_vllm.kernels.cpu import library

ROOT = Path(__file__).parents[1]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")  # the last one so that throwing is seen
TESTS = [
    *sorted(ROOT.glob("tests/kernels/test_*_cpu.py")),
    ROOT / "tests/kernels/test_amx_pages.py",
]

COMPILE = """
from heterospec_vllm.kernels.cpu import library
library.choose_build({build!r})
library.unavailable_reason()
"""
READ_BEYOND = """
import torch
from heterospec_vllm.kernels.cpu import library
from heterospec_vllm.kernels.cpu.gather_rows import gather_rows_cpu
library.choose_build({build!r})
gather_rows_cpu([torch.zeros(4, 16)], torch.tensor([4]))
"""


def main() -> int:
    compiler = os.environ.get("CXX", "g++")
    own = "tiles" if library.instruction_set() in ("amx", "avx512_bf16") else "native"
    with ThreadPoolExecutor() as pool:
        codes = list(pool.map(lambda build: check(build, compiler), (own, "portable")))
    return max(map(abs, codes))


def check(build: str, compiler: str) -> int:
    """The exit status of a build's tests."""
    environment = {**os.environ, "CXX": f"{compiler} {FLAGS}", "HETEROSPEC_TEST_BUILDS": build}
    # Preloaded runtimes would slow the compiler down. Without them the library does not load, but it is kept.
    python(environment, "-c", COMPILE.format(build=build))
    environment["LD_PRELOAD"] = " ".join(runtime(compiler, name) for name in RUNTIMES)
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
    probe = python(environment, "-c", READ_BEYOND.format(build=build))
    if "heap-buffer-overflow" not in probe.stdout:
        print(f"{build}: a read behind a tensor was not reported:\n{probe.stdout}")
        return 1
    # Not captured by pytest: a report would be lost with the process.
    tests = python(environment, "-m", "pytest", "-q", "-s", "-k", "not vllm", *map(str, TESTS))
    print(f"---- {build}\n{tests.stdout}", flush=True)
    return tests.returncode


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def runtime(compiler: str, name: str) -> str:
    command = [*compiler.split(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if path == name:
        raise SystemExit(f"{compiler} has no {name}: install GCC's sanitizers or set CXX to a g++")
    return path


if __name__ == "__main__":
    sys.exit(main())
