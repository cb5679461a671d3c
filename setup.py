# SPDX-License-Identifier: Apache-2.0
"""Finds the packages; everything else is in pyproject.toml.

`kernels/` and `configs/` lie at the top level and are linked into the package: `kernels/` depends on
torch and triton only and is tested on machines with nothing else, but a top-level import package
`kernels` would collide with one on PyPI. Through the links type checkers and tools see one package.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["heterospec_vllm", "heterospec_vllm.*"]),
    package_data={
        "heterospec_vllm": ["py.typed", "assets/**/*"],
        "heterospec_vllm.kernels": ["csrc/*"],
        "heterospec_vllm.configs": ["*.json", "*.md", "profiles/*"],
    },
)
