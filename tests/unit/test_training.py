# SPDX-License-Identifier: Apache-2.0
"""The trainer of the EAGLE-3 head, on a random target small enough to train in seconds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heterospec_vllm.training import checkpoint, recipe
from heterospec_vllm.training.capture import FeatureStore, Job, make_jobs
from heterospec_vllm.training.data import Corpus, StoredFeatures, plan, stored_sequences
from heterospec_vllm.training.init import draft_vocabulary, head_config, load_target
from heterospec_vllm.training.loop import Trainer, TrainOptions
from heterospec_vllm.training.model import Eagle3Head, TrainingBatch
from heterospec_vllm.training.ops import SoftCrossEntropy, rotate

HIDDEN, HEADS, KV_HEADS, DIM, VOCAB, DRAFT = 32, 4, 2, 8, 64, 24
TARGET = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def target_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TARGET))
    q, kv, inner = HEADS * DIM, KV_HEADS * DIM, TARGET["intermediate_size"]
    layer = "model.layers.1."
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        f"{layer}self_attn.q_proj.weight": (q, HIDDEN),
        f"{layer}self_attn.k_proj.weight": (kv, HIDDEN),
        f"{layer}self_attn.v_proj.weight": (kv, HIDDEN),
        f"{layer}self_attn.o_proj.weight": (HIDDEN, q),
        f"{layer}mlp.gate_proj.weight": (inner, HIDDEN),
        f"{layer}mlp.up_proj.weight": (inner, HIDDEN),
        f"{layer}mlp.down_proj.weight": (HIDDEN, inner),
        f"{layer}input_layernorm.weight": (HIDDEN,),
        f"{layer}post_attention_layernorm.weight": (HIDDEN,),
    }
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.3
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def store(tmp_path: Path, target_folder: Path) -> Path:
    """Sequences that count upwards, with features that say where they are."""
    embed = load_file(target_folder / "model.safetensors")["model.embed_tokens.weight"]
    folder = tmp_path / "store"
    writer = FeatureStore(folder, "target", [0, 1, 2], HIDDEN)
    for n in range(40):
        ids = [3 + (n + i) % 20 for i in range(14 + n % 5)]
        nexts = [3 + (i - 2) % 20 for i in ids]
        # After the last layer: the embedding of the next token, so the target counts upwards.
        final = 4 * embed[torch.tensor(nexts)]
        features = torch.stack([embed[torch.tensor(ids)], final * 0.5, final], dim=1)
        writer.append(Job(f"s{n}", ids[:4], None, 0.0), ids[4:], features[:-1].bfloat16())
    writer.close()
    return folder


def corpus_of(folder: Path, held_out: int = 10**9) -> Corpus:
    sequences = stored_sequences([folder], max_tokens=64)
    return Corpus(sequences, StoredFeatures([folder]), held_out=held_out)


def options(**changes: object) -> TrainOptions:
    fields = dict(
        minutes=None,
        epochs=4,
        ttt_steps=3,
        step_decay=0.8,
        keep_rank=DRAFT,
        learning_rate=1e-2,
        matrix_learning_rate=0.0,
        batch_tokens=128,
        average=0.9,
        seed=3,
        checkpoint_minutes=1000.0,
    )
    return TrainOptions(**{**fields, **changes})  # type: ignore[arg-type]


def run(
    target: Path, store: Path, work: Path, *, resume: bool = False, losses: list | None = None, **o
) -> Path:
    seen = [] if losses is None else losses
    recipe.train(
        target,
        recipe.TrainingInputs([store], [], 64, torch.device("cpu"), live=False),
        work,
        work / "head",
        options(**o),
        taps=(0, 1, 2),
        draft_vocab_size=DRAFT,
        kv_heads=None,
        resume=resume,
        report=lambda trainer, fraction, hits, loss: seen.append(loss),
        on_held_out=lambda result: None,
    )
    return work / "head"


def test_loss_falls_and_the_export_reloads(tmp_path, target_folder, store):
    losses: list[float] = []
    folder = run(target_folder, store, tmp_path / "work", losses=losses)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    tensors = load_file(folder / "model.safetensors")
    assert tensors["fc.weight"].shape == (HIDDEN, 3 * HIDDEN)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (HEADS * DIM, 2 * HIDDEN)
    assert tensors["lm_head.weight"].shape == (DRAFT, HIDDEN)
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert "embed_tokens.weight" not in tensors  # vLLM shares the target's
    draft_ids = tensors["d2t"] + torch.arange(DRAFT)
    assert draft_ids.tolist() == tensors["t2d"].nonzero()[:, 0].tolist()
    assert {1, 2} <= set(draft_ids.tolist())  # bos and eos are draft words
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    state = checkpoint.load_state(tmp_path / "work")
    head, ids = checkpoint.load(folder, state["head"]["lm_head.weight"])
    assert torch.equal(ids, draft_ids)
    averaged = state["average"]["midlayer.mlp.up_proj.weight"].bfloat16().float()
    assert torch.equal(head.midlayer.mlp.up_proj.weight, averaged)


@pytest.mark.parametrize("matrix_learning_rate", [0.0, 1e-2])
def test_resuming_gives_the_weights_of_an_unbroken_run(
    tmp_path, target_folder, store, matrix_learning_rate
):
    o = {"matrix_learning_rate": matrix_learning_rate}
    run(target_folder, store, tmp_path / "whole", **o)

    class Stop(Exception):
        pass

    class Cut(list):
        def append(self, loss: float) -> None:
            super().append(loss)
            if len(self) == 7:
                raise Stop

    save = Trainer.train_step

    def train_and_save(self, *args):
        result = save(self, *args)
        self.progress.group += 1
        self.save()
        self.progress.group -= 1
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_and_save)
        with pytest.raises(Stop):
            run(target_folder, store, tmp_path / "broken", losses=Cut(), **o)
    run(target_folder, store, tmp_path / "broken", resume=True, **o)
    whole = checkpoint.load_state(tmp_path / "whole")
    broken = checkpoint.load_state(tmp_path / "broken")
    assert whole["progress"]["step"] == broken["progress"]["step"] > 7
    for name, weights in whole["head"].items():
        assert torch.equal(weights, broken["head"][name]), name
    for name, weights in whole["average"].items():
        assert torch.equal(weights, broken["average"][name]), name


def naive_unroll(head: Eagle3Head, ids: list[int], features: torch.Tensor, i: int, steps: int):
    """Logits [steps, draft_vocab] of a chain drafted at position ``i`` by plain KV-cache decoding.

    features: [tokens, taps * hidden_size]; the true tokens are fed, as in training.
    """
    c, layer = head.config, head.midlayer
    cache: list[tuple[torch.Tensor, torch.Tensor]] = []

    def one(hidden, token, position):
        embed = layer.input_layernorm(head.embed[token])
        wide = torch.cat([embed, layer.hidden_norm(hidden)])
        cos, sin = head.cos[position], head.sin[position]
        attn = layer.self_attn
        q = rotate(attn.q_proj(wide).view(-1, c.head_dim), cos, sin)
        k = rotate(attn.k_proj(wide).view(-1, c.head_dim), cos, sin)
        cache.append((k, attn.v_proj(wide).view(-1, c.head_dim)))
        mixed = []
        for h in range(c.num_attention_heads):
            kv = h * c.num_key_value_heads // c.num_attention_heads
            scores = torch.stack([q[h] @ key[kv] for key, _ in cache]) * c.head_dim**-0.5
            weights = scores.softmax(0)
            mixed.append(sum(w * v[kv] for w, (_, v) in zip(weights, cache, strict=True)))
        hidden = hidden + attn.o_proj(torch.cat(mixed))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    hidden = None
    for position in range(i + 1):
        hidden = one(head.fuse(features[position]), ids[position + 1], position)
    logits = [head.lm_head(head.norm(hidden))]
    for j in range(1, steps):
        hidden = one(hidden, ids[i + 1 + j], i + j)
        logits.append(head.lm_head(head.norm(hidden)))
    return torch.stack(logits)


def random_head(seed: int = 0) -> Eagle3Head:
    torch.manual_seed(seed)
    head = Eagle3Head(head_config(TARGET, (0, 1, 2), DRAFT), torch.randn(VOCAB, HIDDEN))
    for p in head.parameters():
        p.data = torch.randn_like(p) * (0.2 if p.dim() == 2 else 0.1) + (p.dim() == 1)
    return head


def random_batch(head: Eagle3Head) -> TrainingBatch:
    torch.manual_seed(1)
    first, rows, length = [2, 4], [9, 6], 9
    truth = torch.randint(0, DRAFT, (2, length + 1))
    return TrainingBatch(
        ids=torch.randint(0, VOCAB, (2, length + 1)),
        features=torch.randn(2, length, 3 * HIDDEN),
        first=torch.tensor(first),
        rows=torch.tensor(rows),
        log_p=torch.randn(2 * length, DRAFT).log_softmax(-1),
        truth=truth,
    )


def test_training_time_test_equals_chain_decoding():
    head, steps = random_head(), 3
    batch = random_batch(head)
    total, results = head(batch, steps, decay=0.5, keep_rank=DRAFT)
    length = batch.features.shape[1]
    expected, hits, queries = torch.zeros(()), [], 0
    for b in range(2):
        rows = int(batch.rows[b])
        for i in range(int(batch.first[b]), rows - 1):
            queries += 1
            reach = min(steps, rows - 1 - i)
            ids = batch.ids[b].tolist()
            logits = naive_unroll(head, ids, batch.features[b], i, reach)
            right = True
            for j in range(steps):
                if j < reach:
                    log_p = batch.log_p[b * length + i + 1 + j]
                    expected = expected - 0.5**j * (log_p.exp() * logits[j].log_softmax(-1)).sum()
                right = right and j < reach and logits[j].argmax() == batch.truth[b, i + 2 + j]
                hits.append((j, bool(right)))
    torch.testing.assert_close(total, expected / queries, rtol=1e-4, atol=1e-4)
    for j, result in enumerate(results):
        assert result.hits.tolist() == [hit for step, hit in hits if step == j]


def test_queries_end_with_their_draft():
    head = random_head()
    batch = random_batch(head)
    _, results = head(batch, 3, decay=1.0, keep_rank=1)
    assert results[0].queries == 7
    for before, after in zip(results, results[1:], strict=False):
        assert after.kept <= int(before.hits.sum())


def test_soft_cross_entropy_gradients():
    torch.manual_seed(2)
    hidden = torch.randn(700, 8, requires_grad=True)
    weight = torch.randn(12, 8, requires_grad=True)
    log_p = torch.randn(30, 12).log_softmax(-1)
    rows, truth = torch.randint(0, 30, (700,)), torch.randint(-1, 12, (700,))
    w = torch.rand(700)
    loss, rank = SoftCrossEntropy.apply(hidden, weight, log_p, rows, truth, w)
    mine = torch.autograd.grad(loss, (hidden, weight))
    logits = hidden @ weight.T
    plain = -(w[:, None] * log_p[rows].exp() * logits.log_softmax(-1)).sum()
    theirs = torch.autograd.grad(plain, (hidden, weight))
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-3)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    known = truth >= 0
    place = (-logits).argsort(-1)
    assert torch.equal(place[known].gather(1, rank[known, None])[:, 0], truth[known])
    assert (rank[~known] == 12).all()


def test_store_survives_an_interrupted_append(tmp_path):
    folder = tmp_path / "store"
    writer = FeatureStore(folder, "t", [0, 2], 4)
    writer.append(Job("a", [1, 2], None, 0.0), [3, 4], torch.ones(3, 2, 4).bfloat16())
    writer.close()
    with open(folder / "features.bin", "ab") as file:
        file.write(b"torn")
    with open(folder / "sequences.jsonl", "a") as file:
        file.write('{"id": "b", "torn')
    writer = FeatureStore(folder, "t", [0, 2], 4)
    assert writer.done == {"a"} and writer.rows == 3
    writer.append(Job("b", [1, 2], [5, 6], 0.9), [5, 6], 2 * torch.ones(4, 2, 4).bfloat16())
    writer.close()
    corpus = corpus_of(folder)
    sequences = {s.id: s for s in corpus.train}
    assert sequences.keys() == {"a", "b"}
    assert corpus.features.of([sequences["b"]]).float().eq(2).all()
    assert (sequences["b"].first, sequences["b"].greedy) == (1, False)


def test_store_of_other_layers_is_refused(tmp_path):
    FeatureStore(tmp_path, "t", [0, 2], 4).close()
    with pytest.raises(ValueError, match=r"layers.*\[0, 2\].*\[1, 2\]"):
        FeatureStore(tmp_path, "t", [1, 2], 4)


def test_plan_covers_every_sequence_once(store):
    corpus = corpus_of(store)
    for seed in (None, 1):
        groups = plan(corpus.train, 60, seed)
        assert sorted(s.id for g in groups for s in g) == sorted(s.id for s in corpus.train)
        assert all(max(s.rows for s in g) * len(g) <= 60 for g in groups)
    order = [[s.id for s in g] for g in plan(corpus.train, 60, 1)]
    assert order == [[s.id for s in g] for g in plan(corpus.train, 60, 1)]
    assert order != [[s.id for s in g] for g in plan(corpus.train, 60, 2)]


def test_held_out_sequences_are_not_trained(store):
    corpus = corpus_of(store, 4)
    assert corpus.held_out and corpus.train
    assert not {s.id for s in corpus.held_out} & {s.id for s in corpus.train}


def test_batch_targets_are_the_targets_next_tokens(store, target_folder):
    corpus = corpus_of(store)
    ids = draft_vocabulary(corpus.answer_counts(), [1, 2], DRAFT, VOCAB)
    target = load_target(target_folder, TARGET, ids)
    group = corpus.train[:3]
    batch = corpus.batch(group, target, (0, 2))
    length = batch.features.shape[1]
    assert batch.features.shape[2] == 2 * HIDDEN
    for n, sequence in enumerate(group):
        for row in range(sequence.first + 1, sequence.rows):
            best = batch.log_p[n * length + row].argmax()
            assert ids[best] == sequence.ids[row + 1]
            assert batch.truth[n, row + 1] == best


def test_draft_vocabulary_takes_frequent_and_special_tokens():
    from collections import Counter

    chosen = draft_vocabulary(Counter({50: 9, 7: 5, 30: 1}), [1, 2], 6, VOCAB)
    assert chosen.tolist() == [0, 1, 2, 7, 30, 50]


def test_jobs_take_known_answers_first_and_name_a_bad_prompt(tmp_path):
    class Tokenizer:
        chat_template = None  # a base model

        def encode(self, text):
            return [len(text)] * len(text)

    prompts, answers = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    lines = [{"id": "a", "prompt": "aa"}, {"id": "b", "turns": ["bbb", "x"]}]
    lines += [{"id": "c", "prompt": "c" * 50}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers.write_text(json.dumps({"id": "a", "p": [5], "o": [6, 7], "t": 0.9}) + "\n")
    keywords = {"seed": 0, "greedy_share": 1.0, "max_prompt_tokens": 10}
    jobs = make_jobs(prompts, answers, Tokenizer(), **keywords)
    assert jobs == [Job("a", [5], [6, 7], 0.9), Job("b", [3, 3, 3], None, 0.0)]
    prompts.write_text('{"id": "a", "question": "?"}\n')
    with pytest.raises(ValueError, match="question.*allowed: a JSON object with `prompt`"):
        make_jobs(prompts, None, Tokenizer(), **keywords)
