# SPDX-License-Identifier: Apache-2.0
"""`tests/engine/driver.py` on Model Runner V2 under the interpreter: `python driver_v2.py JOB OUT`."""

import sys
from pathlib import Path

import interpreted

interpreted.prepare()
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

if __name__ == "__main__":
    import vllm  # noqa: F401  # before anything is registered in it

    interpreted.install()
    from driver import main

    main(*sys.argv[1:])
