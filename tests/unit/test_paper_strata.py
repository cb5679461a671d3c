# SPDX-License-Identifier: Apache-2.0
"""`paper` cuts the entropy of a meta-path where paths of that length were cut."""

from pathlib import Path

import pytest

from heterospec_vllm.config import HeteroSpecConfig
from heterospec_vllm.engine.make_policy import make_policy
from heterospec_vllm.policy.paper import PaperPolicy
from heterospec_vllm.policy.profile import load_profile
from heterospec_vllm.policy.strata import DEFAULT_STRATA

SHIPPED = Path(__file__).parents[2] / "configs" / "profiles" / "smollm2-135m.json"


def edges_of(depth: int, *, profile: bool = True) -> list[float]:
    config = HeteroSpecConfig(method="heterospec", model="head", policy="paper", max_depth=depth)
    policy = make_policy(config, 16, load_profile(SHIPPED) if profile else None, None)
    assert isinstance(policy, PaperPolicy)
    return policy.edges.tolist()


def test_the_depth_of_the_profile_has_its_own_edges() -> None:
    fitted = load_profile(SHIPPED)
    assert edges_of(fitted.paper_depth) == fitted.paper_edges


@pytest.mark.parametrize("depth", [1, 3, 16])
def test_other_depths_take_the_edges_of_that_depth(depth: int) -> None:
    fitted = load_profile(SHIPPED)
    assert depth != fitted.paper_depth
    assert edges_of(depth) == fitted.strata.cuts(depth).tolist() != fitted.paper_edges
    assert edges_of(depth, profile=False) == DEFAULT_STRATA.cuts(depth).tolist()
