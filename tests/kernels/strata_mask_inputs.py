# SPDX-License-Identifier: Apache-2.0
"""Inputs of the `strata_mask` tests: drafts, tables, poisoned buffers, and the comparison with the reference."""

import math
import random
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from heterospec_vllm.kernels.gpu.strata_mask import (
    Candidates,
    Selection,
    StrataMask,
    StrataTables,
    strata_mask,
)
from heterospec_vllm.kernels.reference.strata_mask import select_reference, strata_mask_reference

# Survivals are probabilities: two float32 values interpolated, with or without a fused multiply-add,
# or one exponential.
SURVIVAL_TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
NAN = math.nan
KNOTS = (-6.0, -3.0, -1.0, -0.25, 0.0)
EDGES = ((0.3, 0.9, 1.4), (0.8, 1.9), (1.0, 2.5, 4.0))
NUM_STRATA = 4


@dataclass(frozen=True)
class Draft:
    """One request's candidates."""

    parents: tuple[int, ...]  # column of each one's parent, -1: the root
    local: tuple[float, ...]
    entropies: tuple[float, ...]


def draft(parents: tuple[int, ...], seed: int = 0, local: tuple[float, ...] | None = None) -> Draft:
    rng = random.Random(seed)
    drawn = tuple(-rng.expovariate(1.0) for _ in parents)
    # Siblings share the entropy of the distribution they were drawn from.
    of_parent = {parent: rng.uniform(0, 1.5) for parent in (-1, *range(len(parents)))}
    return Draft(parents, drawn if local is None else local, tuple(of_parent[p] for p in parents))


def chain(num_nodes: int) -> tuple[int, ...]:
    return tuple(range(-1, num_nodes - 1))


def star(num_nodes: int) -> tuple[int, ...]:
    return (-1,) * num_nodes


def random_parents(num_nodes: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(-1, column) for column in range(num_nodes))


def eagle_parents(top_k: int, levels: int, seed: int = 0) -> tuple[int, ...]:
    """A beam: of each level's candidates `top_k` are expanded into `top_k` children each."""
    rng = random.Random(seed)
    parents = [-1] * top_k
    start = 0
    for _ in range(levels - 1):
        level = range(start, len(parents))
        start = len(parents)
        parents += [column for column in sorted(rng.sample(level, top_k)) for _ in range(top_k)]
    return tuple(parents)


def depth_of(one: Draft) -> int:
    depths: list[int] = []
    for parent in one.parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths, default=0)


@dataclass
class Inputs:
    candidates: Candidates
    tables: StrataTables
    selection: Selection
    max_nodes: int
    max_depth: int

    def poisoned(self) -> StrataMask:
        num_reqs, pool_size = self.candidates.parents.shape
        device = self.candidates.parents.device
        out = StrataMask.allocate(num_reqs, pool_size, self.max_nodes, device)
        for item in fields(out):
            values = getattr(out, item.name)
            values.fill_(NAN if values.is_floating_point() else -77)
        return out

    def arguments(self) -> tuple[Candidates, StrataTables, Selection]:
        return self.candidates, self.tables, self.selection

    def run(self) -> StrataMask:
        return strata_mask(*self.arguments(), self.poisoned(), self.max_depth)

    def expected(self) -> StrataMask:
        out = self.poisoned()
        strata_mask_reference(*self.arguments(), out, self.max_depth)
        return out

    def selected(self, scores: StrataMask) -> StrataMask:
        """The reference's selection from given scores."""
        out = replace(self.poisoned(), survivals=scores.survivals)
        select_reference(self.candidates, self.selection, out)
        return out


def survival_table(num_strata: int = NUM_STRATA, seed: int = 3) -> torch.Tensor:
    """[2, 3, num_strata, num_knots] rising along the path probability."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(2, 3, num_strata, len(KNOTS), generator=generator)
    return drawn.sort(dim=-1).values.clamp(1e-4, 0.995)


def build(
    device: torch.device,
    drafts: list[Draft],
    *,
    max_nodes: int = 63,
    max_depth: int | None = None,
    thresholds: list[float] | None = None,
    limits: list[int] | None = None,
    temperatures: list[int] | None = None,
    use_table: bool = True,
    spare: int = 2,
) -> Inputs:
    """The requests' candidates padded with poison to one width, `spare` columns wider than the largest."""
    num_reqs = len(drafts)
    pool_size = max((len(one.parents) for one in drafts), default=0) + spare

    def padded(name: str, fill: float, dtype: torch.dtype) -> torch.Tensor:
        rows = [getattr(one, name) for one in drafts]
        # Wider than the pool: rows are strided.
        wide = torch.full((num_reqs, pool_size + 3), fill, dtype=dtype)
        for req, row in enumerate(rows):
            wide[req, : len(row)] = torch.tensor(row, dtype=dtype)
        return wide.to(device)[:, :pool_size]

    def per_req(values: list[Any] | None, default: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([default] * num_reqs if values is None else values, dtype=dtype, device=device)  # fmt: skip

    return Inputs(
        candidates=Candidates(
            local_log_probs=padded("local", NAN, torch.float32),
            entropies=padded("entropies", NAN, torch.float32),
            parents=padded("parents", 2**30, torch.int32),
            num_candidates=per_req([len(one.parents) for one in drafts], 0, torch.int32),
        ),
        tables=StrataTables.of(EDGES, KNOTS, survival_table() if use_table else None, device),
        selection=Selection(
            temperatures=per_req(temperatures, 0, torch.int32),
            thresholds=per_req(thresholds, 0.0, torch.float32),
            limits=per_req(limits, 63, torch.int32),
        ),
        max_nodes=max_nodes,
        max_depth=max([1, *map(depth_of, drafts)]) if max_depth is None else max_depth,
    )


SCORES = ("log_probs", "path_entropies", "depths", "strata")
TREES = ("num_nodes", "columns", "node_survivals", "parents", "row_depths", "ancestor_mask")


def assert_matches(inputs: Inputs) -> StrataMask:
    """Scores are the reference's, bit for bit where nothing is interpolated; trees are those of the kernel's scores.

    Two survivals that differ by rounding alone may change places between two implementations, so the selection is
    compared on equal survivals.
    """
    got, expected = inputs.run(), inputs.expected()
    for name in SCORES:
        torch.testing.assert_close(
            getattr(got, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True, msg=name
        )
    torch.testing.assert_close(got.survivals, expected.survivals, **SURVIVAL_TOLERANCE)
    selected = inputs.selected(got)
    for name in TREES:
        assert torch.equal(getattr(got, name), getattr(selected, name)), name
    return got
