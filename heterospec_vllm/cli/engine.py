# SPDX-License-Identifier: Apache-2.0
"""The engine of a command: in this process, with our config, without a prefix cache."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

TargetOption = Annotated[str, typer.Option("--target", help="Target model: folder or hub id.")]
HeadOption = Annotated[
    str,
    typer.Option(
        "--head",
        help="EAGLE-3 head: folder or hub id, or builtin:smollm2-135m, which is the demo model's.",
    ),
]
EnforceEager = Annotated[
    bool,
    typer.Option(
        "--enforce-eager",
        help="Start in seconds, without compiling the model; steps are slower.",
    ),
]


def in_process_llm(
    target: str,
    speculative_config: dict[str, Any],  # beside the method
    *,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    kv_cache_gib: int = 2,  # vLLM would claim most of the memory
    enforce_eager: bool = False,
) -> Any:
    """vLLM's `LLM`. Sets environment variables of vLLM; what the user has set stays.

    Raises BadParameter with vLLM's or our one sentence where a model or an option cannot start.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gib))
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # results go to stdout
    from vllm import LLM

    try:
        return LLM(
            target,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=False,
            enforce_eager=enforce_eager,
            speculative_config={"method": "heterospec", **speculative_config},
        )
    except (ValueError, OSError) as error:  # OSError: transformers found no such folder or id
        raise typer.BadParameter(str(error)) from error
