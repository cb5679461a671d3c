# SPDX-License-Identifier: Apache-2.0
"""`python -m heterospec_vllm.cli` is the `heterospec` command of that Python."""

from heterospec_vllm.cli.main import app

app(prog_name="heterospec")
