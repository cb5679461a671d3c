# SPDX-License-Identifier: Apache-2.0
"""Where kernel tests run: on the GPU if there is one, else on CPU under Triton's interpreter."""

import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
# Triton's own library functions (tl.max, ...) are decorated when triton is imported, so a later
# change of the variable leaves them uncallable from an interpreted kernel.
TOO_LATE = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if not HAS_GPU and not TOO_LATE:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """The device on which Triton kernels can be launched here."""
    if HAS_GPU:
        return torch.device("cuda")
    if TOO_LATE:
        pytest.fail(
            "triton was imported before TRITON_INTERPRET=1 was set; run tests/kernels alone"
        )
    return torch.device("cpu")


@pytest.fixture
def move(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """To the device with its strides, which `Tensor.to` closes up when it copies."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        kind = {"dtype": tensor.dtype, "device": device}
        return torch.empty_strided(tensor.size(), tensor.stride(), **kind).copy_(tensor)

    return moved


@pytest.fixture
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What launchers allocate holds NaN or a far-off integer, so that reading it unwritten shows."""
    allocate = torch.empty

    def poisoned(*args, **kwargs) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 99)

    monkeypatch.setattr(torch, "empty", poisoned)


# Processors, by what their own build has, that can run a build which is another one there.
OTHER_BUILDS = {
    "pairs": ("amx", "avx512_bf16"),
    "tiles": ("avx512_bf16",),
    "avx2": ("amx", "avx512_bf16", "avx512"),
}
# The builds to run instead, whatever the processor: of tools/asan.py.
CHOSEN_BUILDS = os.environ.get("HETEROSPEC_TEST_BUILDS", "").split()


@pytest.fixture(scope="module", params=CHOSEN_BUILDS or ["native", *OTHER_BUILDS, "portable"])
def cpu_build(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ kernels as built for this CPU and in every other way that it can run (`choose_build`)."""
    from heterospec_vllm.kernels.cpu import library

    if CHOSEN_BUILDS:
        library.choose_build(request.param)
    reason = library.unavailable_reason()
    if reason is not None:
        (pytest.fail if CHOSEN_BUILDS else pytest.skip)(reason)
    own = library.instruction_set()
    if not CHOSEN_BUILDS and own not in OTHER_BUILDS.get(request.param, (own,)):
        pytest.skip("this CPU's own build is that one, or it cannot run it")
    library.choose_build(request.param)
    yield request.param
    library.choose_build("native")
