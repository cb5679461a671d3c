# SPDX-License-Identifier: Apache-2.0
"""Settings that must be in place before any test imports vLLM or torch."""

import os
from pathlib import Path

# No test may reach for a hub; every model is made here or comes from the demo model's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
# Workers of pytest-xdist share the cores: a parallel region of two threads would wait for the other worker.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton decides how its functions run when it is imported, which vLLM does: without a GPU, the interpreter.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
    os.environ["TRITON_INTERPRET"] = "1"
