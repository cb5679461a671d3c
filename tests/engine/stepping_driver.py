# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine that plays plans until its input ends: `python stepping_driver.py ENGINE_JSON ANSWERS_FD`.

Each line of the input is a plan (see `mixed_plans.py`), each line written to the file descriptor its answers.
"""

import json
import os
import sys
from typing import Any

from driver import _completion, _metric, _params

NEVER = 10**9


def main(engine: str, answers_fd: str) -> None:
    from vllm import LLM

    arguments = json.loads(engine)
    llm = LLM(disable_log_stats=False, **arguments)
    speculates = "speculative_config" in arguments
    with os.fdopen(int(answers_fd), "w") as answers:
        for line in sys.stdin:
            plan = json.loads(line)
            answers.write(json.dumps(play(llm, plan, speculates)) + "\n")
            answers.flush()
    os._exit(0)  # an engine in this process takes seconds to tidy up


def play(llm, plan: dict[str, Any], speculates: bool) -> dict[str, Any]:
    """Requests join, leave and are aborted, and policies switch, at the steps that the plan names."""
    llm.reset_prefix_cache()
    if speculates:
        llm.collective_rpc("heterospec_counters", kwargs={"reset": True})
    preemptions = _metric(llm, "vllm:num_preemptions")
    engine, requests = llm.llm_engine, plan["requests"]
    answers = [{"completions": {}, "prompt_logprobs": None} for _ in requests]
    switches = {switch["step"]: switch for switch in plan["switches"]} if speculates else {}
    step, waiting = 0, sorted(range(len(requests)), key=lambda i: requests[i]["joins"])
    while waiting or engine.has_unfinished_requests():
        if step in switches:
            _switch(llm, switches[step])
        while waiting and requests[waiting[0]]["joins"] <= step:
            i = waiting.pop(0)
            _add(engine, str(i), requests[i])
        for output in engine.step():
            _note(answers[int(output.request_id)], output)
        for i, request in enumerate(requests):
            if request["joins"] + (request["steps"] or NEVER) == step:
                engine.abort_request([str(i)])
        step += 1
    engine.engine_core.get_output()  # a step without requests: the worker hears that the last ended
    return {
        "answers": answers,
        "preemptions": _metric(llm, "vllm:num_preemptions") - preemptions,
        "counters": llm.collective_rpc("heterospec_counters")[0] if speculates else None,
    }


def _add(engine, request_id: str, request: dict[str, Any]) -> None:
    from vllm import SamplingParams

    params = _params(SamplingParams, request["sampling"])
    prompt = {"prompt_token_ids": request["prompt"]}
    engine.add_request(request_id, prompt, params, priority=request["priority"])


def _switch(llm, switch: dict[str, Any]) -> None:
    if switch["policy"] == "random":
        from random_policy import install

        llm.collective_rpc(install, kwargs={"seed": switch["step"]})
    else:
        llm.collective_rpc("set_heterospec_policy", kwargs={"policy": switch["policy"]})


def _note(answer: dict[str, Any], output) -> None:
    """What a request has got until now; a step brings some of its completions."""
    for completion in output.outputs:
        answer["completions"][str(completion.index)] = {
            **_completion(completion),
            "stop_reason": completion.stop_reason,
        }
    if output.prompt_logprobs:
        answer["prompt_logprobs"] = [
            position and {str(token): value.logprob for token, value in position.items()}
            for position in output.prompt_logprobs
        ]


if __name__ == "__main__":
    main(*sys.argv[1:])
