# SPDX-License-Identifier: Apache-2.0
"""Heads in the forms that exports have: they load, draft, and the answers stay plain vLLM's."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import divergences, run_engine
from safetensors.torch import load_file, save_file
from tiny_model import make_head, make_target

pytestmark = pytest.mark.engine

VOCAB = 32
RNG = random.Random(2)
PROMPTS = [[RNG.randrange(2, VOCAB) for _ in range(RNG.randint(1, 40))] for _ in range(6)]
RUN: dict[str, Any] = {
    "name": "answers",
    "prompts": PROMPTS,
    "sampling": {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"), VOCAB)


def _job(target: Path, head: Path | None, **options: Any) -> dict[str, Any]:
    engine: dict[str, Any] = {
        "model": str(target),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 16,
    }
    if head is not None:
        engine["speculative_config"] = {
            "method": "heterospec",
            "model": str(head),
            "policy": "static",
            "num_speculative_tokens": 12,
            "max_depth": 4,
            **options,
        }
    return {"engine": engine, "runs": [RUN]}


@pytest.fixture(scope="module")
def plain(target, tmp_path_factory) -> dict[str, Any]:
    return run_engine(_job(target, None), tmp_path_factory.mktemp("plain"))["answers"]


def _read(head: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A head's config and weights, with a draft vocabulary that leaves out some tokens."""
    config = json.loads((head / "config.json").read_text())
    return config, load_file(head / "model.safetensors")


def _with_draft_tokens(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"][tokens].contiguous()
    weights["d2t"] = tokens - torch.arange(len(tokens))
    weights["t2d"] = torch.isin(torch.arange(VOCAB), tokens)


def _of_speculators(head: Path, target: Path) -> Path:
    """As the speculators library exports one with the verifier's copies, in two files with an index."""
    config, weights = _read(head)
    _with_draft_tokens(weights, torch.arange(0, VOCAB, 2))
    verifier = load_file(target / "model.safetensors")
    weights["verifier_lm_head.weight"] = verifier["lm_head.weight"]
    weights["verifier_norm.weight"] = verifier["model.norm.weight"]
    weights = {name.replace("midlayer.", "layers.0."): w for name, w in weights.items()}
    (head / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for file, kept in (("1.safetensors", names[::2]), ("2.safetensors", names[1::2])):
        save_file({name: weights[name] for name in kept}, head / file)
        index.update(dict.fromkeys(kept, file))
    (head / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    taps = config.pop("eagle_config")
    outside = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": str(target)},
        },
        "norm_before_residual": False,
        "draft_vocab_size": VOCAB // 2,
        "target_hidden_size": None,
        **taps,
    }
    decoder = {k: v for k, v in config.items() if k not in ("architectures", "draft_vocab_size")}
    (head / "config.json").write_text(json.dumps({**outside, "transformer_layer_config": decoder}))
    return head


def _of_torch(head: Path, target: Path) -> Path:
    """Written by torch, with a draft vocabulary of no more tokens than a node's children."""
    config, weights = _read(head)
    _with_draft_tokens(weights, torch.tensor([4, 8, 14, 20, 22, 26]))
    (head / "model.safetensors").unlink()
    weights["d2t"] = weights["d2t"].int()
    torch.save(weights, head / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (head / "config.json").write_text(json.dumps({**config, "draft_vocab_size": 6}))
    return head


@pytest.mark.parametrize(("export", "top_k"), [(_of_speculators, 8), (_of_torch, 6)])
def test_forms(target, plain, tmp_path, export, top_k) -> None:
    head = export(make_head(tmp_path / "head", target), target)
    answers = run_engine(_job(target, head, top_k=top_k), tmp_path / "ours")["answers"]
    assert divergences(plain, answers) == []
    counters = answers["counters"]
    assert counters["accepted_nodes"] > 0 and counters["fallbacks"] == {}
