# SPDX-License-Identifier: Apache-2.0
"""What a benchmark leaves on disk: one JSON line a run, whole or absent.

A folder of results holds ``rows.jsonl`` (:class:`Row`) and the ``spec.yaml`` that made them. The report reads nothing
else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from heterospec_vllm import input_files
from heterospec_vllm.errors import clauses_of
from heterospec_vllm.kernels import private_files

ROWS = "rows.jsonl"
SPEC = "spec.yaml"

Status = Literal["ok", "failed", "different"]
# In the order of tables. `steady`: when a request ends the next is sent; `batches`: when all of them have ended.
LoadName = Literal["steady", "batches", "rising", "prefill"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Cell(_Record):
    """One comparison: every system runs it, in turns, ``rounds`` times."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["offline", "serving"] = "offline"
    target: str  # its name in tables
    prompt_set: str  # a name of the spec's `prompts` or `mixes`
    load: LoadName = "steady"
    concurrency: int  # most requests at once; for open-loop arrivals the server's bound
    request_rate: float | None = None  # serving: requests a second, Poisson; None: closed loop
    temperature: float
    output_len: int
    range_ratio: float = (
        0.0  # answers are between `output_len * (1 - ratio)` and `output_len * (1 + ratio)` long
    )
    num_prompts: int

    def output_lens(self) -> list[int]:
        """[num_prompts] tokens of each answer: evenly spread, neighbours far apart, the same for every system."""
        least, most = self.shortest, self.longest
        golden = (5**0.5 - 1) / 2
        return [least + int(n * golden % 1 * (most - least + 1)) for n in range(self.num_prompts)]

    @property
    def shortest(self) -> int:
        return max(1, round(self.output_len * (1 - self.range_ratio)))

    @property
    def longest(self) -> int:
        return round(self.output_len * (1 + self.range_ratio))

    @property
    def lengths(self) -> str:
        return (
            f"{self.output_len}" if not self.range_ratio else f"{self.shortest} to {self.longest}"
        )

    @property
    def greedy(self) -> Cell:
        """The cell of the same greedy requests: cells that share it share a gate, whatever is timed in them."""
        return self.model_copy(update={"temperature": 0.0, "request_rate": None})

    @property
    def label(self) -> str:
        rate = "" if self.request_rate is None else f", {self.request_rate:g} requests/s"
        load = "" if self.load == "steady" else f", {self.load}"
        mode = "" if self.mode == "offline" else ", serving"
        return (
            f"{self.target}, {self.prompt_set}, {self.concurrency} at once{rate}{load}{mode}, "
            f"T={self.temperature:g}"
        )


class Gate(_Record):
    """Greedy answers of a system against plain vLLM's on the same prompts."""

    same: int
    near_ties: int  # first differences where plain decoding's own choice was a near-tie
    different: int
    largest_gap: float  # nats, over the first differences; 0 where there is none


class Serving(_Record):
    """What ``vllm bench serve`` measured: milliseconds, requests and tokens a second."""

    request_throughput: float
    goodput: float | None  # requests a second within the spec's limits
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    itl_p50: float
    itl_p99: float
    e2el_p50: float
    e2el_p99: float
    completed: int
    failed: int


class Environment(_Record):
    """Where and with what a row was made."""

    commit: str
    versions: dict[str, str]
    machine: str
    threads: str  # how they were bound
    command: str


class Row(_Record):
    """One timed run of one system in one cell."""

    cell: Cell
    system: str
    group: int = 0  # engines that were loaded together; ratios compare within a group
    round: int
    status: Status
    reason: str | None = None  # of a status other than ok
    # Absent where nothing was timed, or where the answers differ: then no timing is shown at all.
    seconds: float | None = None
    num_tokens: int | None = None
    request_seconds: list[float] | None = None  # [num_prompts], of cells with one request at a time
    gate: Gate | None = None
    # Ours: heterospec's counters of the run (docs/metrics.md). vLLM's drafters: num_drafts, num_draft_tokens,
    # num_accepted_tokens of vLLM's own metrics. Plain: none.
    counters: dict[str, Any] | None = None
    serving: Serving | None = None
    time: str
    environment: Environment

    @property
    def tokens_per_second(self) -> float | None:
        if not self.seconds or self.num_tokens is None:
            return None
        return self.num_tokens / self.seconds


R = TypeVar("R", bound=BaseModel)


def read(path: Path, kind: type[R]) -> Iterator[R]:
    """The records of a file; nothing where it does not exist; a torn last line is left out.

    Raises ValueError with the file, the line, and what is wrong in it.
    """
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):
                yield _record(line, kind, f"{path}, line {number}")


def _record(line: bytes, kind: type[R], where: str) -> R:
    values = input_files.parse_object(line, f"at {where}", "a JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {clauses_of(error, kind, values)}") from None


def rows_of(folder: Path) -> list[Row]:
    """Raises ValueError that names the folder or file which holds no results."""
    path = folder / ROWS
    if not path.is_file():
        raise ValueError(f"found no {ROWS} in {folder}, allowed: folders of `heterospec bench`")
    return list(read(path, Row))


def append(path: Path, record: BaseModel) -> None:
    """Adds a line in one write, after cutting off what an interrupted run left of its last one."""
    line = (record.model_dump_json() + "\n").encode()
    with open(path, "ab+", opener=private_files.opener) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
