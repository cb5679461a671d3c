# SPDX-License-Identifier: Apache-2.0
"""Settings that must be in place before any test imports vLLM or torch."""

import os

# No test may reach for a hub; every model is made here or comes from the demo model's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
