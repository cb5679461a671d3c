# SPDX-License-Identifier: Apache-2.0
"""Runs scenes of streaming-input sessions in one engine of this process: `python session_driver.py JOB OUT`.

A job is `{"engine": LLM arguments, "scenes": [scene, ...]}`; a scene is `{"name", "sessions" (each a list of turns,
`{"prompt": token ids, "sampling"}`), "queued" (optional: all turns are there before the first ends), "others"
(optional: ordinary requests of the same form that run beside them), "abort_after" (optional: tokens after which
an ordinary request is aborted)}`. A scene's result tells what was answered, what scheduler, runner and prefix cache
held when a turn or request stopped, and what a later request with the session's text gets with and without the cache.
"""

import json
import os
import sys
from copy import copy
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# Hashes of blocks are the same in every process.
os.environ["PYTHONHASHSEED"] = "0"
MAX_DRAWS = 1000


class Engine:
    """One engine, step by step."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(disable_log_stats=False, **arguments)
        self.engine = self.llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.events: list[Any] = []
        self.scheduler.kv_event_publisher.publish = lambda batch: self.events.extend(batch.events)
        self.requests: dict[str, Any] = {}  # of the scheduler, finished ones among them
        self.parts: dict[str, list[dict[str, Any]]] = {}  # of each request, turn by turn
        self.preempted: list[list[Any]] = []

    def add(
        self, req_id: str, given: dict[str, Any], resumable: bool = False, salt: str | None = None
    ) -> None:
        prompt: dict[str, Any] = {"prompt_token_ids": list(given["prompt"])}
        if salt is not None:
            prompt["cache_salt"] = salt
        request = self.engine.input_processor.process_inputs(
            req_id,
            prompt,
            _params(given["sampling"]),
            supported_tasks=self.engine.get_supported_tasks(),
            resumable=resumable,
        )
        request.external_req_id = req_id
        # In two processes, which sessions are made for, the front end has a list of its own, which it extends.
        front = copy(request)
        front.prompt_token_ids = list(request.prompt_token_ids)
        self.engine.output_processor.add_request(front, None, None, 0)
        self.engine.engine_core.add_request(request)
        if req_id not in self.requests:
            self.requests[req_id] = self.scheduler.requests[req_id]
            self.parts[req_id] = [{"token_ids": [], "finish_reason": None}]

    def step(self) -> None:
        held = {req_id: len(r.output_token_ids) for req_id, r in self.scheduler.requests.items()}
        for output in self.engine.step():
            part = self.parts[output.request_id][-1]
            [completion] = output.outputs
            part["token_ids"] += completion.token_ids
            part["cached"] = output.num_cached_tokens
            if completion.logprobs:
                first = completion.logprobs[0]
                part.setdefault("first", {str(t): v.logprob for t, v in first.items()})
            if completion.finish_reason is not None:
                part["finish_reason"] = completion.finish_reason
                part["stop_reason"] = completion.stop_reason
                part |= self.state(output.request_id)
                self.parts[output.request_id].append({"token_ids": [], "finish_reason": None})
        self.preempted += [
            [req_id, r.num_computed_tokens, list(r.spec_token_ids)]
            for req_id, r in self.scheduler.requests.items()
            if r.status.name == "PREEMPTED" and req_id in held
        ]

    def state(self, req_id: str) -> dict[str, Any]:
        """What is left of a request that has just stopped."""
        request = self.requests[req_id]
        state = self.runner.requests.get(req_id)
        return {
            "held": req_id in self.scheduler.requests,
            "num_tokens": request.num_tokens,
            "num_computed_tokens": request.num_computed_tokens,
            "num_output_tokens": request.num_output_tokens,
            "spec_token_ids": list(request.spec_token_ids),
            "draws": None if state is None else _draws(state.generator, request.sampling_params),
        }

    def ended_turns(self, req_id: str) -> int:
        return len(self.parts[req_id]) - 1

    def cached_blocks(self) -> list[str]:
        pool = self.scheduler.kv_cache_manager.block_pool
        return sorted(key.hex() for key in pool.cached_block_hash_to_block._cache)

    def stored_blocks(self) -> list[str]:
        """Of all KV events since the last call."""
        stored = [e for e in self.events if type(e).__name__ == "BlockStored"]
        self.events.clear()
        return sorted(
            f"{block!r} {e.token_ids[i * e.block_size : (i + 1) * e.block_size]}"
            for e in stored
            for i, block in enumerate(e.block_hashes)
        )

    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def _params(given: dict[str, Any]):
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

    given = dict(given)
    if "repetition_detection" in given:
        given["repetition_detection"] = RepetitionDetectionParams(**given["repetition_detection"])
    if "logit_bias" in given:
        given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
    return SamplingParams(output_kind=RequestOutputKind.DELTA, **given)


def _draws(generator: Any, params: Any) -> int | None:
    """How many seeds have been drawn from a request's generator."""
    import torch

    if generator is None:
        return None
    fresh = torch.Generator().manual_seed(params.seed)
    for count in range(MAX_DRAWS):
        if torch.equal(fresh.get_state(), generator.get_state()):
            return count
        torch.randint(0, 2**31, (1,), generator=fresh)
    return None


def _play(engine: Engine, scene: dict[str, Any]) -> dict[str, Any]:
    engine.llm.reset_prefix_cache()
    engine.stored_blocks()
    engine.preempted.clear()
    name = scene["name"]
    sessions = {f"{name} session {i}": turns for i, turns in enumerate(scene["sessions"])}
    others = {f"{name} other {i}": other for i, other in enumerate(scene.get("others", ()))}
    for req_id, other in others.items():
        engine.add(req_id, other)
    for req_id, turns in sessions.items():
        for turn in turns if scene.get("queued") else turns[:1]:
            engine.add(req_id, turn, resumable=True)
    added = {req_id: len(turns) if scene.get("queued") else 1 for req_id, turns in sessions.items()}
    while any(engine.ended_turns(r) < len(turns) for r, turns in sessions.items()) or any(
        engine.ended_turns(r) < 1 for r in others
    ):
        engine.step()
        _abort(engine, others, scene.get("abort_after"))
        for req_id, turns in sessions.items():
            if engine.ended_turns(req_id) == added[req_id] < len(turns):
                engine.add(req_id, turns[added[req_id]], resumable=True)
                added[req_id] += 1
    result = {"cached_blocks": engine.cached_blocks(), "stored_blocks": engine.stored_blocks()}
    for req_id in sessions:
        engine.add(req_id, {"prompt": [0], "sampling": {}})
    for _ in range(2):
        engine.step()
    return {
        **result,
        "sessions": [engine.parts[r][: len(turns)] for r, turns in sessions.items()],
        "others": [engine.parts[r][0] for r in others],
        "preempted": list(engine.preempted),
        "later": [_later(engine, engine.requests[r]) for r in sessions],
        "free_blocks": engine.free_blocks(),
    }


def _abort(engine: Engine, others: dict[str, Any], after: int | None) -> None:
    for req_id in others if after is not None else ():
        if engine.ended_turns(req_id) == 0 and len(engine.parts[req_id][0]["token_ids"]) >= after:
            engine.engine.abort_request([req_id])
            engine.parts[req_id][0] |= engine.state(req_id)
            engine.parts[req_id].append({"token_ids": []})


def _later(engine: Engine, session: Any) -> dict[str, Any]:
    """An ordinary request with the session's text, from the prefix cache and without it."""
    text = list(session.all_token_ids)[: session.num_computed_tokens]
    given = {"prompt": text, "sampling": {"temperature": 0.0, "max_tokens": 1, "logprobs": 5}}
    answers = {}
    for kind, salt in (("cold", "salt"), ("warm", None)):
        req_id = f"{session.request_id} {kind}"
        engine.add(req_id, given, salt=salt)
        while engine.ended_turns(req_id) < 1:
            engine.step()
        answers[kind] = engine.parts[req_id][0]
    return {"text": text, **answers}


def main(job_file: str, out_file: str) -> None:
    with open(job_file) as file:
        job = json.load(file)
    engine = Engine(job["engine"])
    speculates = "speculative_config" in job["engine"]
    results = {}
    for scene in job["scenes"]:
        results[scene["name"]] = _play(engine, scene)
        counters = engine.llm.collective_rpc("heterospec_counters")[0] if speculates else None
        results[scene["name"]]["counters"] = counters
    with open(out_file, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
