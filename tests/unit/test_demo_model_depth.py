# SPDX-License-Identifier: Apache-2.0
"""`--depth-factor`: a target with more layers, the same answers, and a folder of its own."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from heterospec_vllm.cli.main import app
from heterospec_vllm.demo import model, model_cache

LAYERS = 3
OTHER_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")


def write_plain(
    model_dir: Path, dtype: torch.dtype = torch.bfloat16, *, tied_embeddings: bool = True
) -> None:
    """A random llama with the files of the default model's folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=100,
        tie_word_embeddings=tied_embeddings,
        initializer_range=0.3,
    )
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(model_dir)
    for name in OTHER_FILES:
        (model_dir / name).write_text(f'{{"made_for": "{name}"}}')


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def plain(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished default model of a cache; nothing may fetch or convert it again."""
    monkeypatch.setattr(
        model_cache,
        "write_model",
        lambda _gguf, build_dir, **_progress: write_plain(build_dir),
    )
    model_dir = model_cache.prepare_target(
        tmp_path, console, fetch_gguf=lambda build_dir, _console: build_dir
    )
    monkeypatch.setattr(model_cache, "write_model", forbidden)
    monkeypatch.setattr(model_cache, "download_gguf", forbidden)
    return model_dir


def forbidden(*_args: object, **_options: object) -> None:
    raise AssertionError("a finished model was made again")


def logit_bits(model_dir: Path, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[3, 40, 7, 90, 12, 55], [1, 2, 3, 4, 5, 6]])).logits
    assert logits.dtype == dtype
    return logits.contiguous().view(torch.uint8)


def contents(model_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model_dir.iterdir()}


def visible_entries(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in cache_dir.iterdir() if path.name != ".lock")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth_factor", [2, 16])
@pytest.mark.parametrize("tied_embeddings", [True, False])
def test_logits_are_equal_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, depth_factor: int, tied_embeddings: bool
) -> None:
    plain, deep = tmp_path / "plain", tmp_path / "deep"
    write_plain(plain, dtype, tied_embeddings=tied_embeddings)
    deep.mkdir()
    model.write_deepened_model(plain, deep, depth_factor)
    assert torch.equal(logit_bits(deep, dtype), logit_bits(plain, dtype))


def test_added_layers_are_the_last_one_without_its_outputs(plain: Path, console: Console) -> None:
    deep = model_cache.prepare_target(plain.parent, console, depth_factor=3)
    source = load_file(plain / model.WEIGHTS_FILE)
    found = load_file(deep / model.WEIGHTS_FILE)
    last = f"model.layers.{LAYERS - 1}."
    parts = [name.removeprefix(last) for name in source if name.startswith(last)]
    added = {f"model.layers.{layer}.{part}" for layer in range(3, 9) for part in parts}
    assert found.keys() == source.keys() | added
    for name, weight in source.items():
        assert torch.equal(found[name], weight), name
    for name in added:
        part = name.split(".", 3)[3]
        expected = source[last + part]
        if part in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            expected = torch.zeros_like(expected)
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected), name


def test_only_the_number_of_layers_is_changed_in_the_config(plain: Path, console: Console) -> None:
    deep = model_cache.prepare_target(plain.parent, console, depth_factor=8)
    expected = json.loads((plain / "config.json").read_text()) | {"num_hidden_layers": 8 * LAYERS}
    assert json.loads((deep / "config.json").read_text()) == expected
    for name in OTHER_FILES:
        assert (deep / name).read_bytes() == (plain / name).read_bytes()


def test_every_factor_has_its_folder_and_is_made_once(
    plain: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = model_cache.prepare_target
    before = contents(plain)
    deep = [prepare(plain.parent, console, depth_factor=factor) for factor in (2, 3)]
    made = [contents(folder) for folder in deep]
    assert len({plain, *deep}) == 3
    assert all(model_cache.manifest_mismatch(folder) is None for folder in deep)
    monkeypatch.setattr(model_cache, "write_deepened_model", forbidden)
    assert [prepare(plain.parent, console, depth_factor=factor) for factor in (2, 3)] == deep
    assert [contents(folder) for folder in deep] == made
    assert prepare(plain.parent, console, depth_factor=1) == plain
    assert contents(plain) == before
    assert visible_entries(plain.parent) == sorted(path.name for path in (plain, *deep))


def test_damage_is_found_and_repaired(plain: Path, console: Console) -> None:
    deep = model_cache.prepare_target(plain.parent, console, depth_factor=2)
    whole = contents(deep)
    damaged = bytearray(whole[model.WEIGHTS_FILE])
    damaged[-1] ^= 1
    (deep / model.WEIGHTS_FILE).write_bytes(damaged)
    assert model_cache.prepare_target(plain.parent, console, depth_factor=2) == deep
    assert contents(deep) == whole


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("stage", ["weights", "checksum"])
def test_interrupted_run_leaves_nothing_half_made(
    plain: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: type[BaseException],
) -> None:
    before = contents(plain)

    def half_written(_tensors: object, path: Path, **_options: object) -> None:
        path.write_bytes(b"half")
        raise error("stopped here")

    def unless_plain(digests: Callable[[Path], dict[str, str]], model_dir: Path) -> dict[str, str]:
        if model_dir == plain:
            return digests(model_dir)
        raise error("stopped here")

    with monkeypatch.context() as patch:
        if stage == "weights":
            patch.setattr(model, "save_file", half_written)
        else:
            digests = model_cache._file_digests
            patch.setattr(
                model_cache, "_file_digests", lambda folder: unless_plain(digests, folder)
            )
        with pytest.raises(error, match="stopped here"):
            model_cache.prepare_target(plain.parent, console, depth_factor=2)
    assert visible_entries(plain.parent) == [plain.name]
    assert contents(plain) == before
    deep = model_cache.prepare_target(plain.parent, console, depth_factor=2)
    assert model_cache.manifest_mismatch(deep) is None


@pytest.mark.parametrize("depth_factor", [-1, 0, 17])
def test_out_of_range_is_refused_before_anything_is_made(tmp_path: Path, depth_factor: int) -> None:
    cache_dir = tmp_path / "cache"
    arguments = ["demo-model", "--cache-dir", str(cache_dir), "--depth-factor", str(depth_factor)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"error: --depth-factor: found {depth_factor}, allowed: 1 to 16" in result.stderr
    assert not cache_dir.exists()


@pytest.mark.parametrize("depth_factor", [1, 2, 16])
def test_last_output_line_names_the_target_and_the_same_head(
    plain: Path, depth_factor: int
) -> None:
    arguments = ["demo-model", "--cache-dir", str(plain.parent), "--depth-factor"]
    result = CliRunner().invoke(app, [*arguments, str(depth_factor)])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed["head"] == str(model_cache.shipped_head())
    config = json.loads((Path(printed["target"]) / "config.json").read_text())
    assert config["num_hidden_layers"] == depth_factor * LAYERS
    assert (printed["target"] == str(plain)) == (depth_factor == 1)
