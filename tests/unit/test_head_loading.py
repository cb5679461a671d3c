# SPDX-License-Identifier: Apache-2.0
"""Where a head's files come from, and what is kept from vLLM's classes when they load one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("vllm")

from head_folders import DRAFT, FACTS, VOCAB, write_head
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM

from heterospec_vllm.config import METHOD, HeteroSpecConfig
from heterospec_vllm.plugin import compat, head_loading
from heterospec_vllm.plugin.head import folder_of
from heterospec_vllm.runners.shared import SpeculatingRunner


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_head(tmp_path / "head")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that reached vLLM's function."""
    names: list[str] = []
    monkeypatch.setattr(
        Eagle3LlamaForCausalLM, "load_weights", lambda self, weights: names.extend(dict(weights))
    )
    monkeypatch.setattr(compat, "target_facts", lambda config: FACTS.target)
    return names


def _load(folder: Path, quant_config: object = None, **changes: Any) -> None:
    model = SimpleNamespace(model=SimpleNamespace(quant_config=quant_config))
    weights = {**load_file(folder / "model.safetensors"), **changes}
    with head_loading.loading_head(str(folder), None):  # type: ignore[arg-type]
        Eagle3LlamaForCausalLM.load_weights(model, iter(weights.items()))


def test_copies_of_the_targets_weights_are_left_out(folder: Path, loaded: list[str]) -> None:
    copies = {
        "verifier_lm_head.weight": torch.zeros(VOCAB, 128),
        "verifier_norm.weight": torch.zeros(128),
    }
    _load(folder, **copies)
    assert sorted(loaded) == sorted(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"unknown.weight": torch.zeros(1)}, "the weight 'unknown.weight' in"),
        ({"d2t": torch.arange(DRAFT) + 10**12}, "found 1000000000000 for token 0"),
        ({"fc.weight": torch.zeros(3, 3)}, "'fc.weight' of 3 x 3"),
    ],
)
def test_a_head_from_the_hub_is_checked_before_it_is_loaded(
    folder: Path, loaded: list[str], changes: dict[str, Any], part: str
) -> None:
    with pytest.raises(ValueError, match="heterospec: speculative_config.model: found") as refused:
        _load(folder, **changes)
    assert part in str(refused.value) and str(folder) in str(refused.value)
    assert not loaded
    other = dict(changes)
    if "fc.weight" in other:
        _load(folder, quant_config=object(), **other)
        assert loaded


def test_other_engines_load_as_ever(folder: Path, loaded: list[str]) -> None:
    Eagle3LlamaForCausalLM.load_weights(None, [("verifier_x", 1)])
    assert loaded == ["verifier_x"]


def test_where_a_heads_files_lie(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert folder_of(str(folder)) == folder
    assert folder_of("some/head") is None and folder_of("no\nid") is None
    snapshot = cache / "models--some--head" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    (cache / "models--some--head" / "refs").mkdir()
    (cache / "models--some--head" / "refs" / "main").write_text("0123")
    snapshot.mkdir()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    assert folder_of("some/head") is None  # its weights are not here yet
    (snapshot / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert folder_of("some/head") == snapshot


def test_a_policy_cannot_ask_for_more_children_than_the_head_has_tokens() -> None:
    runner = SpeculatingRunner()
    runner._config = HeteroSpecConfig(method=METHOD, model="head")
    runner._drafter = SimpleNamespace(most_children=8)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="heterospec: top_k: found 16, allowed: at most 8"):
        runner.set_policy("static", top_k=16)
