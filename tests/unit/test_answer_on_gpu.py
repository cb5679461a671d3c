# SPDX-License-Identifier: Apache-2.0
"""The answer writer's engine against transformers, on the CPU with a tiny random Llama."""

import importlib.util
import random
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOOL = Path(__file__).parents[2] / "tools" / "answer_on_gpu.py"
VOCAB, NEW_TOKENS, STOPS = 97, 40, [3, 5]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("answer_on_gpu", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.3,
        rope_theta=5000.0,
        tie_word_embeddings=False,
        eos_token_id=STOPS,
        bos_token_id=1,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).float().eval()
    folder = tmp_path_factory.mktemp("target")
    model.save_pretrained(folder)
    return folder, model


def answers(engine, requests) -> dict:
    found = {}

    def finish(request, tokens, done):
        assert done and request.key not in found
        found[request.key] = tokens

    far = time.monotonic() + 600
    engine.run(requests, finish, far, far)
    return found


def test_greedy_answers_equal_those_of_transformers(tool, target):
    folder, reference = target
    dice = random.Random(1)
    lengths = [1, 2, 3, 17, 18, 33, 50, 64, 90, 130, 200, 290]
    prompts = [[dice.randrange(6, VOCAB) for _ in range(n)] for n in lengths]
    dice.shuffle(prompts)
    engine = tool.Engine(tool.Model(folder, "cpu", torch.float32), 5, 384, STOPS)
    assert engine.windows == [256, 384]
    requests = [tool.Request(str(i), ids, NEW_TOKENS) for i, ids in enumerate(prompts)]
    found = answers(engine, requests)
    for i, ids in enumerate(prompts):
        wanted = reference.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=STOPS,
        )[0, len(ids) :]
        assert found[str(i)] == wanted.tolist(), i
    ended = sum(tokens[-1] in STOPS for tokens in found.values())
    assert 0 < ended < len(found) and len({tuple(t) for t in found.values()}) > 6


def test_sampled_first_tokens_follow_the_softmax(tool, target):
    folder, reference = target
    torch.manual_seed(2)
    ids, temperature, draws = [7, 20, 41, 9], 1.7, 3000
    engine = tool.Engine(tool.Model(folder, "cpu", torch.float32), 256, 64, STOPS)
    requests = [tool.Request(str(i), ids, 1, temperature) for i in range(draws)]
    found = answers(engine, requests)
    with torch.no_grad():
        wanted = torch.softmax(reference(torch.tensor([ids])).logits[0, -1] / temperature, -1)
    counts = torch.bincount(torch.tensor([found[str(i)][0] for i in range(draws)]), minlength=VOCAB)
    assert len(found) == draws and wanted.max() < 0.9
    noise = (draws * wanted * (1 - wanted)).sqrt()
    assert ((counts - draws * wanted).abs() <= 4.5 * noise + 1.5).all()


def test_pick_mixes_greedy_and_sampled_rows(tool):
    torch.manual_seed(3)
    logits = torch.tensor([0.0, 1.0, 2.0, 0.5]).repeat(40000, 1)
    noisy = torch.zeros(40000)
    noisy[20000:] = 1.0
    cold = torch.full((40000,), 1 / 0.7)
    chosen = tool.pick(logits, cold, noisy)
    assert (chosen[:20000] == 2).all()
    shares = torch.bincount(chosen[20000:], minlength=4) / 20000
    assert torch.allclose(shares, torch.softmax(logits[0] / 0.7, -1), atol=0.015)


def test_time_limits_drop_what_is_left(tool, target):
    folder, _ = target
    engine = tool.Engine(tool.Model(folder, "cpu", torch.float32), 2, 128, [VOCAB - 1])
    requests = [tool.Request(str(i), [7, 8, 9 + i], 100) for i in range(5)]
    seen = []
    now = time.monotonic()
    engine.run(requests, lambda r, t, done: seen.append((r.key, done)), now, now + 60)
    assert seen == []  # nothing is admitted after the end
    soon = time.monotonic() + 0.02
    engine.run(requests, lambda r, t, done: seen.append((r.key, done)), soon, soon)
    assert any(not done for _, done in seen) and len(seen) <= 4
    assert not engine.live.any() and not engine.held
    assert len(answers(engine, requests)) == 5  # and the engine still works
