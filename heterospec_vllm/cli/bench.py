# SPDX-License-Identifier: Apache-2.0
"""`heterospec bench`: systems against each other, side by side, from one YAML file."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from heterospec_vllm.plugin.compat import platform_name

if TYPE_CHECKING:
    from heterospec_vllm.bench.contenders import Contender
    from heterospec_vllm.bench.spec import BenchSpec, System
    from heterospec_vllm.bench.thresholds import Thresholds

INTERRUPTED = 130
KV_CACHE_SPACE = "VLLM_CPU_KVCACHE_SPACE"


def bench(
    spec_file: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="What to compare.")],
    output: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder of results; what it holds already is not run again. [required, but for "
            "`--dry-run`]",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="`bfloat16`, `float16` or `float32`, instead of the spec's; `float32` for "
            "CPUs without AVX-512."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of JSONL files (`prompt` or `turns`), each a set under its name, instead "
            "of the prompts that are built in.",
        ),
    ] = None,
    thresholds: Annotated[
        Path | None,
        typer.Option(help="YAML of ratios that must be reached, else the exit code is 2."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the spec, its prompt files and profile, list the cells and stop.",
        ),
    ] = False,
) -> None:
    """Time systems side by side: plain vLLM, its `eagle3` chains, `ngram`, and our policies.

    Every engine has a process of its own and stays loaded; systems run in turns (A B C A B C ...),
    with a pause before each run. A run is one JSON line in OUTPUT/rows.jsonl, with its counters,
    versions and machine. A system whose greedy answers differ from plain vLLM's beyond near-ties
    gets no timing. An interrupted benchmark goes on when the command is repeated.

    Systems: `plain`, `eagle3 k=N`, `eagle3 tuned`, `ngram k=N`, `off`, `chain k=N`,
    `static nodes=N depth=N top=N`, `paper ...`, `marginal ...`. A spec to start from is
    `benchmarks/ladder.yaml`; `docs/benchmarks.md` explains every key.

    Exit code: 0; 1 where a cell failed or answers differ; 2 below a threshold; 130 interrupted.
    """
    from heterospec_vllm.bench.spec import planned_cells

    # `kill` is Ctrl-C: whole rows, no stray process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    spec = _checked(spec_file, dtype, prompts)
    limits = _limits(thresholds)
    if dry_run:
        for planned in planned_cells(spec, spec.target_name or "target"):
            names = ", ".join(system.name for system in planned.systems)
            console.print(f"{planned.cell.label}: {planned.rounds} rounds of {names}")
        return
    if output is None:
        raise typer.BadParameter(
            "found nothing, allowed: a folder for the results; only `--dry-run` needs none",
            param_hint="--output",
        )
    try:
        code = _run(spec, output, console)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except KeyboardInterrupt:
        console.print("interrupted; the rows so far are kept, the same command goes on from here")
        raise typer.Exit(INTERRUPTED) from None
    if limits is not None and not limits.reached(output, console):
        code = 2
    raise typer.Exit(code)


def _checked(spec_file: Path, dtype: str | None, prompts: Path | None) -> BenchSpec:
    """The spec, read and checked, with the prompts and the profile that it names."""
    from heterospec_vllm.bench.prompt_sets import check_files
    from heterospec_vllm.bench.spec import load_spec, with_prompt_files
    from heterospec_vllm.policy.profile import load_profile

    try:
        spec = load_spec(spec_file, dtype)
        if prompts is not None:
            spec = with_prompt_files(spec, prompts)
        check_files(spec.prompts)
        if spec.profile is not None:
            load_profile(Path(spec.profile).expanduser())
    except ValueError as error:
        message = str(error).removeprefix("speculative_config.")  # where others have a `profile`
        raise typer.BadParameter(message, param_hint="SPEC.yaml") from error
    return spec


def _limits(thresholds: Path | None) -> Thresholds | None:
    from heterospec_vllm.bench.spec import read_yaml
    from heterospec_vllm.bench.thresholds import Thresholds

    if thresholds is None:
        return None
    try:
        return read_yaml(thresholds, Thresholds)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--thresholds") from error


def _run(spec: BenchSpec, output: Path, console: Console) -> int:
    import psutil

    from heterospec_vllm.bench.environment import environment_of
    from heterospec_vllm.bench.orchestrate import Bench
    from heterospec_vllm.bench.prompt_sets import PromptSets
    from heterospec_vllm.bench.spec import planned_cells

    target, head = _pair(spec, console)
    name = spec.target_name or Path(target).name
    cells = list(planned_cells(spec, name))
    longest = max((p.cell.longest for p in cells), default=1)
    prompts = PromptSets(
        spec.prompts,
        _tokenizer(target),
        spec.max_model_len - longest - 1,
        spec.mixes,
    )
    environment = environment_of()
    maker = _Maker(spec, target, head, output, max((p.cell.concurrency for p in cells), default=1))
    code = 0
    if cells:
        with _kv_cache_space(spec.kv_cache_gib):
            code = Bench(
                spec, cells, prompts, output, environment, maker, console,
                lambda: psutil.virtual_memory().available,
            ).run()  # fmt: skip
    return code


def _tokenizer(target: str) -> Any:
    """Of the target. Raises ValueError naming the field where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(target)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"target: found no model with a tokenizer at '{target}' ({reason}), "
            "allowed: a folder, relative to the working directory, or a hub id"
        ) from error


@contextmanager
def _kv_cache_space(gib: int) -> Iterator[None]:
    """For the engines of the cells, which inherit it; what the user has set stays."""
    given = os.environ.get(KV_CACHE_SPACE)
    os.environ.setdefault(KV_CACHE_SPACE, str(gib))
    try:
        yield
    finally:
        if given is None:
            del os.environ[KV_CACHE_SPACE]


def _gpu_memory(spec: BenchSpec) -> dict[str, Any]:
    """Arguments that let several engines share a GPU; on CPU the environment says it."""
    if platform_name() == "cpu":
        return {}
    return {
        "kv_cache_memory_bytes": spec.kv_cache_gib * 2**30,
        "gpu_memory_utilization": spec.gpu_memory_utilization,
    }


def _pair(spec: BenchSpec, console: Console) -> tuple[str, str]:
    """(target, head), prepared where the spec names none."""
    from heterospec_vllm.demo.model_cache import default_cache_dir, prepare_target, shipped_head

    target = spec.target or str(prepare_target(default_cache_dir(), console))
    return target, spec.head or str(shipped_head())


class _Maker:
    """Builds the engine or server of a key; nothing is started yet."""

    def __init__(self, spec: BenchSpec, target: str, head: str, folder: Path, most: int) -> None:
        self._spec, self._target, self._head = spec, target, head
        self._folder, self._most = folder, most

    def __call__(self, mode: str, key: str, systems: tuple[System, ...]) -> Contender:
        from heterospec_vllm.bench.contenders import (
            OfflineContender,
            ServedContender,
            offline_arguments,
        )
        from heterospec_vllm.bench.serving import ServedSystem

        spec = self._spec
        config = self._config(systems[0].engine, systems)
        if mode == "offline":
            arguments = offline_arguments(
                self._target, spec.dtype, spec.max_model_len, self._most, config
            )
            return OfflineContender({**arguments, **_gpu_memory(spec)})
        if systems[0].policy is not None and config is not None:
            config = {**config, **systems[0].policy}
        served = ServedSystem(
            key,
            self._target,
            folder=self._folder / "servers",
            max_model_len=spec.max_model_len,
            max_num_seqs=max(2, self._most),
            speculative_config=config,
            arguments=("--dtype", spec.dtype),
        )
        return ServedContender(served, Console(), spec.goodput)  # type: ignore[arg-type]

    def _config(self, engine: str, systems: tuple[System, ...]) -> dict[str, Any] | None:
        from heterospec_vllm.bench.rows import ROWS, Row, read
        from heterospec_vllm.bench.spec import OURS, TUNED, engine_config
        from heterospec_vllm.bench.tuned import schedule_of

        config = engine_config(engine, list(systems), self._head)
        if config is None:
            return None
        if engine == TUNED:
            schedule = self._spec.schedule or schedule_of(
                read(self._folder / ROWS, Row), self._most
            )
            config["num_speculative_tokens_per_batch_size"] = schedule
            config["num_speculative_tokens"] = max(k for _, _, k in schedule)
        if engine == OURS and self._spec.profile is not None:
            config["profile"] = self._spec.profile
        return config
