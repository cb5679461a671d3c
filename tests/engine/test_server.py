# SPDX-License-Identifier: Apache-2.0
"""A real `vllm serve` process with our config, and the real `openai` client."""

import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from rich.console import Console

from heterospec_vllm.demo.model_cache import (
    check_head,
    default_cache_dir,
    prepare_target,
    shipped_head,
)
from heterospec_vllm.demo.server import VllmServer, free_port

pytestmark = pytest.mark.engine

QUESTIONS = (
    "Why is the sky blue?",
    "Write a haiku about rivers.",
    "List three uses of salt.",
    "What is 17 times 3?",
)
PLAIN = {"vllm_xargs": {"heterospec": "off"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    folder: Path = tmp_path_factory.mktemp("server")
    console = Console(stderr=True)
    target = prepare_target(default_cache_dir(), console)
    config = folder / "heterospec.json"
    config.write_text(
        json.dumps(
            {
                "method": "heterospec",
                "model": str(check_head(shipped_head())),
                "policy": "static",  # its trees do not depend on how busy the machine is
                "num_speculative_tokens": 8,
                "max_depth": 4,
                "top_k": 4,
            }
        )
    )
    server = VllmServer(
        "test",
        target,
        log_file=folder / "server.log",
        port=free_port(),
        max_model_len=1024,
        speculative_config=str(config),
    )
    # float32: a near-tie in bfloat16 would part the answers of two batch sizes.
    server.arguments += ["--enforce-eager", "--dtype", "float32", "--max-num-seqs", "8"]
    with server:
        server.start(console)
        yield server


@pytest.fixture
def client(server: VllmServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)


def _ask(client: openai.OpenAI, server: VllmServer, question: str, **arguments: Any):
    return client.chat.completions.create(
        model=server.target,
        messages=[{"role": "user", "content": question}],
        **{"max_tokens": 60, "temperature": 0.0, **arguments},
    )


def _text(client, server, question: str, **arguments: Any) -> str:
    return _ask(client, server, question, **arguments).choices[0].message.content


def _streamed(client, server, question: str, **arguments: Any) -> str:
    stream = _ask(client, server, question, stream=True, **arguments)
    return "".join(part.choices[0].delta.content or "" for part in stream if part.choices)


def _kv_usage(server: VllmServer) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:kv_cache_usage_perc{"))


def test_streamed_answers_are_plain_decodings_and_trees_were_accepted(client, server) -> None:
    before = server.counters()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda q: _streamed(client, server, q), QUESTIONS))
    after = server.counters()
    assert after.num_drafts > before.num_drafts
    assert after.acceptance_length(before) > 1.2
    assert after.num_draft_tokens - before.num_draft_tokens > 4 * (
        after.num_drafts - before.num_drafts
    )
    plain = [_text(client, server, q, extra_body=PLAIN) for q in QUESTIONS]
    assert server.counters() == after  # switched off: nothing was drafted
    assert answers == plain


def test_metrics_are_served(client, server) -> None:
    before = _metric(server, "heterospec_accepted_nodes_total")
    assert _text(client, server, QUESTIONS[0])
    assert _metric(server, "heterospec_accepted_nodes_total") > before
    assert _metric(server, "heterospec_steps_total") > 0
    assert _metric(server, 'heterospec_step_seconds_total{part="draft"}') > 0


def _metric(server: VllmServer, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(x.split()[-1] for x in lines if x.startswith(name)))


def test_seeded_sampling_and_logprobs(client, server) -> None:
    arguments = {"temperature": 0.8, "seed": 11, "logprobs": True, "top_logprobs": 2}
    ours = _ask(client, server, QUESTIONS[0], **arguments).choices[0]
    plain = _ask(client, server, QUESTIONS[0], **arguments, extra_body=PLAIN).choices[0]
    assert ours.message.content == plain.message.content
    assert len(ours.logprobs.content) == len(plain.logprobs.content)
    for a, b in zip(ours.logprobs.content, plain.logprobs.content, strict=True):
        assert a.token == b.token and abs(a.logprob - b.logprob) < 1e-3


def test_structured_output_beside_trees(client, server) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "integer"}},
        "required": ["answer"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    with ThreadPoolExecutor(2) as pool:
        structured = pool.submit(_text, client, server, QUESTIONS[3], response_format=form)
        free = pool.submit(_text, client, server, QUESTIONS[0])
        assert isinstance(json.loads(structured.result())["answer"], int)
        assert free.result() == _text(client, server, QUESTIONS[0], extra_body=PLAIN)


def test_a_client_that_leaves_harms_nobody(client, server) -> None:
    alone = _text(client, server, QUESTIONS[1])
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(_text, client, server, QUESTIONS[1])
        stream = _ask(client, server, QUESTIONS[2], stream=True, max_tokens=800)
        for _, _part in zip(range(5), stream, strict=False):
            pass
        stream.close()
        assert other.result() == alone
    deadline = time.monotonic() + 30
    while _kv_usage(server) > 0 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert _kv_usage(server) == 0
    assert _text(client, server, QUESTIONS[1]) == alone


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"extra_body": {"vllm_xargs": {"heterospec_max_node": 3}}}, "heterospec_max_node"),
        ({"extra_body": {"vllm_xargs": {"heterospec": "perhaps"}}}, "heterospec"),
        ({"max_tokens": 5000}, "max_tokens"),
    ],
)
def test_bad_requests_are_refused_alone(client, server, arguments, names: str) -> None:
    with pytest.raises(openai.BadRequestError, match=names):
        _text(client, server, QUESTIONS[0], **arguments)
    assert _text(client, server, QUESTIONS[3])


def test_an_oversized_prompt_is_refused(client, server) -> None:
    with pytest.raises(openai.BadRequestError):
        _text(client, server, "word " * 3000)
    assert _text(client, server, QUESTIONS[3])
