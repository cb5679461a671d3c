# SPDX-License-Identifier: Apache-2.0
"""What `vllm bench serve` is asked to do in a cell, and what its results mean."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from heterospec_vllm.bench import rows
from heterospec_vllm.demo.server import server_environment

PERCENTILES = (50, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")
FLAGS = (
    "--ignore-eos",
    "--skip-chat-template",  # the server applies it
    "--disable-shuffle",
    "--no-oversample",
    "--disable-tqdm",
    "--save-result",
    "--save-detailed",  # says what failed requests died of, and how long each one waited
)
# Limits in seconds after which a client is taken to hang; generous, for a large model on few cores.
CLIENT_START = 300.0  # it imports vLLM and reads the tokenizer
SLOWEST_PREFILL = 60.0  # of the requests that are served together
SLOWEST_TOKEN = 1.0


def client_arguments(
    cell: rows.Cell,
    dataset: Path,
    result: Path,
    limit: int | None,
    goodput: dict[str, float] | None,
    seed: int,
) -> list[str]:
    """All arguments but the server's; `limit` is the most requests that the client sends at once."""
    values: dict[str, Any] = {
        "backend": "openai-chat",
        "endpoint": "/v1/chat/completions",
        "dataset-name": "custom",
        "dataset-path": dataset,
        "num-prompts": cell.num_prompts,
        "output-len": cell.output_len,
        "temperature": cell.temperature,
        "max-concurrency": limit,
        "request-rate": cell.request_rate,
        "seed": seed,  # of the arrivals
        "extra-body": json.dumps({"seed": seed}) if cell.temperature > 0 else None,
        "percentile-metrics": ",".join(LATENCIES),
        "metric-percentiles": ",".join(map(str, PERCENTILES)),
        "result-dir": result.parent,
        "result-filename": result.name,
    }
    listed = [
        text
        for name, value in values.items()
        if value is not None
        for text in (f"--{name}", str(value))
    ]
    if goodput:
        listed += ["--goodput", *(f"{name}:{most:g}" for name, most in goodput.items())]
    return [*listed, *FLAGS]


def client_timeout(cell: rows.Cell) -> float:
    """Seconds after which a client of this cell is taken to hang."""
    arrivals = 0.0 if cell.request_rate is None else cell.num_prompts / cell.request_rate
    waves = math.ceil(cell.num_prompts / cell.concurrency)
    wave = SLOWEST_PREFILL + SLOWEST_TOKEN * cell.output_len
    return CLIENT_START + arrivals + waves * wave


def client_environment() -> dict[str, str]:
    """The server's, but no proxy may see the requests."""
    environment = server_environment()
    return {name: text for name, text in environment.items() if not name.lower().endswith("_proxy")}


def write_dataset(path: Path, prompts: list[str], count: int) -> None:
    """One request a line; the prompts go round."""
    lines = [json.dumps({"prompt": prompts[n % len(prompts)]}) + "\n" for n in range(count)]
    path.write_text("".join(lines))


def serving_of(
    found: dict[str, Any], cell: rows.Cell, goodput: dict[str, float] | None
) -> rows.Serving:
    """The record of a result of `vllm bench serve`.

    In an open loop latencies count from the arrival: vLLM's leave out how long the client held a request back.
    """
    if cell.request_rate is not None:
        found = _from_arrival(found, goodput)
    percentiles = {
        f"{name}_p{p}": found[f"p{p}_{name}_ms"] for name in LATENCIES for p in PERCENTILES
    }
    return rows.Serving(
        request_throughput=found["request_throughput"],
        goodput=found["request_goodput"] if goodput else None,
        completed=found["completed"],
        failed=found["failed"],
        **percentiles,
    )


def _from_arrival(found: dict[str, Any], goodput: dict[str, float] | None) -> dict[str, Any]:
    """The result with the requests' waits added to what the user has to wait for."""
    import numpy as np

    waits, ttfts, latencies, lengths = (
        np.array(found[name]) for name in ("queue_times", "ttfts", "latencies", "output_lens")
    )
    milliseconds = {
        "ttft": 1000 * (ttfts + waits),
        "tpot": 1000 * (latencies - ttfts) / np.maximum(lengths - 1, 1) * (lengths > 1),
        "e2el": 1000 * (latencies + waits),
    }
    changed = {
        f"p{p}_{name}_ms": float(np.percentile(milliseconds[name], p))
        for name in ("ttft", "e2el")
        for p in PERCENTILES
    }
    if goodput:
        good = np.all([milliseconds[name] <= limit for name, limit in goodput.items()], axis=0)
        changed["request_goodput"] = float(good.sum() / found["duration"])
    return {**found, **changed}
