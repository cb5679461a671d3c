# SPDX-License-Identifier: Apache-2.0
"""What a user hands the trainer: prompt and answer files and the target's folder.

What cannot be used is refused in one sentence, before anything that takes long. Nothing here needs
torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heterospec_vllm import input_files
from heterospec_vllm.prompts import text_of

_PROMPT = "a JSON object with `prompt`, a text, or `turns`, a list of texts"
_ANSWER = "a JSON object with `p` and `o`, lists of token ids, and `t`, the temperature"
_FOLDER = "a Hugging Face folder of a Llama-shaped target with config.json and *.safetensors"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
)
_MAX_SHOWN = 80  # bytes of a refused line


class InputError(ValueError):
    """One sentence about what was given; ``option`` is the command's option that gave it."""

    def __init__(self, option: str, sentence: str) -> None:
        super().__init__(sentence)
        self.option = option


def check_kv_heads(target: dict[str, Any], kv_heads: int | None) -> None:
    """A head repeats the KV heads of the target's last layer and shares them among its own heads."""
    heads = target["num_attention_heads"]
    given = target.get("num_key_value_heads", heads)
    allowed = [n for n in range(given, heads + 1, given) if heads % n == 0]
    if kv_heads is not None and kv_heads not in allowed:
        raise InputError(
            "--kv-heads",
            f"found {kv_heads}, allowed with this target: {', '.join(map(str, allowed))}",
        )


def prompt_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a prompt file; each has an ``id``, which two prompts may not share."""
    seen: set[str] = set()
    for number, line in _lines(path, "--prompts", _PROMPT):
        try:
            text_of(line)
        except ValueError as error:
            raise InputError("--prompts", f"{path}, line {number}: {error}") from None
        if line["id"] in seen:
            raise InputError(
                "--prompts",
                f"{path}, line {number}: found the id {line['id']!r} a second time, "
                "allowed: an `id` of its own for every prompt, or none",
            )
        seen.add(line["id"])
        yield line


def answer_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a file of answers: ``id``, ``p``, ``o`` and ``t``."""
    for number, line in _lines(path, "--answers", _ANSWER):
        p, o, t = (line.get(name) for name in "pot")
        if not (p and _are_tokens(p) and _are_tokens(o) and type(t) in (int, float)):
            found = json.dumps(line)[:_MAX_SHOWN]
            raise InputError(
                "--answers", f"{path}, line {number}: found {found!r}, allowed: {_ANSWER}"
            )
        yield line


def check_files(prompts: list[Path] | None, answers: Path | None) -> None:
    """Reads them all once, so that a faulty line is known before the first engine starts."""
    for path in prompts or []:
        for _ in prompt_lines(path):
            pass
    if answers is not None:
        for _ in answer_lines(answers):
            pass


def _lines(path: Path, option: str, allowed: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of every line; the last one needs no newline, a line without ``id`` gets one."""
    number = 0
    # In bytes, because text mode would refuse another encoding without naming the line.
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = input_files.parse(raw)
            except ValueError:  # no JSON or no UTF-8
                line = None
            if not isinstance(line, dict):
                found = raw.strip()[:_MAX_SHOWN].decode(errors="replace")
                raise InputError(
                    option, f"{path}, line {number}: found {found!r}, allowed: {allowed}"
                )
            if line.get("id") in (None, ""):
                line["id"] = f"line {number} of {path.name}"
            line["id"] = str(line["id"])
            yield number, line
    if not number:
        raise InputError(option, f"{path}: found no line, allowed: lines that each are {allowed}")


def _are_tokens(ids: Any) -> bool:
    return isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)


def require_config(folder: Path, option: str) -> Path:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(option, f"found no {path}, allowed: a Hugging Face folder, which has one")
    return path


def target_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a target whose folder has what the trainer reads."""
    path = require_config(folder, "--target")
    try:
        config = input_files.parse(path.read_bytes())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise InputError("--target", f"{path}: found no JSON object, allowed: {_FOLDER}")
    for name in _FIELDS:
        if name not in config:
            raise InputError("--target", f"{path}: found no `{name}`, allowed: {_FOLDER}")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise InputError("--target", f"{folder}: found no {_WEIGHTS[0]}, allowed: {_FOLDER}")
    return config
