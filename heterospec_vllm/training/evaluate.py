# SPDX-License-Identifier: Apache-2.0
"""Acceptance of a head by draft position, from stock vLLM's own ``eagle3`` counters."""

from __future__ import annotations

import os
from dataclasses import dataclass

from heterospec_vllm.prompts import chat_token_ids

MAX_MODEL_LEN = 2048


@dataclass(frozen=True)
class Acceptance:
    """accepted[j]: drafts whose first j + 1 tokens were all accepted; of ``drafts`` in all."""

    name: str
    prompts: int
    tokens: int
    drafts: int
    accepted: list[int]

    @property
    def rates(self) -> list[float]:
        return [count / max(1, self.drafts) for count in self.accepted]


def measure(
    target: str,
    head: str,
    sets: list[tuple[str, list[str]]],
    *,
    num_speculative_tokens: int,
    max_tokens: int,
) -> list[Acceptance]:
    """One entry per set (name, prompts): temperature 0, the chain of stock ``eagle3``.

    Prompts go through the target's chat template, if it has one.

    The engine is vLLM's without our plugin's method; the counters are those it also exports as
    ``vllm:spec_decode_*`` metrics.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        target,
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=16,
        disable_log_stats=False,
        seed=0,
        speculative_config={
            "method": "eagle3",
            "model": head,
            "num_speculative_tokens": num_speculative_tokens,
        },
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    results = []
    before = _counters(llm, num_speculative_tokens)
    for name, texts in sets:
        ids = chat_token_ids(llm.get_tokenizer(), texts, MAX_MODEL_LEN - 1)
        inputs = [{"prompt_token_ids": one} for one in ids]
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
        after = _counters(llm, num_speculative_tokens)
        drafts, *accepted = (new - old for new, old in zip(after, before, strict=True))
        before = after
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        results.append(Acceptance(name, len(outputs), tokens, drafts, accepted))
    return results


def total(results: list[Acceptance]) -> Acceptance:
    """All prompt files together: every draft counts the same."""
    return Acceptance(
        "all",
        sum(r.prompts for r in results),
        sum(r.tokens for r in results),
        sum(r.drafts for r in results),
        [sum(counts) for counts in zip(*(r.accepted for r in results), strict=True)],
    )


def _counters(llm: object, positions: int) -> list[int]:
    """[drafts, accepted at position 1, 2, ...] since the engine started."""
    drafts, accepted = 0, [0] * positions
    for metric in llm.get_metrics():  # type: ignore[attr-defined]
        if metric.name == "vllm:spec_decode_num_drafts":
            drafts += metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            accepted = [a + b for a, b in zip(accepted, metric.values, strict=True)]
    return [drafts, *accepted]
