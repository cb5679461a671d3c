# SPDX-License-Identifier: Apache-2.0
"""Systems behind `vllm serve`, measured by vLLM's own client, `vllm bench serve`.

All servers of a comparison get the same arguments but for the speculative config. Like the engines in processes they
reuse no prefix of an earlier round, and they take no sampling defaults from the model's folder.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from heterospec_vllm.bench import rows
from heterospec_vllm.bench.engines import DRAFTER_COUNTERS, TOP, Position
from heterospec_vllm.bench.pause import PAUSE_SECONDS
from heterospec_vllm.bench.serving_client import (
    SLOWEST_PREFILL,
    SLOWEST_TOKEN,
    client_arguments,
    client_environment,
    client_timeout,
    serving_of,
    write_dataset,
)
from heterospec_vllm.demo.server import (
    HOST,
    ServerFailed,
    VllmServer,
    free_port,
    last_lines,
    signal_group,
)
from heterospec_vllm.kernels import private_files
from heterospec_vllm.observe.metrics import METRICS

if TYPE_CHECKING:
    from prometheus_client.samples import Sample
    from rich.console import Console

# Seconds for a server that has stopped answering to end and so to say why.
DEATH_SHOWS = 10.0
POLL_SECONDS = 0.2

_OURS = "heterospec_"
_VLLMS = "vllm:spec_decode_"
_TOTAL = "_total"
_FIELDS = {record.name: record.field for record in METRICS}

T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True)
class ServedRun:
    """One timed run of one system."""

    seconds: float  # from the first request sent to the last answer
    num_tokens: int
    serving: rows.Serving
    # What the server's Prometheus counters grew by, see `counters_of`.
    counters: dict[str, Any] | None


class ServedSystem:
    """One `vllm serve` process that stays up while others run in turns with it."""

    # The client's command line up to its arguments.
    client: tuple[str, ...] = (*VllmServer.launcher, "bench", "serve")

    def __init__(
        self,
        name: str,
        target: str | Path,
        *,
        folder: Path,
        max_model_len: int,
        max_num_seqs: int,
        speculative_config: dict[str, Any] | None,
        port: int | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        """Logs and the client's results go to `folder`; `arguments` are further ones of `vllm serve`."""
        self.name = name
        self.folder = folder
        self._target = str(target)
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._config = None if speculative_config is None else json.dumps(speculative_config)
        self._port = port
        self._arguments = [
            *("--max-num-seqs", str(max_num_seqs)),
            "--no-enable-prefix-caching",
            *("--generation-config", "vllm"),
            *arguments,
        ]
        self._server: VllmServer | None = None

    @property
    def server(self) -> VllmServer:
        assert self._server is not None, "start() first"
        return self._server

    def start(self, console: Console) -> None:
        """Returns when the server answers; raises ServerFailed with the reason where it does not."""
        self.close()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        port = free_port() if self._port is None else self._port
        _check_free(port)
        self._server = VllmServer(
            self.name,
            self._target,
            log_file=self.folder / f"{self._file_name}-server.log",
            port=port,
            max_model_len=self._max_model_len,
            speculative_config=self._config,
        )
        self._server.arguments += self._arguments
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            self._server.start(console)
            on_failure.pop_all()

    def run(
        self,
        cell: rows.Cell,
        prompts: list[str],
        *,
        goodput: dict[str, float] | None,
        seed: int = 0,
    ) -> ServedRun:
        """One run of `vllm bench serve`, whose results stay in the folder.

        `prompts` go round until there are as many as the cell has; `goodput` limits are milliseconds. `seed` decides
        the arrivals and, above temperature 0, the sampling. Raises ServerFailed where the server, the client or any
        request failed.
        """
        result = self._next_result()
        with tempfile.TemporaryDirectory(prefix="heterospec-bench-") as temporary:
            dataset = Path(temporary) / "prompts.jsonl"
            write_dataset(dataset, prompts, cell.num_prompts)
            limit = self._client_limit(cell)
            arguments = client_arguments(cell, dataset, result, limit, goodput, seed)
            arguments += ["--base-url", self.server.url, "--model", self._target]
            time.sleep(PAUSE_SECONDS)
            before = self._counters()
            self._drive(arguments, result.with_suffix(".log"), client_timeout(cell))
        after = self._counters()
        found = json.loads(result.read_text())
        try:
            self._check_complete(found, cell)
            return ServedRun(
                seconds=found["duration"],
                num_tokens=found["total_output_tokens"],
                serving=serving_of(found, cell, goodput),
                counters=None if after is None else _difference(after, before or {}),
            )
        except KeyError as error:
            raise ServerFailed(f"{result}: found no {error}: another version of vLLM?") from error

    def greedy_answers(
        self, prompts: list[str], max_tokens: int, *, concurrency: int | None = None
    ) -> list[list[int]]:
        """[num_prompts] token ids of greedy chat answers, as many at once as the server takes by default."""

        def answer(prompt: str) -> list[int]:
            body = {
                "model": self._target,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": max_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            timeout = SLOWEST_PREFILL + SLOWEST_TOKEN * max_tokens
            (choice,) = self._post("/v1/chat/completions", body, timeout)["choices"]
            return list(choice["token_ids"])

        return _at_once(answer, prompts, concurrency or self._max_num_seqs)

    def teacher_forced(
        self, prompts: list[list[int]], answers: list[list[int]]
    ) -> list[list[Position]]:
        """[num_prompts][answer length] what the target thinks of each given answer; of a plain server."""

        def think(pair: tuple[list[int], list[int]]) -> list[Position]:
            prompt, answer = pair
            body = {
                "model": self._target,
                "prompt": prompt + answer,
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": TOP,
            }
            (choice,) = self._post("/v1/completions", body, 2 * SLOWEST_PREFILL)["choices"]
            return [
                Position({int(token): value["logprob"] for token, value in chosen.items()})
                for chosen in choice["prompt_logprobs"][len(prompt) :]
            ]

        return _at_once(think, list(zip(prompts, answers, strict=True)), self._max_num_seqs)

    def memory(self) -> int:
        """Bytes that are the server's own, over all its processes."""
        import psutil

        leader = psutil.Process(self.server.process_id)
        processes = [leader, *leader.children(recursive=True)]
        return sum(int(process.memory_full_info().uss) for process in processes)

    def close(self) -> None:
        """Ends every process of the server; safe to call twice."""
        if self._server is not None:
            server, self._server = self._server, None
            server.stop()

    @property
    def _file_name(self) -> str:
        return re.sub(r"[^\w.]+", "-", self.name)

    def _next_result(self) -> Path:
        """A file for the client's results that no earlier run has used."""
        number = 1
        while (self.folder / f"{self._file_name}-{number:03d}.log").exists():
            number += 1
        return self.folder / f"{self._file_name}-{number:03d}.json"

    def _client_limit(self, cell: rows.Cell) -> int | None:
        """Requests that the client sends at once; None: an open loop waits in the server, as it would in earnest."""
        if cell.request_rate is not None and cell.concurrency >= self._max_num_seqs:
            return None
        return cell.concurrency

    def _drive(self, arguments: list[str], log_file: Path, timeout: float) -> None:
        """Runs the client to its end; on any exception it is killed."""
        with open(log_file, "wb", opener=private_files.opener) as log:
            client = subprocess.Popen(
                [*self.client, *arguments],
                env=client_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its own group, so that Ctrl-C reaches us alone and we end all of it.
                start_new_session=True,
            )
        try:
            self._watch(client, timeout, log_file)
        finally:
            signal_group(client.pid, signal.SIGKILL)
            client.wait()
        if client.returncode:
            raise self._failure(
                f"the client ended with status {client.returncode}\n{last_lines(log_file)}"
            )

    def _watch(self, client: subprocess.Popen[bytes], timeout: float, log_file: Path) -> None:
        deadline = time.monotonic() + timeout
        while client.poll() is None:
            self.server.check_running()
            if time.monotonic() > deadline:
                raise self._failure(
                    f"the client did not end within {timeout:.0f} s\n{last_lines(log_file)}"
                )
            time.sleep(POLL_SECONDS)

    def _check_complete(self, found: dict[str, Any], cell: rows.Cell) -> None:
        completed, failed = found["completed"], found["failed"]
        if failed or completed != cell.num_prompts:
            reasons = [text.strip().splitlines()[-1] for text in found["errors"] if text.strip()]
            raise self._failure(
                f"{cell.num_prompts - completed} of {cell.num_prompts} requests failed: "
                f"{reasons[0] if reasons else 'no reason given'}"
            )
        expected, got = completed * cell.output_len, found["total_output_tokens"]
        if got != expected:
            raise self._failure(f"answers were cut short: found {got} tokens, not {expected}")

    def _counters(self) -> dict[str, Any] | None:
        return counters_of(self._ask("/metrics", self.server.samples))

    def _post(self, path: str, body: dict[str, Any], timeout: float) -> Any:
        return self._ask(path, lambda: self.server.post(path, body, timeout))

    def _ask(self, path: str, call: Callable[[], T]) -> T:
        """What the call returns; ServerFailed says why there is no answer."""
        try:
            return call()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise self._failure(f"{path}: status {error.code}: {text[:500]}") from error
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(f"{path}: {error}") from error

    def _failure(self, reason: str) -> ServerFailed:
        """The exception to raise; if the server is dying, that is the reason, with the end of its log."""
        deadline = time.monotonic() + DEATH_SHOWS
        while not self.server.is_healthy():
            self.server.check_running()
            if time.monotonic() > deadline:
                reason += f"\n{self.name} does not answer\n{self.server.log_tail()}"
                break
            time.sleep(POLL_SECONDS)
        return ServerFailed(reason)


def counters_of(samples: Iterable[Sample]) -> dict[str, Any] | None:
    """Ours, else those of vLLM's drafters, else None.

    Ours have the names that an engine in a process gives them (`metrics.StepCounters`), those with a label as a
    mapping. vLLM's are summed over its engines.
    """
    ours: dict[str, Any] = {}
    vllms: dict[str, float] = {}
    for sample in samples:
        if not sample.name.endswith(_TOTAL):
            continue
        name = sample.name.removesuffix(_TOTAL)
        if name.startswith(_OURS):
            _add(ours, _FIELDS.get(sample.name, name.removeprefix(_OURS)), sample)
        elif name.startswith(_VLLMS) and name.removeprefix(_VLLMS) in DRAFTER_COUNTERS:
            name = name.removeprefix(_VLLMS)
            vllms[name] = vllms.get(name, 0.0) + sample.value
    return ours or vllms or None


def _add(counters: dict[str, Any], name: str, sample: Sample) -> None:
    if len(sample.labels) == 1:
        (value,) = sample.labels.values()
        by_label = counters.setdefault(name, {})
        by_label[value] = by_label.get(value, 0.0) + sample.value
    else:
        counters[name] = counters.get(name, 0.0) + sample.value


def _difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _difference(value, before.get(name, {}))
        if isinstance(value, dict)
        else value - before.get(name, 0.0)
        for name, value in after.items()
    }


def _check_free(port: int) -> None:
    """Raises ServerFailed for a port that somebody listens on: its answers would be taken for the server's."""
    with socket.socket() as probe:
        # As the server does; without it a port rests for a minute after its last use.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            used = error.errno == errno.EADDRINUSE
            reason = "in use by another process" if used else str(error.strerror)
            raise ServerFailed(f"port {port} of {HOST}: {reason}, allowed: a free port") from error


def _at_once(call: Callable[[V], T], values: list[V], concurrency: int) -> list[T]:
    """The call's results in order, some at a time; after an error or Ctrl-C nothing new is begun."""
    pool = ThreadPoolExecutor(concurrency)
    try:
        return list(pool.map(call, values))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
