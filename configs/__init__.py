# SPDX-License-Identifier: Apache-2.0
"""Shipped configurations, found through importlib.resources."""
