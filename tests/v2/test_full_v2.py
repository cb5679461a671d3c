# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 with the embedded model and its head, and under memory pressure; long under the interpreter."""

from pathlib import Path
from typing import Any

import pytest
from harness import assert_speculated, divergences, run_engine
from test_identity_v2 import BACKEND, DRIVER, GREEDY, TREE, _engine, _prompts, make_pair

pytestmark = [pytest.mark.engine, pytest.mark.full]

QUESTIONS = [
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nCount from one to ten.<|im_end|>\n<|im_start|>assistant\n",
]


def _both(engine: dict[str, Any], head: str, runs: list[dict[str, Any]], folder: Path):
    speculative = {"method": "heterospec", "model": head, "policy": "static", **TREE}
    plain = run_engine({"engine": engine, "runs": runs}, folder / "plain", 7200, DRIVER)
    ours = run_engine(
        {"engine": {**engine, "speculative_config": speculative}, "runs": runs},
        folder / "ours",
        7200,
        DRIVER,
    )
    return plain, ours


def test_embedded_model_and_head(tmp_path: Path) -> None:
    from rich.console import Console

    from heterospec_vllm.demo.model_cache import default_cache_dir, prepare_target, shipped_head

    engine = {
        "model": str(prepare_target(default_cache_dir(), Console())),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
        **BACKEND,
    }
    runs = [{"name": "answers", "prompts": QUESTIONS, "sampling": {**GREEDY, "max_tokens": 16}}]
    plain, ours = _both(engine, str(shipped_head()), runs, tmp_path)
    assert divergences(plain["answers"], ours["answers"]) == []
    assert "Paris" in ours["answers"]["answers"][0][0]["text"]
    assert_speculated(ours["answers"]["counters"], min_depth=1)


def test_preemption(tmp_path: Path) -> None:
    target, head = make_pair(tmp_path)
    engine = _engine(
        target, max_model_len=96, enable_prefix_caching=False, num_gpu_blocks_override=13
    )
    runs = [
        {
            "name": "pressure",
            "prompts": _prompts([30, 33, 28, 31]),
            "sampling": {**GREEDY, "max_tokens": 40},
        }
    ]
    plain, ours = _both(engine, str(head), runs, tmp_path)
    assert divergences(plain["pressure"], ours["pressure"]) == []
    assert ours["pressure"]["preemptions"] > 0
    assert_speculated(ours["pressure"]["counters"], min_depth=2)


def test_backend_without_trees_drafts_chains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERPRETED_BACKEND", "PlainBackend")
    target, head = make_pair(tmp_path)
    engine = _engine(target, enable_prefix_caching=False)
    runs = [{"name": "chains", "prompts": _prompts([9, 14]), "sampling": GREEDY}]
    plain, ours = _both(engine, str(head), runs, tmp_path)
    assert divergences(plain["chains"], ours["chains"]) == []
    counters = ours["chains"]["counters"]
    assert counters["accepted_nodes"] > 0 and counters["max_verified_depth"] > 1
    assert counters["accepted_non_first_child"] == 0
    log = (tmp_path / "ours" / "log.txt").read_text()
    assert "heterospec drafts chains only, no trees: found attention backend CPU_ATTN" in log
