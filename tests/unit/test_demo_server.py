# SPDX-License-Identifier: Apache-2.0
"""The demo's server process: it is waited for, its failure is shown, and all of it ends.

A small HTTP server with a child process stands in for vLLM, whose start takes a minute.
"""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from heterospec_vllm.cli import demo
from heterospec_vllm.demo import server as demo_server
from heterospec_vllm.demo.server import ServerFailed, SpecDecodeCounters, VllmServer, free_port

FAKE_SERVER = '''
import os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
port, target = int(sys.argv[sys.argv.index("--port") + 1]), sys.argv[2]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
if target == "fails":
    print("ValueError: num_speculative_tokens: found 0, allowed: 1..63", flush=True)
    sys.exit(3)
if target == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if target == "hangs":
    time.sleep(600)
METRICS = """
# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total{engine="0"} 10.0
vllm:spec_decode_num_drafts_total{engine="1"} 10.0
# TYPE vllm:spec_decode_num_draft_tokens counter
vllm:spec_decode_num_draft_tokens_total{engine="0"} 60.0
# TYPE vllm:spec_decode_num_accepted_tokens counter
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 25.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 20.0
"""
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(METRICS.encode() if self.path == "/metrics" else b"")
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
'''


@pytest.fixture
def make_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], VllmServer]:
    script = tmp_path / "fake_server.py"
    script.write_text(FAKE_SERVER)
    monkeypatch.setattr(VllmServer, "launcher", (sys.executable, str(script)))

    def make(target: str) -> VllmServer:
        return VllmServer(
            "fake",
            target,
            log_file=tmp_path / "server.log",
            port=free_port(),
            max_model_len=64,
            speculative_config=None,
        )

    return make


def quiet() -> Console:
    return Console(file=io.StringIO())


def child_of(log_file: Path) -> int:
    """Process id of the fake server's child, once it has been logged."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        words = log_file.read_text().split() if log_file.exists() else []
        if len(words) >= 2:
            return int(words[1])
        time.sleep(0.05)
    raise AssertionError("the fake server did not start")


def assert_ends(process_id: int) -> None:
    """The process is gone, or a zombie that nobody has collected yet."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{process_id}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {process_id} is still running")


@pytest.mark.parametrize("target", ["model", "stubborn"])
def test_server_answers_and_its_whole_group_ends(
    make_server: Callable[[str], VllmServer], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr(demo_server, "STOP_TIMEOUT", 1.0)
    with make_server(target) as server:
        server.start(quiet())
        assert server.is_healthy()
        child = child_of(server.log_file)
        os.kill(child, 0)
    assert not server.is_healthy()
    assert_ends(child)
    server.stop()


def test_counters_sum_engines_and_give_the_acceptance_length(
    make_server: Callable[[str], VllmServer],
) -> None:
    with make_server("model") as server:
        server.start(quiet())
        assert server.counters() == SpecDecodeCounters(20.0, 60.0, 25.0)
    start = SpecDecodeCounters(10.0, 30.0, 5.0)
    assert SpecDecodeCounters(20.0, 60.0, 25.0).acceptance_length(start) == 3.0
    assert start.acceptance_length(start) == 1.0


@pytest.mark.parametrize(("supported", "dtype"), [(True, None), (False, "float32")])
def test_float32_where_the_processor_has_no_bfloat16_products(
    monkeypatch: pytest.MonkeyPatch, supported: bool, dtype: str | None
) -> None:
    monkeypatch.setattr(demo_server, "multiplies_16_bits", lambda: supported)
    console = quiet()
    assert demo._faster_dtype(console) == dtype
    assert ("float32" in console.file.getvalue()) == (dtype is not None)  # type: ignore[attr-defined]


def test_the_dtype_reaches_the_server(tmp_path: Path) -> None:
    given = {"log_file": tmp_path / "log", "port": 1, "max_model_len": 8}
    with_dtype = VllmServer("a", "model", speculative_config=None, dtype="float32", **given)
    assert with_dtype.arguments[-2:] == ["--dtype", "float32"]
    assert "--dtype" not in VllmServer("a", "model", speculative_config=None, **given).arguments


def test_failure_shows_the_log_and_leaves_no_process(
    make_server: Callable[[str], VllmServer],
) -> None:
    with (
        pytest.raises(ServerFailed, match=r"(?s)status 3.*num_speculative_tokens: found 0"),
        make_server("fails") as server,
    ):
        server.start(quiet())
    assert_ends(child_of(server.log_file))


def test_a_server_that_never_answers_is_given_up(
    make_server: Callable[[str], VllmServer],
) -> None:
    with pytest.raises(ServerFailed, match="no answer after 1 s"), make_server("hangs") as server:
        server.start(quiet(), timeout=1.0)
    assert_ends(child_of(server.log_file))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_ends_its_server(
    make_server: Callable[[str], VllmServer], tmp_path: Path, number: signal.Signals
) -> None:
    make_server("hangs")  # writes the script
    code = (
        "import sys\n"
        "from heterospec_vllm.cli.main import app\n"
        "from heterospec_vllm.demo.server import VllmServer\n"
        f"VllmServer.launcher = (sys.executable, {str(tmp_path / 'fake_server.py')!r})\n"
        "app(['demo', '--target', 'hangs', '--speculative-config', '{}'])"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    demo = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A shell's background job, CI's perhaps, hands down SIGINT as ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not (logs := list(tmp_path.glob("heterospec-demo-*/heterospec.log"))):
            assert demo.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        child = child_of(logs[0])
        demo.send_signal(number)
        assert demo.wait(timeout=30) != 0
        assert_ends(child)
        assert not logs[0].parent.exists()
    finally:
        demo.kill()
        demo.wait()
