# SPDX-License-Identifier: Apache-2.0
"""Answers of the target and its hidden states, taken in one pass through vLLM.

An EAGLE-3 head learns from three things: a token sequence, the residual streams of the target at
the tap layers, and the target's next-token distribution. The last follows from the residual
stream after the last layer, so the store keeps ``taps + [num_hidden_layers]`` for every token.

vLLM computes all of them while it generates, so nothing is run twice: a forward hook on the target
takes the hidden states of every scheduled row and files them under the request they belong to.
Answers that exist already are fed as prompts and cost one prefill.

The store is a folder:

* ``meta.json``: target, layers, hidden size, dtype of the features.
* ``sequences.jsonl``: one line a sequence: ``id``, ``t`` (temperature), ``p`` (prompt token ids),
  ``o`` (answer token ids), ``row`` (first row in the features), ``n`` (rows).
* ``features.bin``: bf16 ``[rows, num_layers, hidden_size]``.

Appending is the only write, features first, so an interrupted collection continues where it was.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heterospec_vllm.kernels import private_files
from heterospec_vllm.prompts import chat_token_ids, text_of
from heterospec_vllm.training.inputs import InputError, answer_lines, prompt_lines

SEQUENCES = "sequences.jsonl"
FEATURES = "features.bin"
META = "meta.json"
MAX_MODEL_LEN = 2048
IN_FLIGHT = 128


@dataclass(frozen=True)
class Job:
    """One sequence to collect; ``answer`` is None where the target still has to write it."""

    id: str
    prompt: list[int]
    answer: list[int] | None
    temperature: float


def store_meta(target: str, layers: list[int], hidden_size: int) -> dict[str, Any]:
    return {"target": target, "layers": layers, "hidden_size": hidden_size, "dtype": "bfloat16"}


def require_same(folder: Path, meta: dict[str, Any]) -> None:
    """Refuses to add to a store that was begun with another ``meta``."""
    path = folder / META
    found = json.loads(path.read_text()) if path.exists() else meta
    for name, option in (("target", "--target"), ("hidden_size", "--target"), ("layers", "--taps")):
        if found[name] != meta[name]:
            raise InputError(
                option,
                f"{path}: found {name} {found[name]!r}, allowed: {meta[name]!r}, which this run "
                "asks for, so give the old options or another --work folder",
            )


def require_layers(folder: Path, taps: tuple[int, ...], last: int) -> None:
    """Refuses to train on a store without the layers ``taps``, or whose last is not ``last``."""
    path = folder / META
    if not path.is_file():
        raise InputError("--work", f"found no {path}, allowed: folders `store*` of earlier runs")
    found = json.loads(path.read_text())["layers"]
    if found[-1] != last or not {*taps} <= {*found}:
        raise InputError(
            "--taps",
            f"{path}: found layers {found}, allowed: those of this run, {sorted({*taps, last})}, "
            "so give the old --taps or another --work folder",
        )


class FeatureStore:
    """Append-only folder of sequences and their hidden states (format: module docstring)."""

    def __init__(self, folder: Path, target: str, layers: list[int], hidden_size: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.layers = layers
        meta = store_meta(target, layers, hidden_size)
        require_same(folder, meta)
        (folder / META).write_text(json.dumps(meta))
        self.row_bytes = len(layers) * hidden_size * 2
        self.done: set[str] = set()
        self.rows = 0
        self.answer_tokens = 0
        for line in read_jsonl(folder / SEQUENCES):
            self.done.add(line["id"])
            self.rows = line["row"] + line["n"]
            self.answer_tokens += len(line["o"])
        opener = private_files.opener
        self._features = open(folder / FEATURES, "ab", opener=opener)  # noqa: SIM115 - open for the run
        self._features.truncate(self.rows * self.row_bytes)
        self._features.seek(0, os.SEEK_END)
        self._sequences = open(folder / SEQUENCES, "ab", opener=opener)  # noqa: SIM115
        whole = (folder / SEQUENCES).read_bytes().rfind(b"\n") + 1  # a torn line has no end
        self._sequences.truncate(whole)

    def append(self, job: Job, answer: list[int], features: torch.Tensor) -> None:
        # features: [tokens with a forward pass, num_layers, hidden_size], bf16
        self._features.write(features.contiguous().view(torch.int16).numpy().tobytes())
        self._features.flush()
        record = {
            "id": job.id,
            "t": job.temperature,
            "p": job.prompt,
            "o": answer,
            "row": self.rows,
            "n": len(features),
        }
        self._sequences.write(json.dumps(record).encode() + b"\n")
        self._sequences.flush()
        self.rows += len(features)
        self.answer_tokens += len(answer)
        self.done.add(job.id)

    def close(self) -> None:
        self._features.close()
        self._sequences.close()


class HiddenStateTap:
    """Collects the rows of ``runner``'s forward passes per request.

    Installs itself on the runner: a forward hook takes the auxiliary hidden states out of the
    target's output (so the runner sees the plain output it expects) and the wrapped
    ``execute_model`` files the rows in batch order, which vLLM keeps fixed during a step.
    """

    def __init__(self, runner: Any) -> None:
        self.rows: dict[str, list[torch.Tensor]] = {}
        self._last: torch.Tensor | None = None
        self._runner = runner
        self._execute = runner.execute_model
        runner.execute_model = self._execute_model
        runner.model.register_forward_hook(self._take)

    def _take(self, module: torch.nn.Module, args: Any, output: Any) -> torch.Tensor:
        hidden, aux = output
        self._last = torch.stack(aux, dim=1).to(torch.bfloat16)
        return hidden

    def _execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = self._execute(scheduler_output, *args, **kwargs)
        scheduled = scheduler_output.num_scheduled_tokens
        if self._last is None or not scheduled:
            return result
        start = 0
        for req_id in self._runner.input_batch.req_ids:
            stop = start + scheduled[req_id]
            # vLLM's engine appends "-" and a random suffix to the caller's request id.
            key = req_id.rpartition("-")[0]
            self.rows.setdefault(key, []).append(self._last[start:stop].clone())
            start = stop
        self._last = None
        return result

    def pop(self, req_id: str) -> torch.Tensor:
        return torch.cat(self.rows.pop(req_id))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a file written here; nothing where it does not exist; a torn last line ends it."""
    if not path.exists():
        return
    with open(path) as lines:
        for line in lines:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def make_jobs(
    prompts: Path,
    answers: Path | None,
    tokenizer: Any,
    *,
    seed: int,
    greedy_share: float,
    max_prompt_tokens: int,
) -> list[Job]:
    """Jobs in the order of collection: known answers first, then prompts, kinds interleaved."""
    rng = random.Random(seed)
    known = {line["id"]: line for line in answer_lines(answers)} if answers else {}
    jobs = [
        Job(i, a["p"], a["o"], a["t"])
        for i, a in known.items()
        if len(a["p"]) <= max_prompt_tokens and len(a["p"]) + len(a["o"]) < MAX_MODEL_LEN
    ]
    rng.shuffle(jobs)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in prompt_lines(prompts):
        if line["id"] not in known:
            kinds.setdefault(line.get("source", ""), []).append(line)
    order = []
    for lines in kinds.values():
        rng.shuffle(lines)
        # A kind twice as large is asked 1.4 times as often: rare kinds are heard early.
        order += [((i + rng.random()) / len(lines) ** 0.5, line) for i, line in enumerate(lines)]
    for _, line in sorted(order, key=lambda item: item[0]):
        (ids,) = chat_token_ids(tokenizer, [text_of(line)], max_prompt_tokens + 1)
        temperature = 0.0 if rng.random() < greedy_share else 0.9
        if len(ids) <= max_prompt_tokens:
            jobs.append(Job(line["id"], ids, None, temperature))
    return jobs


def load_engine(target: str, layers: list[int], seed: int) -> tuple[Any, HiddenStateTap]:
    """A vLLM engine of this process whose target hands its hidden states to the tap.

    Sets environment variables of vLLM: the hook must live in the process that runs the model, and
    a cached compilation of this target may be one without taps.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from vllm import LLM
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    taps: list[HiddenStateTap] = []
    load_model = CPUModelRunner.load_model

    def load_with_taps(runner: Any, *args: Any, **kwargs: Any) -> None:
        load_model(runner, *args, **kwargs)
        runner.model.set_aux_hidden_state_layers(tuple(layers))
        taps.append(HiddenStateTap(runner))

    CPUModelRunner.load_model = load_with_taps
    try:
        llm = LLM(
            target,
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=IN_FLIGHT,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            disable_log_stats=True,
            seed=seed,
        )
    finally:
        CPUModelRunner.load_model = load_model
    (tap,) = taps
    tap.rows.clear()
    return llm.llm_engine, tap


class Collector:
    """Keeps ``IN_FLIGHT`` jobs running in the engine and stores those that finish."""

    def __init__(
        self, engine: Any, tap: HiddenStateTap, jobs: list[Job], store: FeatureStore, tokens: int
    ) -> None:
        """``tokens``: most answer tokens of a job that has no answer yet."""
        self._engine, self._tap, self._store, self._tokens = engine, tap, store, tokens
        self._waiting = iter([job for job in jobs if job.id not in store.done])
        self.flying: dict[str, Job] = {}

    def launch(self) -> None:
        """Fills the engine up with waiting jobs."""
        from vllm import SamplingParams

        while len(self.flying) < IN_FLIGHT and (job := next(self._waiting, None)) is not None:
            # No top-p: on a CPU it sorts the vocabulary of every row and halves the speed.
            sampling = SamplingParams(
                temperature=job.temperature,
                max_tokens=self._tokens if job.answer is None else 1,
                detokenize=False,
            )
            tokens = job.prompt + (job.answer or [])
            self._engine.add_request(job.id, {"prompt_token_ids": tokens}, sampling)
            self.flying[job.id] = job

    def step(self) -> None:
        for output in self._engine.step():
            if not output.finished:
                continue
            job = self.flying.pop(output.request_id)
            features = self._tap.pop(job.id)
            answer = list(output.outputs[0].token_ids) if job.answer is None else job.answer
            # The last token of a new answer was never fed to the target.
            wanted = len(job.prompt) + len(answer) - (job.answer is None)
            if len(features) == wanted:  # else it was preempted and computed twice: not worth it
                self._store.append(job, answer, features)


def collect(
    target: str,
    jobs: list[Job],
    store: FeatureStore,
    *,
    seconds: float,
    max_tokens: int,
    seed: int,
    report: Callable[[FeatureStore, float, int], None],
) -> None:
    """Runs ``jobs`` through vLLM until they or ``seconds`` are used up; appends to ``store``.

    ``report(store, seconds so far, jobs in flight)`` is called every few seconds. After the time
    limit the requests in flight are finished, none is started.
    """
    engine, tap = load_engine(target, store.layers, seed)
    collector = Collector(engine, tap, jobs, store, max_tokens)
    start = last = time.monotonic()
    collector.launch()
    while collector.flying:
        collector.step()
        now = time.monotonic()
        if now - start < seconds:
            collector.launch()
        if now - last > 10:
            last = now
            report(store, now - start, len(collector.flying))
