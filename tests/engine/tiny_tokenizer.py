# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for the tiny target: one token a character, and the two that enclose a thought."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, EOS, THINK, END_THINK = "<s>", "</s>", "<think>", "</think>"
SPECIAL = [BOS, EOS, THINK, END_THINK]  # tokens 0 to 3; 0 and 1 as in the tiny target's config
CHARACTERS = 'abcdefghijklmnopqrstuvwxyz0123456789 .,:;-_"{}[]()/+*!?'
VOCAB = len(SPECIAL) + len(CHARACTERS)


def save_tokenizer(folder: Path) -> Path:
    """Beside a model's weights, where vLLM looks for it."""
    space = "\u0120"  # what byte-level tokenizers write for it
    tokens = [*SPECIAL, *CHARACTERS.replace(" ", space)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (THINK, END_THINK)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS
    ).save_pretrained(folder)
    return folder


def encode(text: str) -> list[int]:
    """Token ids of a text of `CHARACTERS`."""
    return [len(SPECIAL) + CHARACTERS.index(character) for character in text]
