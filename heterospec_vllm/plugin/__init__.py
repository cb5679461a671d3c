# SPDX-License-Identifier: Apache-2.0
"""Entry point of vLLM's general plugins."""


def register() -> None:
    """Makes `--speculative-config` understand the method `heterospec`.

    vLLM calls it in every process, some of them more than once. Nothing changes for an engine
    without our config. An unsupported vLLM version is refused only where our config is used.
    """
    from heterospec_vllm.plugin import wraps

    wraps.apply_all()
