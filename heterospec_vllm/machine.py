# SPDX-License-Identifier: Apache-2.0
"""What this machine calls itself: costs that were measured elsewhere are not its own."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine_name() -> str:
    """The GPU, or the processor, its instructions and the threads that torch may use: what a cost table belongs to."""
    import torch  # not at the top: profiles are checked where engines only start

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    return f"{_processor()}, {threads} threads"


# What decides how fast matrices are multiplied, the best first. Virtual machines of one maker often share a model name
# ("AMD EPYC"), only family and model number tell generations apart, and without bfloat16 instructions ten tokens may
# cost ten times one.
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "asimd")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    lines = (line.partition(":") for line in text.splitlines())
    fields = {key.strip().lower(): value.strip() for key, _, value in lines}
    model = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        model += f" (family {fields['cpu family']}, model {fields['model']})"
    flags = fields.get("flags", fields.get("features", "")).split()
    best = next((name for name in _INSTRUCTIONS if name in flags), None)
    return f"{model} with {best}" if best else model
