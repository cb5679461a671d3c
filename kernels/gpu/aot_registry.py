# SPDX-License-Identifier: Apache-2.0
"""Which kernels are compiled ahead of time, in which configurations.

A kernel module takes part by naming its configurations:

    AOT_CONFIGS = (
        AotConfig(_my_kernel, "bf16", {"x_ptr": "*bf16:16", "n": "i32"}, {"BLOCK": 256}),
    )

Every argument of the kernel is either in `signature` or in `constexprs`. A type is Triton's
(`*bf16`, `i32`, `fp32`); the ending `:16` says that the launcher guarantees a value divisible by 16,
as torch guarantees for the start of a tensor.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The program that asks this registry, and itself.
_SKIPPED = ("aot", "aot_registry")


@dataclass(frozen=True)
class AotConfig:
    """One way in which one kernel is launched."""

    kernel: Any  # the @triton.jit function
    name: str  # of the configuration, unique among the kernel's
    signature: Mapping[str, str]  # argument -> Triton type, ":16" appended if divisible by 16
    constexprs: Mapping[str, Any]  # argument -> value
    num_warps: int = 4
    num_stages: int = 2

    @property
    def kernel_name(self) -> str:
        return self.kernel.__name__


def kernel_modules() -> list[str]:
    """Full names of the package's modules that may hold Triton kernels, sorted."""
    package = importlib.import_module(__package__)
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return [f"{__package__}.{name}" for name in sorted(names) if name not in _SKIPPED]


def all_configs() -> list[AotConfig]:
    """The configurations of every kernel module.

    Raises:
        ValueError: a kernel names two configurations alike.
    """
    configs = [
        config
        for module in kernel_modules()
        for config in getattr(importlib.import_module(module), "AOT_CONFIGS", ())
    ]
    seen = set()
    for config in configs:
        key = (config.kernel_name, config.name)
        if key in seen:
            raise ValueError(f"{config.kernel_name} has two configurations named {config.name}")
        seen.add(key)
    return configs
