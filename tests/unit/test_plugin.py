# SPDX-License-Identifier: Apache-2.0
"""The entry point: found by vLLM, cheap, harmless when called again."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

pytest.importorskip("vllm")

from heterospec_vllm import plugin
from heterospec_vllm.compat import TESTED_VERSIONS, version_reason, vllm_version
from heterospec_vllm.wraps import WRAPS


def test_entry_point_is_installed() -> None:
    points = entry_points(group="vllm.general_plugins", name="heterospec")
    assert [point.load() for point in points] == [plugin.register]


def test_register_is_reentrant() -> None:
    plugin.register()
    wrapped = [wrap.find() for wrap in WRAPS]
    plugin.register()
    assert [wrap.find() for wrap in WRAPS] == wrapped


def test_register_loads_nothing_of_the_engine() -> None:
    """Beyond what the wraps need of vLLM: no model code, no kernels, nothing compiled."""
    code = (
        "import sys\n"
        "from heterospec_vllm.plugin import register\n"
        "import vllm.engine.arg_utils\n"
        "before = set(sys.modules)\n"
        "register()\n"
        "new = set(sys.modules) - before\n"
        "new -= {'heterospec_vllm.kernels', 'heterospec_vllm.kernels.private_files'}\n"
        "heavy = [name for name in new if name.split('.')[0] in ('torch', 'triton', 'transformers')\n"
        "         or name.startswith(('heterospec_vllm.kernels', 'heterospec_vllm.runners'))]\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("version", [*TESTED_VERSIONS, "0.32.0+cpu", "0.33.0+cu129"])
def test_tested_versions_pass(version: str) -> None:
    assert version_reason(version) is None


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.33.0.dev3", "0.34.0+cpu", "dev"])
def test_other_versions_are_named(version: str) -> None:
    reason = version_reason(version)
    assert reason == f"vllm: found version {version}, allowed: 0.32.0 or 0.33.0"


def test_installed_version_is_tested() -> None:
    assert version_reason(vllm_version()) is None
