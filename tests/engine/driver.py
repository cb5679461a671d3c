# SPDX-License-Identifier: Apache-2.0
"""Runs one vLLM engine in this process and writes what it answered: `python driver.py JOB OUT`.

A job is `{"engine": LLM arguments, "runs": [run, ...]}`; a run is `{"name", "prompts" (token ids or
text), "sampling" (one dict or one a prompt), "batch" (requests at a time, default all), "policy"
(optional: arguments of set_heterospec_policy), "random_policy" (optional: arguments of
random_policy.install), "fused_head" (optional: that of choose_head), "our_rows" (optional: those of
choose_rows), "reload" (optional: arguments of reload_weights.reload)}`.
Two engines of one process would share threads and caches, so tests start a process each.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main(job_file: str, out_file: str) -> None:
    from vllm import LLM

    with open(job_file) as file:
        job = json.load(file)
    llm = LLM(disable_log_stats=False, **job["engine"])
    speculates = (job["engine"].get("speculative_config") or {}).get("method") == "heterospec"
    results = {}
    for run in job["runs"]:
        if "policy" in run:
            llm.collective_rpc("set_heterospec_policy", kwargs=run["policy"])
        if "random_policy" in run:
            from random_policy import install

            llm.collective_rpc(install, kwargs=run["random_policy"])
        if "fused_head" in run:
            from choose_head import choose_head

            llm.collective_rpc(choose_head, args=(run["fused_head"],))
        if "our_rows" in run and speculates:
            from choose_rows import choose_rows

            llm.collective_rpc(choose_rows, kwargs=run["our_rows"])
        error = None
        if "reload" in run:
            from reload_weights import reload

            error = llm.collective_rpc(reload, kwargs=run["reload"])[0]
            assert llm.reset_prefix_cache()
        if speculates:
            llm.collective_rpc("heterospec_counters", kwargs={"reset": True})
        preemptions = _metric(llm, "vllm:num_preemptions")
        answers = _run(llm, run)
        # As a server's loop does: a step without requests, which tells the worker that the last ended.
        llm.llm_engine.engine_core.get_output()
        results[run["name"]] = {
            "answers": answers,
            "reload_error": error,
            "preemptions": _metric(llm, "vllm:num_preemptions") - preemptions,
            "free_blocks": _free_blocks(llm),
            "counters": llm.collective_rpc("heterospec_counters")[0] if speculates else None,
        }
    with open(out_file, "w") as file:
        json.dump(results, file)


def _run(llm, run) -> list:
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": p} if isinstance(p, list) else {"prompt": p} for p in run["prompts"]
    ]
    given = (
        run["sampling"] if isinstance(run["sampling"], list) else [run["sampling"]] * len(prompts)
    )
    batch = run.get("batch") or len(prompts)
    answers = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        outputs = llm.generate(
            prompts[part], [_params(SamplingParams, s) for s in given[part]], use_tqdm=False
        )
        answers += [[_completion(c) for c in output.outputs] for output in outputs]
    return answers


def _params(sampling_params_class, given: dict):
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    given = dict(given)
    for kind in ("regex", "choice", "json"):
        if kind in given:
            given["structured_outputs"] = StructuredOutputsParams(**{kind: given.pop(kind)})
    if "repetition_detection" in given:
        given["repetition_detection"] = RepetitionDetectionParams(**given["repetition_detection"])
    if "logit_bias" in given:
        given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
    return sampling_params_class(**given)


def _completion(completion) -> dict:
    logprobs = completion.logprobs
    return {
        "token_ids": list(completion.token_ids),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "logprobs": logprobs
        and [
            {str(token): value.logprob for token, value in position.items()}
            for position in logprobs
        ],
    }


def _metric(llm, name: str) -> int:
    return sum(getattr(m, "value", 0) for m in llm.get_metrics() if m.name == name)


def _free_blocks(llm) -> int:
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return pool.get_num_free_blocks()


if __name__ == "__main__":
    main(*sys.argv[1:])
