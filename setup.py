# SPDX-License-Identifier: Apache-2.0
"""Maps two top-level folders into the package; everything else is in pyproject.toml.

`kernels/` depends on torch and triton only and is tested on machines with nothing else, so it
lives apart, but a top-level import package `kernels` would collide with one on PyPI.
"""

from setuptools import find_packages, setup

PACKAGE_DIR = {
    "heterospec_vllm": "heterospec_vllm",
    "heterospec_vllm.kernels": "kernels",
    "heterospec_vllm.configs": "configs",
}

setup(
    packages=[
        *find_packages(include=["heterospec_vllm", "heterospec_vllm.*"]),
        "heterospec_vllm.kernels",
        *(f"heterospec_vllm.kernels.{name}" for name in find_packages("kernels")),
        "heterospec_vllm.configs",
    ],
    package_dir=PACKAGE_DIR,
    package_data={
        "heterospec_vllm": ["assets/**/*", "bench/*.j2"],
        "heterospec_vllm.kernels": ["csrc/*"],
        "heterospec_vllm.configs": ["*.json", "*.md", "profiles/*"],
    },
)
