# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` process on the loopback interface: started, watched, measured, always ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from heterospec_vllm.kernels import private_files

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

HOST = "127.0.0.1"
START_TIMEOUT = 900.0  # seconds; a first start compiles the model, slowly on few cores
STOP_TIMEOUT = 20.0  # seconds between SIGTERM and SIGKILL
LOG_TAIL_LINES = 40

# Proxies of the environment must not see requests to this machine.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerFailed(RuntimeError):
    """The server ended by itself or did not answer; the message holds the end of its log."""


@dataclass(frozen=True)
class SpecDecodeCounters:
    """vLLM's own speculative decoding counters since the server started."""

    num_drafts: float
    num_draft_tokens: float
    num_accepted_tokens: float

    def acceptance_length(self, since: "SpecDecodeCounters") -> float:
        """Mean tokens per verified draft, the target's own token included; 1.0 without drafts."""
        drafts = self.num_drafts - since.num_drafts
        accepted = self.num_accepted_tokens - since.num_accepted_tokens
        return 1.0 + accepted / drafts if drafts else 1.0


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def multiplies_16_bits() -> bool:
    """Whether vLLM's products are fast in bfloat16 and float16 here.

    On a processor for which oneDNN has none, vLLM 0.32 falls back to torch's, which take each row of a batch on its
    own: slower than float32 everywhere, and n tokens cost n times one.
    """
    import torch

    return torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def server_environment() -> dict[str, str]:
    """The environment of every server of a comparison; what the user has set wins.

    Nothing is preloaded beyond vLLM's own choice of torch's libgomp: with the one OpenMP thread
    that a two-core machine leaves to the engine, Intel's OpenMP, which vLLM's log recommends, was
    slower in each of 4 interleaved rounds (medians 49.1 against 53.1 tokens/s).
    """
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "auto",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
    }


class VllmServer:
    """Context manager around one `vllm serve` process group, see `start` and `stop`."""

    # The module, not the `vllm` script: it is this interpreter's, whatever PATH says.
    launcher: tuple[str, ...] = (sys.executable, "-m", "vllm.entrypoints.cli.main")

    def __init__(
        self,
        label: str,
        target: Path | str,
        *,
        log_file: Path,
        port: int,
        max_model_len: int,
        speculative_config: str | None,
        dtype: str | None = None,  # as for `vllm serve`; None: the model's own
    ) -> None:
        self.label = label
        self.target = str(target)
        self.log_file = log_file
        self.port = port
        self.arguments = ["serve", self.target, "--host", HOST, "--port", str(port)]
        self.arguments += ["--max-model-len", str(max_model_len)]
        if dtype is not None:
            self.arguments += ["--dtype", dtype]
        if speculative_config is not None:
            self.arguments += ["--speculative-config", speculative_config]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> "VllmServer":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, console: Console, timeout: float = START_TIMEOUT) -> None:
        """Start the process group and wait until it answers, showing the time and the log's end.

        Raises ServerFailed if the process ends or `timeout` seconds pass.
        """
        with open(self.log_file, "wb", opener=private_files.opener) as log:
            self._process = subprocess.Popen(
                [*self.launcher, *self.arguments],
                env=server_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its own group, so that Ctrl-C reaches us alone and `stop` reaches all of it.
                start_new_session=True,
            )
        started = time.monotonic()
        next_report = 15.0
        with console.status("") as status:
            while not self.is_healthy():
                elapsed = time.monotonic() - started
                self.check_running()
                if elapsed > timeout:
                    raise ServerFailed(f"no answer after {timeout:.0f} s\n{self.log_tail()}")
                message = f"starting {self.label}: {elapsed:.0f} s"
                status.update(f"{message}  [dim]{self._last_log_line(console.width - 40)}[/]")
                if not console.is_terminal and elapsed > next_report:
                    console.print(f"{message} (a first start compiles, about 80 s)")
                    next_report += 15.0
                time.sleep(0.5)
        console.print(f"{self.label} answers at {self.url} ({time.monotonic() - started:.0f} s)")

    def stop(self) -> None:
        """End every process of the group: politely, then by force; safe to call twice."""
        if self._process is None:
            return
        process, self._process = self._process, None
        signal_group(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also on a second Ctrl-C; the leader may have gone without its workers.
            signal_group(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def process_id(self) -> int:
        """Of the group's leader; only while it is started."""
        assert self._process is not None
        return self._process.pid

    def is_healthy(self) -> bool:
        try:
            with _direct.open(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def check_running(self) -> None:
        """Raise ServerFailed with the end of the log if the process has ended."""
        assert self._process is not None
        status = self._process.poll()
        if status is not None:
            raise ServerFailed(f"{self.label} ended with status {status}\n{self.log_tail()}")

    def counters(self) -> SpecDecodeCounters:
        """Read the counters from /metrics; zero where the server does not speculate."""
        totals: dict[str, float] = {}
        for sample in self.samples():
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return SpecDecodeCounters(
            *(
                totals.get(f"vllm:spec_decode_num_{name}_total", 0.0)
                for name in ("drafts", "draft_tokens", "accepted_tokens")
            )
        )

    def samples(self) -> "list[Sample]":
        """Everything that /metrics shows now."""
        from prometheus_client.parser import text_string_to_metric_families

        with _direct.open(f"{self.url}/metrics", timeout=10) as response:
            text = response.read().decode()
        return [sample for f in text_string_to_metric_families(text) for sample in f.samples]

    def post(self, path: str, body: dict[str, Any], timeout: float) -> Any:
        """The JSON answer to a JSON request; urllib's and http.client's errors pass through."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with _direct.open(request, timeout=timeout) as response:
            return json.load(response)

    def log_tail(self) -> str:
        return last_lines(self.log_file)

    def _last_log_line(self, width: int) -> str:
        from rich.markup import escape

        lines = self.log_tail().splitlines()
        return escape(lines[-1][: max(width, 0)]) if lines else ""


def last_lines(log_file: Path) -> str:
    """The end of a log, LOG_TAIL_LINES lines."""
    text = log_file.read_text(encoding="utf-8", errors="replace")
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])


def signal_group(group: int, number: signal.Signals) -> None:
    """Signals every process of a group; nothing happens where none is left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return
