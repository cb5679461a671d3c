# SPDX-License-Identifier: Apache-2.0
"""Weights loaded into a running engine: its answers are those of an engine that was started with them."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_speculated, divergences, run_engine
from safetensors.torch import load_file, save_file
from tiny_model import make_head, make_target

pytestmark = pytest.mark.engine

VOCAB = 32
RNG = random.Random(5)
PROMPTS = [[RNG.randrange(2, VOCAB) for _ in range(RNG.randint(1, 60))] for _ in range(8)]
GREEDY = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
SEEDED = [
    {"temperature": 1.0, "seed": 7 + i, "max_tokens": 40, "ignore_eos": True} for i in range(8)
]
TREE = {"num_speculative_tokens": 12, "max_depth": 4, "top_k": 4}
KINDS = ("untied", "tied")


def _run(name: str, reload: dict[str, Any] | None = None) -> dict[str, Any]:
    sampling = [SEEDED[i] if i % 3 == 2 else GREEDY for i in range(len(PROMPTS))]
    run: dict[str, Any] = {"name": name, "prompts": PROMPTS, "sampling": sampling}
    return run if reload is None else {**run, "reload": reload}


def _tie(folder: Path) -> None:
    """The output weight is the embedding, which no checkpoint holds twice."""
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    # Signs keep the last token from being the likeliest next one.
    norm = weights["model.norm.weight"]
    weights["model.norm.weight"] = norm * (torch.arange(len(norm)) % 3 - 0.9)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _other(folder: Path) -> Path:
    """A target of the same shapes that answers otherwise: its rows are in another order."""
    target = make_target(folder, VOCAB)
    weights = load_file(target / "model.safetensors")
    torch.manual_seed(3)
    mixed = {n: w if "norm" in n else w[torch.randperm(len(w))] for n, w in weights.items()}
    save_file(mixed, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        first, second = make_target(folder / "first", VOCAB), _other(folder / "second")
        head = make_head(folder / "head", first)
        wide = make_target(folder / "wide", VOCAB + 16)
        if kind == "tied":
            for target in (first, second, wide):
                _tie(target)
        cut = make_target(folder / "cut", VOCAB)
        file = cut / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        paths = {"first": first, "second": second, "head": head, "wide": wide, "cut": cut}
        found[kind] = {name: str(path) for name, path in paths.items()}
    return found


def _engine(model: str, head: str | None = None, **arguments: Any) -> dict[str, Any]:
    engine: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 16,
        **arguments,
    }
    if head is not None:
        engine["speculative_config"] = {
            "method": "heterospec",
            "model": head,
            "policy": "static",
            **TREE,
        }
    return engine


@pytest.fixture(scope="module")
def plain(models, tmp_path_factory) -> dict[tuple[str, str], dict[str, Any]]:
    """What engines answer that were started with either checkpoint."""
    folder = tmp_path_factory.mktemp("plain")
    return {
        (kind, name): run_engine(
            {"engine": _engine(models[kind][name]), "runs": [_run("answers")]},
            folder / f"{kind}-{name}",
        )["answers"]
        for kind in KINDS
        for name in ("first", "second")
    }


def _runs(paths: dict[str, str]) -> list[dict[str, Any]]:
    first, second = paths["first"], paths["second"]
    return [
        _run("as started"),
        _run("first, the same", {"way": "path"}),
        _run("first, twice", {"way": "path"}),
        _run("second by its path", {"way": "path", "folder": second}),
        _run("second once more", {"way": "path"}),
        _run("first by an iterator", {"way": "iterator", "folder": first}),
        _run("second by an iterator", {"way": "iterator", "folder": second}),
        _run("second, no folder", {"way": "path", "folder": first + "-nowhere"}),
        _run("second, cut", {"way": "path", "folder": paths["cut"]}),
        _run("second, wide", {"way": "path", "folder": paths["wide"]}),
        _run("second, kernel format", {"way": "kernel format", "folder": first}),
        {**_run("second by vLLM's head"), "fused_head": False},
        _run("first by its path", {"way": "path", "folder": first}),
    ]


DRAFTED_TWICE = ("second by its path", "second by vLLM's head")
REFUSED = {
    "second, no folder": ["weights_path: found no folder at", "-nowhere", "allowed: one"],
    "second, cut": ["weights_path: found", "bytes in", "model.safetensors", "allowed:"],
    "second, wide": [".weight' of 48 x 128", "wide/model.safetensors", "allowed: 32 x 128"],
    "second, kernel format": ["weights_iterator: found", "is_checkpoint_format=False"],
}


@pytest.mark.parametrize(("kind", "packed"), [("untied", True), ("tied", True), ("tied", False)])
def test_answers_are_those_of_the_weights(kind, packed, models, plain, tmp_path) -> None:
    paths = models[kind]
    engine = _engine(paths["first"], paths["head"])
    engine["speculative_config"]["packed_linears"] = packed
    runs = _runs(paths)
    answers = run_engine({"engine": engine, "runs": runs}, tmp_path)
    assert divergences(plain[kind, "first"], plain[kind, "second"])
    for run in runs:
        name = run["name"]
        expected = plain[kind, "second" if name.startswith("second") else "first"]
        assert divergences(expected, answers[name]) == [], name
        message = answers[name]["reload_error"]
        assert (message is not None) == (name in REFUSED), message
        for part in REFUSED.get(name, ()):
            assert part in message and "\n" not in message
    if kind == "untied":
        for name in ("as started", "first, twice", "first by its path"):
            assert_speculated(answers[name]["counters"], min_depth=2)
        # The head outputs by the target's lm_head: with stale copies fewer of its drafts are accepted.
        ours, theirs = (answers[n]["counters"]["accepted_nodes"] for n in DRAFTED_TWICE)
        assert ours > 0 and abs(ours - theirs) <= 0.1 * theirs


def test_a_compiled_engine_and_layerwise_loading(models, plain, tmp_path) -> None:
    """The graph reads the weights where they lie, so they must stay there."""
    paths = models["untied"]
    runs = [
        _run("first"),
        _run("second", {"way": "layerwise", "folder": paths["second"]}),
        _run("first again", {"way": "path", "folder": paths["first"]}),
        _run("second again", {"way": "path", "folder": paths["second"]}),
    ]
    job = {"engine": _engine(paths["first"], paths["head"], enforce_eager=False), "runs": runs}
    for name, answers in run_engine(job, tmp_path).items():
        assert divergences(plain["untied", name.split()[0]], answers) == [], name
