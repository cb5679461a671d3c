# SPDX-License-Identifier: Apache-2.0
"""How long to wait before a timed run, so that one system's rest does not slow the next."""

# An idle engine's threads spin for about a second after its last step.
PAUSE_SECONDS = 1.5
