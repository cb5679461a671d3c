# SPDX-License-Identifier: Apache-2.0
"""Prompt files: a JSON object a line, with `prompt` or `turns`."""

from pathlib import Path
from typing import Any

from heterospec_vllm import input_files

_ALLOWED = "a JSON object with `prompt`, a text, or `turns`, a list of texts"
_MAX_SHOWN = 80  # bytes of a refused line


def texts_of(path: Path) -> list[str]:
    """The prompts of a JSONL file in its order; of `turns`, the first.

    Raises ValueError for a file that is missing or empty and for a line that holds no prompt.
    """
    if not path.is_file():
        raise ValueError(
            f"prompts: found no file {path}, allowed: a JSONL file; a line is {_ALLOWED}"
        )
    # In bytes, because str.splitlines also splits at characters that JSON texts may hold.
    with path.open("rb") as lines:
        texts = [_text(path, number, line) for number, line in enumerate(lines, 1)]
    if not texts:
        raise ValueError(f"{path}: found no line, allowed: lines that each are {_ALLOWED}")
    return texts


def chat_token_ids(tokenizer: Any, texts: list[str], most: int) -> list[list[int]]:
    """User messages through the chat template (as they are where there is none), cut to ``most`` tokens."""
    if tokenizer.chat_template is None:
        ids = [tokenizer.encode(text) for text in texts]
    else:
        ids = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            for text in texts
        ]
    return [list(one)[:most] for one in ids]


def _text(path: Path, number: int, line: bytes) -> str:
    try:
        return text_of(input_files.parse(line))
    except ValueError:  # no JSON, no UTF-8, or no prompt
        shown = line.strip()[:_MAX_SHOWN].decode(errors="replace")
        raise ValueError(f"{path}, line {number}: found {shown!r}, allowed: {_ALLOWED}") from None


def text_of(row: Any) -> str:
    """`prompt`, else the first of `turns`; ValueError where neither is a text of some length."""
    if isinstance(row, dict):
        turns = row.get("turns")
        first_turn = turns[0] if isinstance(turns, list) and turns else None
        for text in (row.get("prompt"), first_turn):
            if isinstance(text, str) and text:
                return text
    raise ValueError(f"found {str(row)[:_MAX_SHOWN]}, allowed: {_ALLOWED}")


# Calibration's default: short requests of many kinds, ours.
BUILT_IN = (
    "Explain why the sky is blue to a child.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train travels 60 miles in 1.5 hours. What is its average speed?",
    "Summarise the plot of Romeo and Juliet in five sentences.",
    "Give three tips for staying healthy during the winter.",
    "What is the difference between a virus and a bacterium?",
    "Write a polite e-mail that asks a landlord to repair a leaking tap.",
    "Tom has 12 apples. He gives a third of them to Ann and eats two. How many are left?",
    "List the planets of the solar system in order of their distance from the sun.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "How do I reverse a linked list? Show the code and explain each step.",
    "Name five capitals in Africa and one fact about each.",
    "You are a ship's captain in 1750. Describe your day.",
    "What are the advantages and disadvantages of working from home?",
    "Write a SQL query that counts the orders of each customer in the last month.",
    "A shirt costs 40 dollars and is reduced by 15 percent. What is the new price?",
    "Translate into plain English: the party of the first part shall indemnify the other party.",
    "Who wrote Pride and Prejudice, and what is it about?",
    "Summarize: The town council met on Monday to discuss the new bridge. Members heard from "
    "engineers, who said that the old bridge could carry traffic for two more years at most. "
    "Shop owners on the river asked for the work to begin after the summer. The council decided "
    "to open bids in September and to start building in the spring.",
    "Write a haiku about the sea and explain its images.",
    "Explain recursion with an example in Python.",
    "If a rectangle is 8 cm long and 5 cm wide, what are its area and its perimeter?",
    "Give me a recipe for a simple vegetable soup.",
    "What should I consider when buying a used car?",
)
