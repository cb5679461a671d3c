# SPDX-License-Identifier: Apache-2.0
"""Several API servers before one engine: each shows the plugin's metrics."""

import json
import urllib.request
from pathlib import Path

import openai
import pytest
from rich.console import Console

from heterospec_vllm.demo.model_cache import default_cache_dir, prepare_target
from heterospec_vllm.demo.server import VllmServer, free_port

pytestmark = [pytest.mark.engine, pytest.mark.full]

CONFIG = {
    "method": "heterospec",
    "model": "builtin:smollm2-135m",
    "policy": "static",
    "num_speculative_tokens": 6,
    "max_depth": 3,
    "top_k": 3,
}


def test_every_api_server_shows_our_metrics(tmp_path: Path) -> None:
    console = Console(stderr=True)
    target = prepare_target(default_cache_dir(), console)
    server = VllmServer(
        "two API servers",
        target,
        log_file=tmp_path / "server.log",
        port=free_port(),
        max_model_len=512,
        speculative_config=json.dumps(CONFIG),
    )
    server.arguments += ["--enforce-eager", "--max-num-seqs", "4", "--api-server-count", "2"]
    with server:
        server.start(console)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)
        message = {"role": "user", "content": "Why is the sky blue?"}
        answer = client.chat.completions.create(
            model=server.target, messages=[message], max_tokens=24, temperature=0.0
        )
        assert answer.choices[0].message.content
        # A connection each: the kernel spreads them over the servers.
        pages = [_metrics(server) for _ in range(8)]
    for page in pages:
        assert page["heterospec_steps_total"] > 0
        assert page["heterospec_accepted_nodes_total"] > 0
        assert page["heterospec_max_verified_depth"] > 1
    assert len({tuple(page.items()) for page in pages}) == 1


def _metrics(server: VllmServer) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    ours = [line.rsplit(" ", 1) for line in lines if line.startswith("heterospec_")]
    return {name: float(value) for name, value in ours if not name.endswith("_created")}
