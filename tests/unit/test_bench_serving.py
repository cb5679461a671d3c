# SPDX-License-Identifier: Apache-2.0
"""The benchmark's servers and its client: what is asked, read, refused, and that nothing is left running.

Two small scripts stand in for `vllm serve` and `vllm bench serve`; the engine test runs the real ones.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_serving import CLIENT, SERVER
from prometheus_client.samples import Sample
from rich.console import Console

from heterospec_vllm.bench import serving
from heterospec_vllm.bench.rows import Cell
from heterospec_vllm.bench.serving import ServedRun, ServedSystem, counters_of
from heterospec_vllm.bench.serving_client import client_timeout, serving_of, write_dataset
from heterospec_vllm.demo.server import ServerFailed, VllmServer, free_port

LIMITS = {"ttft": 500.0, "tpot": 40.5}


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the two scripts, which stand in for vLLM's from here on."""
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "client.py").write_text(CLIENT)
    monkeypatch.setattr(VllmServer, "launcher", (sys.executable, str(tmp_path / "server.py")))
    monkeypatch.setattr(ServedSystem, "client", (sys.executable, str(tmp_path / "client.py")))
    monkeypatch.setattr(serving, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(serving, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("FAKE_CLIENT", "works")
    return tmp_path


def system_of(scripts: Path, target: str = "plain", **values: Any) -> ServedSystem:
    known = {"max_model_len": 64, "max_num_seqs": 4, "speculative_config": None}
    return ServedSystem(f"a {target}", target, folder=scripts / "out", **{**known, **values})


def cell_of(**values: Any) -> Cell:
    known = {"mode": "serving", "target": "t", "prompt_set": "p", "concurrency": 2}
    known |= {"temperature": 0.0, "output_len": 8, "num_prompts": 5}
    return Cell(**{**known, **values})


def quiet() -> Console:
    return Console(file=io.StringIO())


def run_once(
    scripts: Path, target: str = "plain", goodput: dict[str, float] | None = None, **values: Any
) -> ServedRun:
    system = system_of(scripts, target)
    system.start(quiet())
    try:
        return system.run(cell_of(**values), ["one", "two", "three"], goodput=goodput)
    finally:
        system.close()


def result_of(scripts: Path) -> dict[str, Any]:
    (path,) = (scripts / "out").glob("*.json")
    return json.loads(path.read_text())


def assert_ends(process_id: int) -> None:
    """The process is gone, or a zombie that nobody has collected yet."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{process_id}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {process_id} is still running")


def number_after(word: str, log: Path) -> int:
    """The process id that a script has logged after this word."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        words = log.read_text().split() if log.exists() else []
        if word in words[:-1]:
            return int(words[words.index(word) + 1])
        time.sleep(0.05)
    raise AssertionError(f"{log}: no {word}")


def test_a_closed_loop_is_asked_for_and_read(scripts: Path) -> None:
    run = run_once(scripts, goodput=LIMITS)
    assert (run.seconds, run.num_tokens, run.counters) == (2.0, 40, None)
    assert run.serving.model_dump() == {
        **{"request_throughput": 2.5, "goodput": 1.25, "completed": 5, "failed": 0},
        **{"ttft_p50": 10.0, "ttft_p99": 11.0, "tpot_p50": 20.0, "tpot_p99": 22.0},
        **{"itl_p50": 30.0, "itl_p99": 33.0, "e2el_p50": 40.0, "e2el_p99": 44.0},
    }
    asked = result_of(scripts)["arguments"]
    assert asked["backend"] == ["openai-chat"]
    assert asked["endpoint"] == ["/v1/chat/completions"]
    assert asked["max-concurrency"] == ["2"] and "request-rate" not in asked
    assert asked["temperature"] == ["0.0"] and "extra-body" not in asked
    assert asked["percentile-metrics"] == ["ttft,tpot,itl,e2el"]
    assert asked["metric-percentiles"] == ["50,99"]
    assert asked["goodput"] == ["ttft:500", "tpot:40.5"]
    assert {"ignore-eos", "disable-shuffle", "disable-tqdm", "skip-chat-template"} <= set(asked)


def test_prompts_go_round_in_their_order(scripts: Path) -> None:
    run_once(scripts)
    assert result_of(scripts)["prompts"] == ["one", "two", "three", "one", "two"]


def test_a_line_of_the_dataset_is_a_request_whatever_it_holds(tmp_path: Path) -> None:
    prompts = ["two\nlines", "a\u2028separator", "{}"]
    write_dataset(tmp_path / "prompts.jsonl", prompts, 3)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == prompts


def test_without_limits_there_is_no_goodput(scripts: Path) -> None:
    assert run_once(scripts).serving.goodput is None
    assert "goodput" not in result_of(scripts)["arguments"]


def test_sampling_has_a_seed(scripts: Path) -> None:
    run_once(scripts, temperature=0.8)
    asked = result_of(scripts)["arguments"]
    assert asked["temperature"] == ["0.8"]
    assert json.loads(asked["extra-body"][0]) == {"seed": 0} and asked["seed"] == ["0"]


@pytest.mark.parametrize(("concurrency", "limit"), [(4, None), (2, ["2"])])
def test_an_open_loop_waits_in_the_server_unless_the_cell_is_narrower(
    scripts: Path, concurrency: int, limit: list[str] | None
) -> None:
    run_once(scripts, request_rate=2.5, concurrency=concurrency)
    asked = result_of(scripts)["arguments"]
    assert asked["request-rate"] == ["2.5"]
    assert asked.get("max-concurrency") == limit


def test_open_loop_latencies_count_from_the_arrival() -> None:
    latencies = {f"p{p}_{name}_ms": 1.0 for p in (50, 99) for name in ("tpot", "itl")}
    found = {"duration": 2.0, "completed": 2, "failed": 0, "request_throughput": 1.0}
    found |= {"queue_times": [0.0, 0.5], "ttfts": [0.1, 0.1], "latencies": [0.4, 0.4]}
    found |= {"output_lens": [4, 4], **latencies}
    read = serving_of(found, cell_of(request_rate=2.0), {"ttft": 300.0})
    assert read.ttft_p50 == pytest.approx(350) and read.e2el_p50 == pytest.approx(650)
    assert read.ttft_p99 == pytest.approx(595) and read.tpot_p50 == 1.0
    assert read.goodput == 0.5  # the request that was held back came too late
    assert serving_of(found, cell_of(request_rate=2.0), {"tpot": 101.0}).goodput == 1.0
    assert serving_of(found, cell_of(request_rate=2.0), {"tpot": 99.0}).goodput == 0.0
    assert serving_of(found, cell_of(request_rate=2.0), {"e2el": 899.0}).goodput == 0.5


def test_no_proxy_sees_the_requests(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    run_once(scripts)
    assert result_of(scripts)["proxies"] == []


def test_servers_differ_in_the_speculative_config_only(scripts: Path) -> None:
    systems = [
        system_of(scripts, speculative_config=config, port=free_port())
        for config in (None, {"method": "ngram", "num_speculative_tokens": 4})
    ]
    asked = []
    for system in systems:
        system.start(quiet())
        asked.append([a for a in system.server.arguments if a != str(system.server.port)])
        system.close()
    plain, other = asked
    at = other.index("--speculative-config")
    assert json.loads(other[at + 1]) == {"method": "ngram", "num_speculative_tokens": 4}
    assert other[:at] + other[at + 2 :] == plain
    assert plain[plain.index("--max-num-seqs") + 1] == "4"
    assert {"--no-enable-prefix-caching", "--generation-config"} <= set(plain)


def test_further_arguments_reach_the_server(scripts: Path) -> None:
    system = system_of(scripts, arguments=("--dtype", "float32"))
    system.start(quiet())
    assert system.server.arguments[-2:] == ["--dtype", "float32"]
    system.close()


def test_every_run_waits_and_keeps_its_results(
    scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "PAUSE_SECONDS", 0.4)
    system = system_of(scripts)
    system.start(quiet())
    started = time.monotonic()
    for _ in range(2):
        system.run(cell_of(), ["one"], goodput=None)
    assert time.monotonic() - started > 0.8
    system.close()
    names = sorted(path.name for path in (scripts / "out").glob("*"))
    assert names == [
        *("a-plain-001.json", "a-plain-001.log", "a-plain-002.json", "a-plain-002.log"),
        "a-plain-server.log",
    ]


def test_counters_are_what_the_run_added(scripts: Path) -> None:
    # The fake server counts a step a request, from 100 on; a gauge is no counter.
    assert run_once(scripts, "ours").counters == {
        **{"steps": 5.0, "drafted_trees": 5.0},
        "seconds": {"draft": 2.5, "target": 5.0},
    }


def test_counters_of_vllms_drafters_are_summed_over_engines(scripts: Path) -> None:
    expected = {"num_drafts": 10.0, "num_draft_tokens": 5.0, "num_accepted_tokens": 2.5}
    assert run_once(scripts, "drafter").counters == expected


def test_a_counter_that_this_version_does_not_know_keeps_its_name() -> None:
    samples = [Sample("heterospec_new_thing_total", {}, 3.0), Sample("python_gc_total", {}, 1.0)]
    assert counters_of(samples) == {"new_thing": 3.0}
    assert counters_of(samples[1:]) is None


def test_greedy_answers_are_token_ids_in_order(scripts: Path) -> None:
    system = system_of(scripts)
    system.start(quiet())
    assert system.greedy_answers(["a", "bbb", "cc"] * 4, 2) == [[1, 1], [3, 3], [2, 2]] * 4
    assert system._ask("/", lambda: _most_at_once(system)) == 4
    system.close()


def _most_at_once(system: ServedSystem) -> int:
    with socket.create_connection(("127.0.0.1", system.server.port)) as connection:
        connection.sendall(b"GET /most HTTP/1.0\r\n\r\n")
        return int(connection.makefile().read().split()[-1])


def test_teacher_forcing_gives_the_choices_at_the_answer(scripts: Path) -> None:
    system = system_of(scripts)
    system.start(quiet())
    (positions,) = system.teacher_forced([[1, 2, 3]], [[4, 5]])
    assert [p.top for p in positions] == [{5: -0.5, 9: -1.5}] * 2
    system.close()


def test_memory_counts_the_children(scripts: Path) -> None:
    psutil = pytest.importorskip("psutil")
    system = system_of(scripts)
    system.start(quiet())
    leader = psutil.Process(system.server.process_id).memory_full_info().uss
    assert system.memory() > leader
    system.close()


def test_a_refused_request_says_why(scripts: Path) -> None:
    system = system_of(scripts)
    system.start(quiet())
    with pytest.raises(ServerFailed, match=r"status 400.*maximum context length"):
        system.greedy_answers(["fine", "too long"], 2)
    assert system.greedy_answers(["fine"], 1) == [[4]]
    system.close()


def test_a_port_in_use_is_named(scripts: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerFailed, match=rf"port {port} .*in use"):
            system_of(scripts, port=port).start(quiet())


def test_a_server_that_does_not_start_shows_its_log_and_leaves_nothing(scripts: Path) -> None:
    system = system_of(scripts, "dies")
    with pytest.raises(ServerFailed, match=r"(?s)status 3.*no such model"):
        system.start(quiet())
    assert_ends(number_after("child", scripts / "out" / "a-dies-server.log"))
    system.close()


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("refuses", r"(?s)client ended with status 1.*Invalid metric name"),
        ("requests fail", r"2 of 5 requests failed: ServerDisconnectedError"),
        ("short", r"cut short: found 39 tokens, not 40"),
        ("other version", r"found no 'p99_itl_ms'"),
        ("server dies", r"(?s)a plain ended with status 7.*EngineDeadError: out of memory"),
    ],
)
def test_a_run_that_fails_says_why(
    scripts: Path, monkeypatch: pytest.MonkeyPatch, mode: str, reason: str
) -> None:
    monkeypatch.setenv("FAKE_CLIENT", mode)
    with pytest.raises(ServerFailed, match=reason):
        run_once(scripts)
    assert_ends(number_after("child", scripts / "out" / "a-plain-server.log"))


def test_a_server_that_died_is_noticed_and_starts_anew(scripts: Path) -> None:
    system = system_of(scripts, port=free_port())
    system.start(quiet())
    os.kill(system.server.process_id, signal.SIGKILL)
    with pytest.raises(ServerFailed, match=r"ended with status -9"):
        system.greedy_answers(["a"], 1)
    with pytest.raises(ServerFailed, match=r"ended with status -9"):
        system.run(cell_of(), ["a"], goodput=None)
    system.start(quiet())
    assert system.greedy_answers(["a"], 1) == [[1]]
    system.close()
    system.close()


def test_a_client_that_hangs_is_killed(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CLIENT", "hangs")
    monkeypatch.setattr(serving, "client_timeout", lambda cell: 1.0)
    with pytest.raises(ServerFailed, match=r"did not end within 1 s"):
        run_once(scripts)
    assert_ends(number_after("client", scripts / "out" / "a-plain-001.log"))


def test_the_timeout_grows_with_the_cell() -> None:
    small = client_timeout(cell_of())
    assert client_timeout(cell_of(num_prompts=50)) > small
    assert client_timeout(cell_of(output_len=80)) > small
    assert client_timeout(cell_of(concurrency=1)) > small
    assert client_timeout(cell_of(request_rate=0.01)) == small + 500


def test_an_interrupted_run_leaves_no_process(scripts: Path) -> None:
    log = scripts / "out" / "a-plain-001.log"
    code = f"""
import sys
from pathlib import Path
from rich.console import Console
from heterospec_vllm.bench.rows import Cell
from heterospec_vllm.bench.serving import ServedSystem
from heterospec_vllm.demo.server import VllmServer
VllmServer.launcher = (sys.executable, {str(scripts / "server.py")!r})
ServedSystem.client = (sys.executable, {str(scripts / "client.py")!r})
system = ServedSystem("a plain", "plain", folder=Path({str(scripts / "out")!r}), max_model_len=64,
                      max_num_seqs=4, speculative_config=None)
try:
    system.start(Console())
    system.run(Cell.model_validate_json({cell_of().model_dump_json()!r}), ["a"], goodput=None)
finally:
    system.close()
"""
    bench = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "FAKE_CLIENT": "hangs"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A shell's background job, CI's perhaps, hands down SIGINT as ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        client = number_after("client", log)
        bench.send_signal(signal.SIGINT)
        assert bench.wait(timeout=30) != 0
    finally:
        bench.kill()
        bench.wait()
    assert_ends(client)
    assert_ends(number_after("child", scripts / "out" / "a-plain-server.log"))
