# SPDX-License-Identifier: Apache-2.0
"""Changes to a head's folder, and what an engine says of it."""

import json
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import CONFIG_MAPPING

from heterospec_vllm.config import METHOD, HeteroSpecConfig
from heterospec_vllm.plugin import wraps
from heterospec_vllm.plugin.checks import EngineFacts, TargetFacts

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from tiny_folders import HEAD, head_tensors, write_head

__all__ = ["HEAD", "head_tensors", "write_head"]
# Loaded now, so that no test's time has it.
assert CONFIG_MAPPING["llama"]

VOCAB, DRAFT, HIDDEN = 512, 256, 128
FACTS = EngineFacts(
    TargetFacts("LlamaForCausalLM", HIDDEN, VOCAB, num_hidden_layers=8, head_size=64)
)


def reason(folder: Path, top_k: int = 8, max_model_len: int = 256) -> str | None:
    """Why an engine would refuse a head; every refusal has the same form and comes at once."""
    start = time.process_time()
    ours = HeteroSpecConfig(method=METHOD, model=str(folder), top_k=top_k)
    found = wraps._head_reason(ours, FACTS, max_model_len, "auto")
    assert time.process_time() - start < 1
    if found is not None:
        assert found.startswith("speculative_config.") and found.isprintable(), found
        assert ": found " in found and ", allowed: " in found, found
        assert str(folder) in found and len(found) < 1000, found
    return found


def assert_refused(folder: Path, *parts: str) -> None:
    found = reason(folder)
    assert found is not None
    missing = [part for part in parts if part not in found]
    assert not missing, f"{missing} not in: {found}"


def with_weights(head: Path, **changes: Any) -> Path:
    """Other weights; one set to None is left out. A dot in a name is written as two underscores."""
    file = head / "model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = np.asarray(value)
    save_file(tensors, file)
    return head


def with_config(head: Path, **changes: Any) -> Path:
    (head / "config.json").write_text(json.dumps({**HEAD, **changes}))
    return head


def rewrite_header(head: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites the header of the weights."""
    file = head / "model.safetensors"
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def torch_head(head: Path, content: Any, **how: Any) -> Path:
    (head / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, head / "pytorch_model.bin", **how)
    return head


def torch_tensors() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in head_tensors(DRAFT).items()}


SPECULATORS = {
    "architectures": ["Eagle3Speculator"],
    "speculators_model_type": "eagle3",
    "speculators_config": {"algorithm": "eagle3"},
    "draft_vocab_size": DRAFT,
    "target_hidden_size": None,
    "transformer_layer_config": {k: v for k, v in HEAD.items() if k != "draft_vocab_size"},
}
