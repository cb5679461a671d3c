# SPDX-License-Identifier: Apache-2.0
"""`heterospec calibrate`, `simulate`, `explain` and `step-table` on the demo model, each as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ENVIRONMENT
from rich.console import Console

from heterospec_vllm.demo.model_cache import default_cache_dir, prepare_target
from heterospec_vllm.policy.profile import load_profile, misfit_reason, shipped_profile
from heterospec_vllm.replay.trace import Trace

pytestmark = pytest.mark.engine

HEAD = "builtin:smollm2-135m"


def _heterospec(*arguments: str) -> str:
    command = [sys.executable, "-c", "from heterospec_vllm.cli.main import app; app()", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, "COLUMNS": "200"},
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def target() -> str:
    return str(prepare_target(default_cache_dir(), Console(stderr=True)))


@pytest.fixture(scope="module")
def calibrated(target: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    _heterospec(
        "calibrate", "--target", target, "--head", HEAD, "--tokens", "24", "--depth", "2",
        "--top-k", "4", "--timed-batches", "1,4", "--max-model-len", "512", "--enforce-eager",
        "--output", str(folder / "profile.json"), "--trace", str(folder / "trace.npz"),
    )  # fmt: skip
    return folder


def test_the_profile_is_complete_and_for_this_pair(calibrated: Path, target: str) -> None:
    profile = load_profile(calibrated / "profile.json")
    head = str(Path(sys.modules["heterospec_vllm"].__file__ or "").parent / "assets" / "head")
    assert misfit_reason(profile, target, head) is None
    assert misfit_reason(profile, target, target) is not None
    assert profile.num_nodes > 1000
    figures = profile.held_out
    assert figures["log_loss"] < figures["log_loss_constant"]
    assert (calibrated / "profile.png").stat().st_size > 5000


def test_the_trace_follows_the_answers(calibrated: Path) -> None:
    trace = Trace.load(calibrated / "trace.npz")
    first = trace.accepted()[:, 0]
    assert 0.2 < first.mean() < 0.9  # the head's first choice is the target's token that often
    assert set(trace.sampled.tolist()) == {0, 1}


def test_every_policy_is_replayed(calibrated: Path) -> None:
    out = _heterospec(
        "simulate", str(calibrated / "trace.npz"), "--profile", str(calibrated / "profile.json"),
        "--batches", "1,8", "--depth", "2", "--json",
    )  # fmt: skip
    for rows in json.loads(out).values():
        assert rows["plain"]["ratio_to_plain"] == 1.0
        assert rows["marginal"]["nodes_a_step"] >= 0
        assert all(0 < row["share_of_oracle"] <= 1.02 for row in rows.values()), rows
    assert json.loads(out)["1"]["static 4 nodes, depth 2, top 4"]["tokens_a_step"] > 1.2


def test_explain_draws_accepted_and_rejected_nodes(target: str, tmp_path: Path) -> None:
    out = _heterospec(
        "explain", "Why is the sky blue?", "--target", target, "--head", HEAD,
        "--policy", "static", "--nodes", "6", "--depth", "2", "--top-k", "4",
        "--tokens", "12", "--warm-up", "0", "--enforce-eager", "--svg", str(tmp_path / "steps.svg"),
    )  # fmt: skip
    assert "step 1:" in out and "stratum" in out and "nodes verified" in out
    assert "<svg" in (tmp_path / "steps.svg").read_text()


def test_the_shipped_profile_fits_the_shipped_pair(target: str) -> None:
    head = str(Path(sys.modules["heterospec_vllm"].__file__ or "").parent / "assets" / "head")
    assert shipped_profile(target, head) is not None


def test_a_steps_parts_are_within_the_step(target: str) -> None:
    out = _heterospec(
        "step-table", "--target", target, "--head", HEAD, "--tokens", "12", "--enforce-eager",
        "--max-model-len", "512", "--json",
    )  # fmt: skip
    result = json.loads(out)
    spans, whole = result["spans_ms_per_step"], result["ms_per_step"]
    for inner, outer in [
        ("target forward", "execute_model"),
        ("tree attention", "target forward"),
        ("sampling", "walk"),
        ("walk", "sample_tokens"),
        ("draft: levels", "draft"),
        ("policy", "draft"),
        ("draft", "take_draft_token_ids"),
    ]:
        assert 0 < spans[inner] < spans[outer] < whole, (inner, outer, spans)
    assert 0 < result["bookkeeping_ms_per_step"] < whole
    assert result["bookkeeping_ms_per_step"] > spans["learn"] + spans["policy"]
