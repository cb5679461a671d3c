# SPDX-License-Identifier: Apache-2.0
"""The policy that a config names, with what its profile and its costs say."""

from __future__ import annotations

from heterospec_vllm.config import HeteroSpecConfig
from heterospec_vllm.policy.base import DraftPolicy, FixedPolicy, PlainPolicy
from heterospec_vllm.policy.cost import StepCosts
from heterospec_vllm.policy.decisions import (
    tree_shape,
)
from heterospec_vllm.policy.marginal import MarginalPolicy
from heterospec_vllm.policy.paper import PaperPolicy
from heterospec_vllm.policy.profile import Profile
from heterospec_vllm.policy.strata import DEFAULT_STRATA
from heterospec_vllm.policy.survival import (
    SurvivalTables,
)


def _paper_edges(profile: Profile | None, depth: int) -> tuple[float, ...]:
    """Cut points for meta-paths of ``depth`` tokens: entropies add up, so those of another depth do not serve."""
    if profile is not None and profile.paper_depth == depth:
        return tuple(profile.paper_edges)
    strata = DEFAULT_STRATA if profile is None else profile.strata
    return tuple(strata.cuts(depth).tolist())


def make_policy(
    config: HeteroSpecConfig,
    limit: int,  # most draft nodes of a request that vLLM makes room for
    profile: Profile | None,
    costs: StepCosts | None,
) -> DraftPolicy:
    """The policy that a config names; ``marginal`` needs costs, ``paper`` takes the profile's strata if any."""
    name = config.policy
    shape = tree_shape(
        name, min(config.num_speculative_tokens, limit), config.max_depth, config.top_k
    )
    if name == "plain":
        return PlainPolicy(shape)
    if name == "paper":
        return PaperPolicy(
            shape,
            _paper_edges(profile, shape.max_depth),
            max_nodes=limit,
            first_index=config.paper_first_index,
            reading=config.meta_path,
        )
    if name == "marginal":
        assert costs is not None
        if profile is None:
            return MarginalPolicy(shape, costs)
        return MarginalPolicy(
            shape,
            costs,
            tables=SurvivalTables(prior=profile.survival_table, prior_weight=40.0),
            strata=profile.strata,
        )
    return FixedPolicy(shape)
