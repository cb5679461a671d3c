#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Calibrates a pair of target and head, then serves it with the profile.
#
#     source .venv/bin/activate
#     examples/calibrate_then_serve.sh                   # the demo model; some minutes, then a server on port 8000
#     examples/calibrate_then_serve.sh MODEL HEAD mine.jsonl
#
# You see how well the head's probabilities are calibrated (log-loss on prompts that were held out) and what a step
# costs, then vLLM's log. The profile and the config are kept in ./calibrated. Nothing else should run meanwhile: the
# costs would be those of a busy machine. Serving needs no profile: with one, drafts are as good from the first
# request on as they would become anyway.
set -euo pipefail

model=${1:-$(heterospec demo-model | python -c 'import json, sys; print(json.load(sys.stdin)["target"])')}
head=${2:-builtin:smollm2-135m}
folder=calibrated
mkdir -p "$folder"

# Prompts like those you will serve; without a file the plugin's own are taken.
heterospec calibrate --target "$model" --head "$head" ${3:+--prompts "$3"} --output "$folder/profile.json"

# A relative `profile` is looked up beside the config.
cat >"$folder/heterospec.json" <<JSON
{"method": "heterospec", "model": "$head", "profile": "profile.json"}
JSON
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB, instead of most of the memory
exec vllm serve "$model" --max-model-len 2048 --speculative-config "$folder/heterospec.json"
