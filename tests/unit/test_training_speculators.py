# SPDX-License-Identifier: Apache-2.0
"""Our unroll against the model class of the `speculators` library, where that is installed."""

import pytest
import torch

pytest.importorskip("speculators")

from speculators import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig

from heterospec_vllm.training.init import head_config
from heterospec_vllm.training.model import Eagle3Head, TrainingBatch

TARGET = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 24,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
}


def test_drafts_are_those_of_the_library():
    torch.manual_seed(0)
    head = Eagle3Head(head_config(TARGET, (0, 1, 2), 24), torch.randn(24, 32))
    for p in head.parameters():
        p.data = torch.randn_like(p) * (0.2 if p.dim() == 2 else 0.1) + (p.dim() == 1)
    layer = LlamaConfig(**TARGET, num_hidden_layers=1, attn_implementation="eager")
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=24,
        fc_norm=True,
        eagle_aux_hidden_state_layer_ids=[0, 1, 2],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
    )
    library = Eagle3DraftModel(config)
    weights = {n.replace("midlayer.", "layers.0."): w for n, w in head.state_dict().items()}
    weights["embed_tokens.weight"] = head.embed
    missing = library.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith(("verifier", "rotary", "t2d", "d2t")) for name in missing[0])

    length = 12
    ids = torch.randint(0, 24, (1, length + 1))
    features = torch.randn(1, length, 96)
    with torch.no_grad():
        drafts = library(
            hidden_states=features,
            input_ids=ids[:, 1:],
            document_ids=torch.zeros(1, length, dtype=torch.long),
            ttt_steps=3,
        )
    # Say the library's drafts are the accepted tokens: then every draft of ours must hit.
    for step in range(3):
        truth = torch.full((1, length + 1), -1)
        truth[0, 2 + step :] = drafts[step][0, : length - 1 - step]
        batch = TrainingBatch(
            ids=ids,
            features=features,
            first=torch.tensor([0]),
            rows=torch.tensor([length]),
            log_p=torch.zeros(length, 24),
            truth=truth,
        )
        ranks = all_ranks(head, batch, step)
        assert len(ranks) == length - 1 - step
        assert (ranks == 0).all()


def all_ranks(head: Eagle3Head, batch: TrainingBatch, step: int) -> torch.Tensor:
    """Ranks of the accepted tokens at ``step`` (the last one run), nothing dropped before it."""
    from heterospec_vllm.training import model

    seen = []
    apply = model.SoftCrossEntropy.apply

    class Spy:
        @staticmethod
        def apply(*args):
            loss, rank = apply(*args)
            seen.append(rank)
            return loss, rank

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "SoftCrossEntropy", Spy)
        head(batch, step + 1, decay=1.0, keep_rank=10**6)
    return seen[step]
