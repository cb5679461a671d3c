# SPDX-License-Identifier: Apache-2.0
"""What vLLM decides about async scheduling with Model Runner V2: `python async_decision.py TARGET HEAD`, as JSON."""

import json
import sys

import interpreted

interpreted.prepare()


def decisions(target: str, head: str) -> dict[str, object]:
    """vLLM's version and, by engine, async scheduling in two configs built from the same arguments."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.version import __version__

    from heterospec_vllm.plugin import register, wraps

    register()
    interpreted.leave_async_scheduling(lambda config: True)
    found: dict[str, object] = {"version": __version__}

    def decide(name: str, method: str, **options: int) -> None:
        speculative = {"method": method, "model": head, **options}
        args = EngineArgs(model=target, speculative_config=speculative)
        built = [args.create_engine_config() for _ in range(2)]
        found[name] = [config.scheduler_config.async_scheduling for config in built]

    decide("eagle3", "eagle3", num_speculative_tokens=2)
    decide("ours", "heterospec")
    # vLLM 0.32 looks at this option on V2, too, 0.33 does not. Without it both decide as 0.33 does.
    told = wraps._eagle3_config
    wraps._eagle3_config = lambda config: {**told(config), "disable_padded_drafter_batch": False}
    decide("ours, padded", "heterospec")
    return found


if __name__ == "__main__":
    print("RESULT " + json.dumps(decisions(*sys.argv[1:])))
