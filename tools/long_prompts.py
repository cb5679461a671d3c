# SPDX-License-Identifier: Apache-2.0
"""Long prompts for `heterospec train-head`, made of passages that the training prompts contain.

A draft head that never saw a long prompt drafts badly behind one. Prompts that ask a question about
a passage are taken apart; passages are joined up to a wanted length and put behind a request for a
summary. Nothing but the given file is read.

    python tools/long_prompts.py prompts.jsonl long.jsonl --count 700
"""

import argparse
import json
import random
from pathlib import Path

REQUESTS = (
    "Summarize: ",
    "Summarize: ",
    "Summarize: ",
    "Summarize the following text:\n\n",
    "Give a short summary of this article.\n\n",
    "TL;DR of the text below.\n\n",
)
LENGTHS = (800, 1500, 2000, 2500, 3000, 3500, 4000)  # characters
SHORTEST_PASSAGE = 450


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="JSONL with `id` and `prompt`")
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=700)
    parser.add_argument("--seed", type=int, default=5)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with arguments.prompts.open() as lines:  # str.splitlines would also split inside texts
        found = [passage(json.loads(line).get("prompt", "")) for line in lines]
    passages = [text for text in found if text]
    if not passages:
        parser.error(f"{arguments.prompts} holds no prompt with a passage after its first line")
    with arguments.output.open("w") as file:
        for number in range(arguments.count):
            wanted, text = rng.choice(LENGTHS), ""
            while len(text) < wanted:
                text += ("\n\n" if text else "") + rng.choice(passages)
            prompt = rng.choice(REQUESTS) + text[: wanted + 400]
            file.write(json.dumps({"id": f"long/{number}", "prompt": prompt}) + "\n")


def passage(prompt: str) -> str:
    """What follows the first line of a prompt, if it is long; otherwise an empty text."""
    _, _, rest = prompt.partition("\n")
    return rest.strip() if len(rest) > SHORTEST_PASSAGE else ""


if __name__ == "__main__":
    main()
