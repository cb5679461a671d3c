# SPDX-License-Identifier: Apache-2.0
"""What `heterospec train-head` is given: what it takes, and the sentence that refuses the rest."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from safetensors.torch import save_file
from test_training import options
from typer.testing import CliRunner

from heterospec_vllm.cli.main import app
from heterospec_vllm.training import evaluate, recipe
from heterospec_vllm.training.capture import FeatureStore, Job, make_jobs
from heterospec_vllm.training.checkpoint import STATE
from heterospec_vllm.training.data import Sequence, answered_sequences
from heterospec_vllm.training.init import draft_vocabulary, head_config, special_tokens
from heterospec_vllm.training.inputs import (
    InputError,
    answer_lines,
    check_kv_heads,
    prompt_lines,
    target_config,
)
from heterospec_vllm.training.loop import Trainer
from heterospec_vllm.training.model import Eagle3Head

CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
}
ANSWER = {"id": "a", "p": [5], "o": [6, 7], "t": 0.9}


class BaseTokenizer:
    chat_template = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"unused": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lines.jsonl"


def jobs_of(prompts: Path, answers: Path | None = None) -> list:
    return make_jobs(
        prompts, answers, BaseTokenizer(), seed=0, greedy_share=1.0, max_prompt_tokens=10
    )


def begin_store(folder: Path, target: str) -> None:
    """One answer, of a single token."""
    store = FeatureStore(folder, target, [0, 2], 32)
    store.append(Job("a", [1, 2], None, 0.0), [3], torch.ones(2, 2, 32).bfloat16())
    store.close()


def refused(*arguments: object) -> str:
    """What the command prints where it exits with 2, as one line without the box."""
    result = CliRunner().invoke(app, ["train-head", *map(str, arguments)], env={"COLUMNS": "999"})
    assert result.exit_code == 2, (result.output, result.exception)
    return " ".join(result.output.replace("│", " ").split())


# --- special tokens ---


@pytest.mark.parametrize(
    ("given", "special"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2}, [1, 2]),
        ({"bos_token_id": 1, "eos_token_id": [2, 9, 8]}, [1, 2, 9, 8]),
        ({"bos_token_id": [1, 3], "eos_token_id": 2}, [1, 3, 2]),
        ({"eos_token_id": 2}, [2]),
        ({"bos_token_id": None, "eos_token_id": None}, []),
        ({}, []),
    ],
)
def test_special_tokens_are_a_number_a_list_or_absent(given: dict, special: list[int]) -> None:
    assert special_tokens(given) == special
    chosen = draft_vocabulary(Counter({50: 9, 7: 5}), special, 12, 64)
    assert {50, 7, *special} <= set(chosen.tolist()) and len(chosen) == 12


def test_the_recipe_takes_a_list_of_eos_and_no_bos(tmp_path, target, monkeypatch) -> None:
    (target / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": [2, 60, 61]}))
    seen = []

    class Enough(Exception):
        pass

    def choose(work, corpus, answers, special, size, vocab) -> None:
        seen.append(special)
        raise Enough

    monkeypatch.setattr(recipe, "choose_vocabulary", choose)
    one = Sequence("a", [3, 4, 5], first=0, rows=3, greedy=True)
    corpus = recipe.Corpus([one], None, held_out=10**9)  # type: ignore[arg-type]
    monkeypatch.setattr(recipe.TrainingInputs, "corpus", lambda *_: corpus)
    with pytest.raises(Enough):
        recipe.train(
            target, recipe.TrainingInputs([], [], 8, torch.device("cpu"), True), tmp_path / "work",
            tmp_path / "head", recipe.TrainOptions(*[1] * 11), taps=(0, 1), draft_vocab_size=16,
            kv_heads=None, resume=True, report=print, on_held_out=print,
        )  # fmt: skip
    assert seen == [[2, 60, 61]]


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),  # transformers 5
        ({}, 1e4),  # Llama's default
    ],
)
def test_rope_theta_stands_in_one_of_two_places(rope: dict, theta: float) -> None:
    config = {name: value for name, value in CONFIG.items() if name != "rope_theta"}
    assert head_config({**config, **rope}, (0, 1), 16).rope_theta == theta


# --- prompts and answers ---


def test_a_prompt_without_id_is_named_by_its_line(file: Path) -> None:
    file.write_text(
        '{"prompt": "a"}\n{"id": 3, "prompt": "b"}\n{"id": "x", "prompt": "c"}\n{"turns": ["d"]}\n'
    )
    names = {job.prompt[0]: job.id for job in jobs_of(file)}
    assert names == {
        ord("a"): "line 1 of lines.jsonl",
        ord("b"): "3",
        ord("c"): "x",
        ord("d"): "line 4 of lines.jsonl",
    }
    assert {job.id for job in jobs_of(file)} == set(names.values())  # so a next run resumes


def test_the_last_line_of_the_users_files_needs_no_newline(tmp_path: Path, file: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    file.write_text('{"id": "a", "prompt": "a"}\n{"id": "b", "prompt": "b"}')
    answers.write_text(json.dumps(ANSWER) + "\n" + json.dumps({**ANSWER, "id": "c"}))
    assert {job.id for job in jobs_of(file, answers)} == {"a", "b", "c"}
    assert [s.id for s in answered_sequences([answers], max_tokens=8)] == ["a", "c"]


def test_the_torn_last_line_of_a_store_is_left_out(tmp_path: Path, file: Path) -> None:
    file.write_text(json.dumps(ANSWER))
    store = tmp_path / "store"
    store.mkdir()
    (store / "sequences.jsonl").write_text(json.dumps({**ANSWER, "id": "kept"}) + '\n{"id": "to')
    found = answered_sequences([file], [store], max_tokens=8)
    assert [s.id for s in found] == ["a", "kept"]


@pytest.mark.parametrize(
    "line", ["no json", '{"prompt": "torn', '{"id": "q", "question": "?"}', "[1]", ""]
)
def test_a_faulty_prompt_line_is_named(file: Path, line: str) -> None:
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(InputError, match=re.escape(f"{file}, line 2: found ") + ".*`prompt`") as e:
        list(prompt_lines(file))
    assert e.value.option == "--prompts" and "\n" not in str(e.value)


def test_two_prompts_of_one_id_are_refused(file: Path) -> None:
    file.write_text('{"id": "a", "prompt": "a"}\n{"id": "a", "prompt": "b"}\n')
    with pytest.raises(InputError, match=r"line 2: found the id 'a' a second time, allowed: "):
        list(prompt_lines(file))


@pytest.mark.parametrize(
    "change", [{"p": "text"}, {"p": []}, {"o": [1.5]}, {"o": None}, {"t": None}, {"t": True}]
)
def test_a_faulty_answer_is_named(file: Path, change: dict) -> None:
    file.write_text(json.dumps(ANSWER) + "\n" + json.dumps({**ANSWER, **change}) + "\n")
    with pytest.raises(InputError, match="line 2: found .*`p`.*`o`.*`t`") as e:
        list(answer_lines(file))
    assert e.value.option == "--answers"


def test_an_empty_file_is_refused(file: Path) -> None:
    file.touch()
    for lines in (prompt_lines, answer_lines):
        with pytest.raises(InputError, match="found no line, allowed: "):
            list(lines(file))


# --- the command ---


@pytest.mark.parametrize("option", ["--prompts", "--answers"])
def test_the_command_names_a_line_that_is_no_json(target, file, option) -> None:
    file.write_text('{"id": "a", "prompt": "a", "p": [1], "o": [2], "t": 0}\n{"id": "b", torn\n')
    said = refused("--target", target, option, file, "--device", "cpu", "--features", "live")
    assert f"Invalid value for {option}" in said and f"{file}, line 2: found '{{" in said


@pytest.mark.parametrize("more", [[], ["--evaluate", "."]])
def test_the_command_names_a_target_without_config(tmp_path, file, more) -> None:
    file.write_text('{"prompt": "a"}\n')
    folder = tmp_path / "empty"
    folder.mkdir()
    said = refused("--target", folder, "--prompts", file, *more)
    assert f"Invalid value for --target: found no {folder / 'config.json'}, allowed: " in said


@pytest.mark.parametrize("field", sorted(CONFIG.keys() - {"rope_theta"}))
def test_a_target_of_another_shape_is_named(target: Path, field: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != field}
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"config.json: found no `{field}`, allowed: ") as e:
        target_config(target)
    assert e.value.option == "--target"


def test_a_target_without_safetensors_is_named(target: Path) -> None:
    (target / "model.safetensors").unlink()
    with pytest.raises(InputError, match="found no model.safetensors, allowed: "):
        target_config(target)
    (target / "config.json").write_text("{")
    with pytest.raises(InputError, match="found no JSON object, allowed: "):
        target_config(target)


def test_resuming_without_a_state_is_refused(tmp_path, target, file) -> None:
    file.write_text(json.dumps(ANSWER) + "\n")
    work = tmp_path / "work"
    said = refused(
        "--target", target, "--answers", file, "--work", work, "--resume", "--device", "cpu",
        "--features", "live",
    )  # fmt: skip
    assert f"Invalid value for --resume: found no {work / STATE}, allowed: " in said


@pytest.mark.parametrize("collect", [True, False])
def test_other_taps_than_those_of_the_store_are_refused(tmp_path, target, file, collect) -> None:
    work = tmp_path / "work"
    begin_store(work / "store", str(target))
    file.write_text('{"prompt": "a"}\n')
    more = ["--prompts", file] if collect else ["--collect-minutes", 0]
    said = refused("--target", target, "--work", work, "--taps", "1,2", "--device", "cpu", *more)
    assert "Invalid value for --taps" in said and "meta.json" in said
    assert "found layers [0, 2], allowed: " in said and "[1, 2]" in said


def test_another_target_than_the_stores_is_refused(tmp_path, target, file) -> None:
    work = tmp_path / "work"
    begin_store(work / "store", "another")
    file.write_text('{"prompt": "a"}\n')
    said = refused(
        "--target", target, "--work", work, "--taps", "0", "--device", "cpu", "--prompts", file
    )
    assert "Invalid value for --target" in said and "found target 'another', allowed: " in said


def test_a_folder_named_store_without_meta_is_refused(tmp_path, target) -> None:
    begin_store(tmp_path / "work" / "store2", str(target))
    (tmp_path / "work" / "store2" / "meta.json").unlink()
    given = ("--target", target, "--work", tmp_path / "work", "--device", "cpu")
    said = refused(*given, "--collect-minutes", 0)
    assert "Invalid value for --work: found no " in said and "store2/meta.json, allowed: " in said


def test_an_empty_store_holds_no_answers(tmp_path, target) -> None:
    FeatureStore(tmp_path / "work" / "store", str(target), [0, 2], 32).close()
    said = refused(
        "--target", target, "--work", tmp_path / "work", "--device", "cpu", "--collect-minutes", 0
    )
    assert f"Invalid value for --work: {tmp_path / 'work'} holds no answers, allowed: " in said


def test_answers_that_leave_nothing_to_train_on_are_refused(tmp_path, target) -> None:
    begin_store(tmp_path / "work" / "store", str(target))
    said = refused(
        "--target", target, "--work", tmp_path / "work", "--device", "cpu", "--collect-minutes", 0,
        "--taps", 0, "--max-sequence", 16, "--output", tmp_path / "head",
    )  # fmt: skip
    expected = "Invalid value for --max-sequence: found 16, which leaves no answer to train on"
    assert expected in said


@pytest.mark.parametrize(("kv_heads", "fits"), [(None, True), (2, True), (4, True), (1, False)])
def test_kv_heads_are_a_multiple_of_the_targets(kv_heads: int | None, fits: bool) -> None:
    config = {**CONFIG, "num_key_value_heads": 2}
    if fits:
        check_kv_heads(config, kv_heads)
        return
    with pytest.raises(InputError, match="found 1, allowed with this target: 2, 4") as e:
        check_kv_heads(config, kv_heads)
    assert e.value.option == "--kv-heads"


def test_bad_prompts_to_measure_on_are_refused_first(target, file, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "measure", lambda *_, **__: pytest.fail("too late"))
    file.write_text('{"question": "a"}\n')
    said = refused("--target", target, "--evaluate", target, "--prompts", file)
    assert f"Invalid value for --prompts: {file}, line 1: found " in said


@pytest.mark.parametrize(
    ("changes", "option", "message"),
    [
        ({"kv_heads": 4}, "--resume", "midlayer.self_attn.k_proj.weight of shape"),
        ({"taps": (0, 2)}, "--resume", "fc.weight of shape"),
        ({"matrix_learning_rate": 0.0}, "--matrix-learning-rate", "found 0.0, allowed: more "),
    ],
)
def test_the_state_of_a_run_with_other_options_is_named(
    tmp_path, changes: dict, option: str, message: str
) -> None:
    def trainer(taps=(0, 1, 2), kv_heads=2, matrix_learning_rate=1e-2) -> Trainer:
        config = head_config(CONFIG, taps, 16, num_key_value_heads=kv_heads)
        head = Eagle3Head(config, torch.zeros(64, 32))
        target = SimpleNamespace(embed=head.embed)
        given = options(matrix_learning_rate=matrix_learning_rate)
        return Trainer(head, target, torch.arange(16), given, tmp_path)  # type: ignore[arg-type]

    state = trainer().state()
    trainer().restore(state)
    with pytest.raises(InputError, match=message) as e:
        trainer(**changes).restore(state)
    assert e.value.option == option and str(tmp_path / STATE) in str(e.value)


# --- evaluate ---


def test_a_target_without_chat_template_is_measured(monkeypatch) -> None:
    import vllm

    given: list[list[int]] = []

    class Output:
        outputs = [type("Answer", (), {"token_ids": [1, 2, 3]})]

    class Engine:
        def __init__(self, *_, **__) -> None:
            pass

        def get_tokenizer(self) -> BaseTokenizer:
            return BaseTokenizer()

        def get_metrics(self) -> list:
            return []

        def generate(self, prompts, sampling, use_tqdm) -> list:
            given.extend(prompt["prompt_token_ids"] for prompt in prompts)
            return [Output() for _ in prompts]

    monkeypatch.setattr(vllm, "LLM", Engine)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    sets = [("questions", ["ab", "c" * 5000])]
    (result,) = evaluate.measure("t", "h", sets, num_speculative_tokens=2, max_tokens=8)
    assert given[0] == [ord("a"), ord("b")]
    assert len(given[1]) == evaluate.MAX_MODEL_LEN - 1
    assert (result.name, result.prompts, result.tokens) == ("questions", 2, 6)


# --- help ---


def test_every_option_says_what_it_does() -> None:
    command = typer.main.get_command(app).commands["train-head"]  # type: ignore[attr-defined]
    helps = {option.name: option.help for option in command.params if option.name != "help"}
    assert [name for name, text in helps.items() if not text] == []
    assert "the step before" in helps["step_decay"]
