# SPDX-License-Identifier: Apache-2.0
"""Speculation switched by the request: as configured, off, and with few draft nodes.

    python examples/per_request.py

You see one line a setting: target steps, draft nodes verified, and whether the answer is the same (it is, but for
near-ties in bfloat16). The trees are of one size here, so that nothing depends on how busy the machine is. Over HTTP
the same options go into the body as `vllm_xargs`, with the openai client:
`client.chat.completions.create(..., extra_body={"vllm_xargs": {"heterospec": "off"}})`.
"""

import argparse
import os

from heterospec_vllm.config import BUILTIN_HEAD
from heterospec_vllm.demo.model_cache import demo_target

SETTINGS = (
    {},  # as the engine is configured
    {"heterospec": "off"},  # plain decoding
    {"heterospec_max_nodes": 2},  # at most two draft nodes a step
)
TREES = {"policy": "static", "num_speculative_tokens": 8, "max_depth": 4, "top_k": 4}
QUESTION = "Write a Python function that returns the n-th Fibonacci number."


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
        speculative_config={"method": "heterospec", "model": args.head, **TREES},
    )
    chat = [{"role": "user", "content": QUESTION}]
    answers = []
    for setting in SETTINGS:
        llm.collective_rpc("heterospec_counters", args=(True,))  # from zero
        params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, extra_args=setting)
        answers.append(llm.chat(chat, params, use_tqdm=False)[0].outputs[0].text)
        counters = llm.collective_rpc("heterospec_counters")[0]
        same = "same answer" if answers[-1] == answers[0] else "another answer (near-tie)"
        print(f"{setting}: {counters['steps']} steps, {counters['verified_nodes']} nodes, {same}")


if __name__ == "__main__":
    main()
