# SPDX-License-Identifier: Apache-2.0
"""Entry point of the `heterospec` command.

Modules of this folder import torch, vLLM and the like inside their functions, so that `--help`
answers at once.
"""

import typer

from heterospec_vllm.cli.bench import bench
from heterospec_vllm.cli.calibrate import calibrate
from heterospec_vllm.cli.demo import demo
from heterospec_vllm.cli.demo_model import demo_model
from heterospec_vllm.cli.explain import explain
from heterospec_vllm.cli.report import report
from heterospec_vllm.cli.simulate import simulate
from heterospec_vllm.cli.step_table import step_table
from heterospec_vllm.cli.train_head import train_head

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)


@app.callback()
def root() -> None:
    """Tree speculative decoding for stock vLLM, with an EAGLE-3 head.

    Serving needs no command of ours: `vllm serve MODEL --speculative-config heterospec.json`.
    The commands here prepare, try and measure it.
    """


app.command("bench")(bench)
app.command("calibrate")(calibrate)
app.command("demo")(demo)
app.command("demo-model")(demo_model)
app.command("explain")(explain)
app.command("report")(report)
app.command("simulate")(simulate)
app.command("step-table")(step_table)
app.command("train-head")(train_head)
