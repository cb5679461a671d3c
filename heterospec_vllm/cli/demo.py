# SPDX-License-Identifier: Apache-2.0
"""`heterospec demo`: a real server, a real client, and the same questions without speculation."""

import contextlib
import os
import shlex
import signal
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from heterospec_vllm.demo.chat import Measurements
    from heterospec_vllm.demo.server import VllmServer

MAX_MODEL_LEN = 2048


def demo(
    target: Annotated[
        str | None,
        typer.Option(help="A model folder to serve; default: the embedded model."),
    ] = None,
    speculative_config: Annotated[
        str | None,
        typer.Option(help="Path or JSON, as for `vllm serve`; default: the packaged one."),
    ] = None,
    num_rounds: Annotated[int, typer.Option("--rounds", min=1, help="Interleaved rounds.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    serve: Annotated[
        bool, typer.Option("--serve", help="Leave the server up until Ctrl-C; compare nothing.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free port.")] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="As for `vllm serve`. Default: the model's own, but float32 on a processor without "
            "bfloat16 products, where it is faster.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a model with speculation, chat with it, and compare it with plain decoding.

    Starts `vllm serve` on a free loopback port, asks it questions with the `openai` client, then
    asks a second server without speculation the same questions in alternating rounds. Both run
    in the same mode on the same cores. Everything is shut down at the end, also on Ctrl-C.
    """
    from heterospec_vllm.demo.server import ServerFailed

    # So that `kill` cleans up like Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console = Console(highlight=False)
    try:
        target_dir = target or _default_target(console)
        config = speculative_config or _packaged_config()
        dtype = dtype or _faster_dtype(console)
        with tempfile.TemporaryDirectory(prefix="heterospec-demo-") as log_dir:
            server = _server("heterospec", target_dir, Path(log_dir), port, config, dtype)
            if serve:
                _serve(console, server)
            else:
                plain = _server("plain", target_dir, Path(log_dir), 0, None, dtype)
                _demo(console, server, plain, num_rounds, max_tokens)
    except (OSError, ServerFailed, ValueError, RuntimeError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(code=1) from error


def _default_target(console: Console) -> str:
    from heterospec_vllm.demo.model_cache import default_cache_dir, prepare_target

    return str(prepare_target(default_cache_dir(), console))


def _packaged_config() -> str:
    return str(resources.files("heterospec_vllm.configs").joinpath("heterospec.json"))


def _faster_dtype(console: Console) -> str | None:
    from heterospec_vllm.demo.server import multiplies_16_bits

    if multiplies_16_bits():
        return None
    console.print("no bfloat16 products on this processor: serving in float32, which is faster")
    return "float32"


def _server(
    label: str,
    target: str,
    log_dir: Path,
    port: int,
    speculative_config: str | None,
    dtype: str | None,
) -> "VllmServer":
    from heterospec_vllm.demo.server import VllmServer, free_port

    return VllmServer(
        label,
        target,
        log_file=log_dir / f"{label}.log",
        port=port or free_port(),
        max_model_len=MAX_MODEL_LEN,
        speculative_config=speculative_config,
        dtype=dtype,
    )


def _serve(console: Console, server: "VllmServer") -> None:
    with server:
        _start(console, server)
        body = (
            f'{{"model": "{server.target}", "messages": '
            '[{"role": "user", "content": "What is the capital of France?"}]}'
        )
        console.print(
            f"try it:\n  curl {server.url}/v1/chat/completions "
            f"-H 'Content-Type: application/json' -d {shlex.quote(body)}\n"
            "Ctrl-C ends the server",
            soft_wrap=True,
            markup=False,
        )
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                server.check_running()
                time.sleep(1)
        console.print("shutting down")


def _demo(
    console: Console,
    server: "VllmServer",
    plain: "VllmServer",
    num_rounds: int,
    max_tokens: int,
) -> None:
    from heterospec_vllm.demo.chat import QUESTIONS, ChatClient, compare

    with server, plain:
        _start(console, server)
        client = ChatClient(server)
        for question in QUESTIONS:
            console.print(f"\n[bold]{escape(question)}[/]")
            client.ask(question, max_tokens, lambda text: console.print(escape(text), end=""))
            console.print()
        console.print("\n[bold]the same questions without speculation[/]")
        _start(console, plain)
        plain_client = ChatClient(plain)
        for question in QUESTIONS:  # warms it up as the answers above did the first server
            plain_client.ask(question, max_tokens)
        measured, reference = compare(
            [client, plain_client],
            num_rounds=num_rounds,
            max_tokens=max_tokens,
            on_round=console.print,
        )
        console.print(_summary(measured, reference))
        same = sum(measured.answers[q] == reference.answers[q] for q in QUESTIONS)
        console.print(
            f"{same} of {len(QUESTIONS)} answers are identical. In bf16 two tokens can be so close "
            "that the number of tokens computed together decides; in float32 answers are "
            "token-identical."
        )
        console.print("shutting down")


def _start(console: Console, server: "VllmServer") -> None:
    from heterospec_vllm.demo.server import server_environment

    environment = server_environment()
    shown = " ".join(
        f"{name}={environment[name]}"
        for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE", "LD_PRELOAD")
        if name in environment
    )
    console.print(f"{shown} vllm {shlex.join(server.arguments)}", style="dim", soft_wrap=True)
    server.start(console)


def _summary(measured: "Measurements", reference: "Measurements") -> Table:
    bind = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    table = Table(
        title="one request at a time, greedy, medians of interleaved rounds",
        caption=f"vllm serve, VLLM_CPU_OMP_THREADS_BIND={bind} for both, {os.cpu_count()} cores",
    )
    for column in ("system", "tokens/s", "range", "acceptance length", "ratio"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for label, result in (("plain", reference), ("speculating", measured)):
        length = result.acceptance_length
        table.add_row(
            label,
            f"{result.median:.1f}",
            f"{min(result.tokens_per_second):.1f}..{max(result.tokens_per_second):.1f}",
            "-" if length is None else f"{length:.2f}",
            f"{result.median / reference.median:.2f}x",
        )
    return table
