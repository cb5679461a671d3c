# SPDX-License-Identifier: Apache-2.0
"""Training from answers alone: the target's hidden states are computed when a batch needs them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import options
from typer.testing import CliRunner

from heterospec_vllm.cli.main import app
from heterospec_vllm.training import recipe
from heterospec_vllm.training.data import Corpus, Sequence, answered_sequences
from heterospec_vllm.training.live import LiveFeatures

LAYERS, HIDDEN, VOCAB = 3, 32, 64


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("live") / "target"
    LlamaForCausalLM(config).save_pretrained(folder)
    found = json.loads((folder / "config.json").read_text())
    # What the demo model's config.json says in so many words, and transformers 5 nests.
    found["rope_theta"] = found.get("rope_theta") or found["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    file = tmp_path / "answers.jsonl"
    with file.open("w") as out:
        for n in range(30):
            ids = [3 + (n + i) % 20 for i in range(12 + n % 5)]
            line = {"id": f"s{n}", "p": ids[:4], "o": ids[4:], "t": 0.0}
            out.write(json.dumps(line) + "\n")
    return file


def test_live_features_are_the_residual_stream(target: Path) -> None:
    from transformers import AutoModelForCausalLM

    group = [
        Sequence("a", [3, 4, 5, 6, 7, 8], first=1, rows=6, greedy=True),
        Sequence("b", [9, 8, 7, 6], first=0, rows=3, greedy=True),
    ]
    layers = [0, 2, LAYERS]
    live = LiveFeatures(target, layers, torch.device("cpu"), torch.float32)
    found = live.of(group)
    assert found.shape == (2, 6, 3, HIDDEN) and found.dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    for n, sequence in enumerate(group):
        ids = torch.tensor([sequence.ids[: sequence.rows]])
        with torch.no_grad():
            plain = model(ids, output_hidden_states=True)
            # transformers hands out the last state behind the final norm, a head reads it before.
            last = model.model.norm(found[n, : sequence.rows, 2].float())
        for column, layer in enumerate(layers[:2]):
            expected = plain.hidden_states[layer][0].bfloat16()
            assert torch.equal(found[n, : sequence.rows, column], expected)
        torch.testing.assert_close(last, plain.hidden_states[-1][0], rtol=2e-2, atol=2e-2)


def test_it_trains_from_answers_alone(tmp_path, target, answers) -> None:
    losses: list[float] = []
    recipe.train(
        target,
        recipe.TrainingInputs([], [answers], 64, torch.device("cpu"), live=True),
        tmp_path / "work",
        tmp_path / "head",
        options(epochs=6),
        taps=(0, 1, LAYERS),
        draft_vocab_size=24,
        kv_heads=None,
        resume=False,
        report=lambda trainer, fraction, hits, loss: losses.append(loss),
        on_held_out=lambda result: None,
    )
    assert sum(losses[-3:]) < sum(losses[:3])
    assert load_file(tmp_path / "head" / "model.safetensors")["lm_head.weight"].shape[0] == 24


def test_a_cut_answer_and_one_without_a_query(answers: Path) -> None:
    with answers.open("a") as out:
        out.write(json.dumps({"id": "short", "p": [3, 4, 5], "o": [6], "t": 0.0}) + "\n")
    sequences = {s.id: s for s in answered_sequences([answers], max_tokens=8)}
    assert all(len(s.ids) == s.rows == 8 for s in sequences.values() if s.id != "short")
    assert (sequences["short"].first, sequences["short"].rows) == (2, 4)
    assert "short" not in {s.id for s in answered_sequences([answers], max_tokens=3)}


def test_all_answers_to_a_prompt_are_held_out_together() -> None:
    names = [f"s{n}" for n in range(50)]
    sequences = [
        Sequence(name + more, [3, 4, 5], first=0, rows=3, greedy=not more)
        for name in names
        for more in ("", "#s")
    ]
    corpus = Corpus(sequences, LiveFeatures.__new__(LiveFeatures), held_out=4)
    held = {s.id for s in corpus.held_out}
    assert held and held == {i + "#s" if "#" not in i else i.partition("#")[0] for i in held}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "allowed: auto, cpu, cuda"),
        (["--features", "kept"], "allowed: auto, stored, live"),
        (["--features", "live", "--collect-minutes", "0"], "holds no answers"),
    ],
)
def test_bad_options_are_named(tmp_path, target, arguments, message) -> None:
    given = ["train-head", "--target", str(target), "--work", str(tmp_path / "none"), *arguments]
    result = CliRunner().invoke(app, given, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output
