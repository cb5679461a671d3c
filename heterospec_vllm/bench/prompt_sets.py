# SPDX-License-Identifier: Apache-2.0
"""The prompts of a benchmark: files, our own, or vLLM's datasets; and which of them a cell sends."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from heterospec_vllm.bench.rows import Cell
from heterospec_vllm.bench.spec import MIX, Dataset
from heterospec_vllm.prompts import BUILT_IN, chat_token_ids, texts_of

# Answers that repeat themselves, where deep drafts pay.
REPETITIVE = (
    "Count from 1 to 60, separated by commas.",
    "Write the word 'hello' forty times.",
    "List the numbers from 100 down to 50.",
    "Repeat this sentence twenty times: The quick brown fox jumps over the lazy dog.",
    "Write out the multiplication table of seven, from 7 x 1 to 7 x 30.",
    "Write the alphabet ten times, one letter after the other.",
    "List all months of the years 2020 to 2024, each with its year.",
    "Print the powers of two from 2^1 to 2^40.",
)
# Some 600 tokens each, for answers that are short beside their prompts.
LONG = tuple(
    "Which of these requests is the hardest to answer, and why?\n"
    + "\n".join((*BUILT_IN[first:], *REPETITIVE, *BUILT_IN[:first]))
    for first in range(16)
)
BUILT_INS = {"builtin": BUILT_IN, "builtin:repetitive": REPETITIVE, "builtin:long": LONG}
MOST = 128  # prompts of a file that are looked at


@dataclass(frozen=True)
class SetPrompt:
    prompt_set: str
    index: int
    text: str
    token_ids: list[int]


class PromptSets:
    """Every set's prompts as texts and as token ids of the chat template."""

    def __init__(
        self,
        sets: dict[str, str | Dataset],
        tokenizer: Any,
        most_tokens: int,
        mixes: dict[str, list[str]] | None = None,  # None: all sets together, as `mix`
    ) -> None:
        """``most_tokens``: longer prompts are left out. Raises ValueError for a set without usable prompts."""
        self._mixes = {MIX: list(sets)} if mixes is None else mixes
        self.sets: dict[str, list[SetPrompt]] = {}
        for name, source in sets.items():
            texts = _texts(name, source, tokenizer)[:MOST]
            ids = chat_token_ids(tokenizer, texts, most_tokens + 1)
            self.sets[name] = [
                SetPrompt(name, i, text, tokens)
                for i, (text, tokens) in enumerate(zip(texts, ids, strict=True))
                if len(tokens) <= most_tokens
            ]
            if not self.sets[name]:
                raise ValueError(
                    f"prompts.{name}: every prompt is longer than {most_tokens} tokens "
                    "(max_model_len less output_len)"
                )

    def of(self, cell: Cell) -> list[SetPrompt]:
        """The prompts that a cell sends, in order; a set that is too small goes round."""
        if cell.prompt_set in self._mixes:
            prompts = _mixed([self.sets[name] for name in self._mixes[cell.prompt_set]])
        else:
            prompts = self.sets[cell.prompt_set]
        if cell.load == "prefill":
            prompts = sorted(prompts, key=lambda p: len(p.token_ids), reverse=True)
        return list(islice(cycle(prompts), cell.num_prompts))


def _mixed(sets: list[list[SetPrompt]]) -> list[SetPrompt]:
    """The first prompt of every set, then the second ones, and so on."""
    longest = max(map(len, sets), default=0)
    return [prompts[i] for i in range(longest) for prompts in sets if i < len(prompts)]


def _texts(name: str, source: str | Dataset, tokenizer: Any) -> list[str]:
    if isinstance(source, Dataset):
        return _vllm_dataset(name, source, tokenizer)
    return _own_texts(name, source)


def check_files(sets: dict[str, str | Dataset]) -> None:
    """Reads every file of prompts, so that a missing one is told before any model is loaded. Raises ValueError."""
    for name, source in sets.items():
        if isinstance(source, str):
            _own_texts(name, source)


def _own_texts(name: str, source: str) -> list[str]:
    if source in BUILT_INS:
        return list(BUILT_INS[source])
    if source.startswith("builtin"):
        raise ValueError(f"prompts.{name}: found '{source}', allowed: {', '.join(BUILT_INS)}")
    try:
        return texts_of(Path(source))
    except OSError as error:
        raise ValueError(
            f"prompts.{name}: found no readable file {source} ({error.strerror}), "
            "allowed: a JSONL file"
        ) from error
    except ValueError as error:
        raise ValueError(f"prompts.{name}: {str(error).removeprefix('prompts: ')}") from error


def _vllm_dataset(name: str, source: Dataset, tokenizer: Any) -> list[str]:
    from argparse import ArgumentError

    from vllm.benchmarks.datasets import add_dataset_parser, get_samples
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(exit_on_error=False)
    add_dataset_parser(parser)
    given = ["--dataset-name", source.dataset, "--num-prompts", str(source.num_prompts)]
    try:
        arguments, unknown = parser.parse_known_args([*given, *source.arguments])
        if unknown:
            raise ValueError(f"it knows no argument {unknown[0]}")
        samples = get_samples(arguments, tokenizer)
    except (
        ValueError,
        RuntimeError,
        OSError,
        TypeError,
        KeyError,
        ArgumentError,
        SystemExit,
    ) as error:
        raise ValueError(f"prompts.{name}: vLLM's dataset '{source.dataset}': {error}") from error
    return [str(sample.prompt) for sample in samples]
