# SPDX-License-Identifier: Apache-2.0
"""Why requests decode plainly: one declaration for the engine, the log, the metric and the page."""

# Every reason for which a request decodes plainly; docs/configuration.md lists them in these words.
REASONS = {
    "pooling": "it asks for an embedding, a class or a score, and decodes nothing",
    "prompt_embeds": "its prompt is embeddings, and a draft head reads tokens",
    "multimodal": "its prompt has images, audio or video, and a draft head reads tokens",
    "switched_off": "it asks for `heterospec: off`",
    "grammar": "its grammar could not be followed in the worker",
    "structured_output": "it has a grammar, on a GPU or under a scheduler class of the user's",
    "penalties": "it has penalties, on a GPU",
    "bad_words": "it has bad words, on a GPU",
    "thinking_token_budget": "it has a thinking budget, on a GPU",
    "min_tokens": "it has not reached its minimum length yet, on a GPU",
}
# What the walk on GPUs does not apply to a tree's rows yet.
UNSUPPORTED_ON_GPU = frozenset(
    {"structured_output", "penalties", "bad_words", "thinking_token_budget", "min_tokens"}
)
