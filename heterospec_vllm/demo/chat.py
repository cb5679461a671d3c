# SPDX-License-Identifier: Apache-2.0
"""Asks servers the same questions in turns and summarises what was measured."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from openai import DefaultHttpxClient, OpenAI

from heterospec_vllm.demo.server import VllmServer

QUESTIONS = (
    "What is photosynthesis, and why does life on Earth depend on it?",
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "Tom has 3 boxes with 12 pencils each and gives away 7 pencils. How many are left? "
    "Show your steps.",
    "List five tips for a good night's sleep.",
    "Write a short, polite email asking my landlord to repair the heating.",
    "Explain the difference between a virus and a bacterium to a ten-year-old.",
)
# An idle engine keeps polling for about one second after its last step and would slow the other.
PAUSE_BETWEEN_SYSTEMS = 2.5  # seconds


@dataclass(frozen=True)
class Answer:
    """One streamed chat answer; `seconds` runs from the request to the last chunk."""

    text: str
    num_tokens: int
    seconds: float


@dataclass
class Measurements:
    """What one server did: its tokens/s by round and its answers by question."""

    tokens_per_second: list[float] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)
    acceptance_length: float | None = None  # None where nothing was drafted

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_second)


class ChatClient:
    """The `openai` client of one server."""

    def __init__(self, server: VllmServer) -> None:
        self.server = server
        self._client = OpenAI(
            base_url=f"{server.url}/v1",
            api_key="unused",
            max_retries=0,
            http_client=DefaultHttpxClient(trust_env=False, timeout=300),
        )

    def ask(
        self, question: str, max_tokens: int, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """Stream the greedy answer; `on_text` gets each piece as it arrives."""
        started = time.perf_counter()
        pieces = []
        num_tokens = 0
        stream = self._client.chat.completions.create(
            model=self.server.target,
            messages=[{"role": "user", "content": question}],
            temperature=0.0,
            max_tokens=max_tokens,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.usage is not None:
                num_tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if choice.delta.content:
                    pieces.append(choice.delta.content)
                    if on_text is not None:
                        on_text(choice.delta.content)
        return Answer("".join(pieces), num_tokens, time.perf_counter() - started)


def compare(
    clients: Sequence[ChatClient],
    *,
    num_rounds: int,
    max_tokens: int,
    on_round: Callable[[str], None],
) -> list[Measurements]:
    """Ask every server all questions, in turns, `num_rounds` times; the order alternates."""
    results = [Measurements() for _ in clients]
    before = [client.server.counters() for client in clients]
    for round_index in range(num_rounds):
        order = range(len(clients)) if round_index % 2 == 0 else reversed(range(len(clients)))
        for index in order:
            time.sleep(PAUSE_BETWEEN_SYSTEMS)
            answers = {q: clients[index].ask(q, max_tokens) for q in QUESTIONS}
            num_tokens = sum(answer.num_tokens for answer in answers.values())
            rate = num_tokens / sum(answer.seconds for answer in answers.values())
            results[index].tokens_per_second.append(rate)
            results[index].answers = {q: answer.text for q, answer in answers.items()}
            label = clients[index].server.label
            on_round(f"round {round_index + 1}/{num_rounds}: {label} {rate:.1f} tokens/s")
    for client, start, result in zip(clients, before, results, strict=True):
        end = client.server.counters()
        if end.num_drafts > start.num_drafts:
            result.acceptance_length = end.acceptance_length(start)
    return results
