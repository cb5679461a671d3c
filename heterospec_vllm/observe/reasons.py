# SPDX-License-Identifier: Apache-2.0
"""Why requests decode plainly: one declaration for the engine, the log, the metric and the page."""

# Every reason for which a request decodes plainly; docs/configuration.md lists them in these words.
REASONS = {
    "pooling": "it asks for an embedding, a class or a score, and decodes nothing",
    "prompt_embeds": "its prompt is embeddings, and a draft head reads tokens",
    "multimodal": "its prompt has images, audio or video, and a draft head reads tokens",
    "switched_off": "it asks for `heterospec: off`",
    "grammar": "its grammar could not be followed in the worker",
    "structured_output": "it has a grammar, under a scheduler class of the user's",
}
