# SPDX-License-Identifier: Apache-2.0
"""Offline batch inference: a few prompts at once, drafted as trees and verified by the target.

    python examples/offline.py                           # the demo model and the head that comes with the package
    python examples/offline.py --model MODEL --head HEAD

You see every answer. Then you see how many tokens a request got from one forward pass of the target: plain
decoding gives 1, and what exceeds 1 was drafted and accepted. At temperature 0 the answers are those of plain
vLLM, but for near-ties in bfloat16.
"""

import argparse
import os

from heterospec_vllm.config import BUILTIN_HEAD
from heterospec_vllm.demo.model_cache import demo_target

PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.",
    "List three uses of salt.",
    "Write a short email that thanks a friend for dinner.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="folder or hub id; default: the demo model")
    parser.add_argument("--head", default=BUILTIN_HEAD, help="its EAGLE-3 head: folder or hub id")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="auto", help="float32 where a CPU has no AVX-512")
    parser.add_argument("--enforce-eager", action="store_true", help="start sooner, run slower")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # counters are asked for below
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, instead of most of the memory
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model or demo_target(),
        max_model_len=1024,
        dtype=args.dtype,
        enforce_eager=args.enforce_eager,
        speculative_config={"method": "heterospec", "model": args.head},
    )
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    outputs = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=args.max_tokens))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        print(f"\n> {prompt}\n{output.outputs[0].text.strip()}")
    counters = llm.collective_rpc("heterospec_counters")[0]
    drafts = max(counters["drafted_trees"], 1)
    print(
        f"\n{1 + counters['accepted_nodes'] / drafts:.2f} tokens a pass and drafted request; "
        f"{counters['verified_nodes'] / drafts:.1f} draft nodes verified in each"
    )


if __name__ == "__main__":
    main()
