# SPDX-License-Identifier: Apache-2.0
"""What goes into `strata_mask` and what comes out; every tensor lies on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_NODES = 63  # draft nodes of a tree; with the root the width of the ancestor mask
MAX_POOL = 1024  # candidates of a request: one program holds them all
NO_ROW = -1


@dataclass(frozen=True)
class Candidates:
    """What a draft proposed for each request, in expansion order: a parent's column is lower than its children's."""

    # [num_reqs, pool_size] float32, nats, of the candidate given its parent; -inf or NaN: absent
    local_log_probs: torch.Tensor
    # [num_reqs, pool_size] float32, nats, of the distribution the candidate was drawn from: siblings share it
    entropies: torch.Tensor
    # [num_reqs, pool_size] int32, column of the parent, -1: child of the root
    parents: torch.Tensor
    # [num_reqs] int32, columns from here on are absent, whatever they hold
    num_candidates: torch.Tensor


@dataclass(frozen=True)
class StrataTables:
    """Learned tables as the kernel reads them; may be overwritten in place between steps."""

    # [num_edge_depths, num_edges] float32, rising, +inf padded; deeper paths use the last row
    edges: torch.Tensor
    # [num_knots] float32, log path probabilities, rising
    knots: torch.Tensor
    # [num_temperatures, num_depths, num_strata, num_knots] float32, >= 0, deeper nodes use the last depth;
    # None: a node survives with its path probability
    survival: torch.Tensor | None

    @classmethod
    def of(
        cls,
        edges: Sequence[Sequence[float]],
        knots: Sequence[float],
        # [num_temperatures, num_depths, num_strata, num_knots]
        survival: torch.Tensor | None,
        device: torch.device,
    ) -> StrataTables:
        """Rounds to float32 and pads edge lists of different length."""
        num_edges = max((len(cuts) for cuts in edges), default=0)
        padded = [[*cuts, *[torch.inf] * (num_edges - len(cuts))] for cuts in edges]
        return cls(
            torch.tensor(padded, dtype=torch.float32, device=device).view(len(edges), num_edges),
            torch.tensor(knots, dtype=torch.float32, device=device),
            None if survival is None else survival.to(device, torch.float32).contiguous(),
        )


@dataclass(frozen=True)
class Selection:
    """What each request allows; a node is selected if it passes both."""

    # [num_reqs] int32, index into the survival tables, 0 greedy, 1 sampled
    temperatures: torch.Tensor
    # [num_reqs] float32, least survival of a node; 0: every node that is not absent
    thresholds: torch.Tensor
    # [num_reqs] int32, most nodes, the best first; 0: none
    limits: torch.Tensor


@dataclass(frozen=True)
class StrataMask:
    """Scores of all candidates and the selected trees; the kernel writes every element.

    Rows of a tree are the root and then the selected nodes by falling survival, the lower column first among equals.
    That order is parents first and every prefix of it is a tree, so a later decision may lower `num_nodes` alone:
    parents, depths and masks of the rows that stay remain right.
    """

    # [num_reqs, pool_size] float32, nats, summed from the root; -inf where absent
    log_probs: torch.Tensor
    # [num_reqs, pool_size] float32, nats, summed along the path; 0 beyond num_candidates
    path_entropies: torch.Tensor
    # [num_reqs, pool_size] float32, never above the parent's; 0 where absent
    survivals: torch.Tensor
    # [num_reqs, pool_size] int32, 1 for the root's children; 0 beyond num_candidates
    depths: torch.Tensor
    # [num_reqs, pool_size] int32; 0 beyond num_candidates
    strata: torch.Tensor
    # [num_reqs] int32, selected
    num_nodes: torch.Tensor
    # [num_reqs, max_nodes] int32, the candidate's column, -1 beyond num_nodes
    columns: torch.Tensor
    # [num_reqs, max_nodes] float32, falling, 0 beyond num_nodes
    node_survivals: torch.Tensor
    # [num_reqs, max_nodes + 1] int32, row of the parent, -1 for the root and beyond num_nodes
    parents: torch.Tensor
    # [num_reqs, max_nodes + 1] int32, 0 for the root and beyond num_nodes
    row_depths: torch.Tensor
    # [num_reqs, max_nodes + 1] int64, bit j of row r: r sees row j; 0 beyond num_nodes
    ancestor_mask: torch.Tensor

    @classmethod
    def allocate(
        cls, num_reqs: int, pool_size: int, max_nodes: int, device: torch.device
    ) -> StrataMask:
        """Uninitialised buffers; keep them for CUDA graphs."""

        def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((num_reqs, width), dtype=dtype, device=device)

        rows = max_nodes + 1
        return cls(
            log_probs=empty(pool_size, torch.float32),
            path_entropies=empty(pool_size, torch.float32),
            survivals=empty(pool_size, torch.float32),
            depths=empty(pool_size, torch.int32),
            strata=empty(pool_size, torch.int32),
            num_nodes=torch.empty(num_reqs, dtype=torch.int32, device=device),
            columns=empty(max_nodes, torch.int32),
            node_survivals=empty(max_nodes, torch.float32),
            parents=empty(rows, torch.int32),
            row_depths=empty(rows, torch.int32),
            ancestor_mask=empty(rows, torch.int64),
        )


def check_arguments(
    candidates: Candidates,
    tables: StrataTables,
    selection: Selection,
    out: StrataMask,
    max_depth: int,
) -> None:
    """Shapes, dtypes, devices, strides and capacities; nothing that would read the device.

    Raises:
        ValueError: names the argument, what was found and what is allowed.
    """
    device = candidates.parents.device
    _require(candidates.parents.dim() == 2, "parents", candidates.parents.dim(), "two dimensions")
    num_reqs, pool_size = candidates.parents.shape
    _require(pool_size <= MAX_POOL, "parents.shape[1]", pool_size, f"0..{MAX_POOL}")
    max_nodes = out.columns.shape[-1]
    _require(1 <= max_nodes <= MAX_NODES, "out.columns.shape[1]", max_nodes, f"1..{MAX_NODES}")
    _require(1 <= max_depth <= MAX_NODES, "max_depth", max_depth, f"1..{MAX_NODES}")
    pool, per_req = (num_reqs, pool_size), (num_reqs,)
    nodes, rows = (num_reqs, max_nodes), (num_reqs, max_nodes + 1)
    for name, tensor, dtype, shape in (
        ("local_log_probs", candidates.local_log_probs, torch.float32, pool),
        ("entropies", candidates.entropies, torch.float32, pool),
        ("parents", candidates.parents, torch.int32, pool),
        ("num_candidates", candidates.num_candidates, torch.int32, per_req),
        ("temperatures", selection.temperatures, torch.int32, per_req),
        ("thresholds", selection.thresholds, torch.float32, per_req),
        ("limits", selection.limits, torch.int32, per_req),
        ("out.log_probs", out.log_probs, torch.float32, pool),
        ("out.path_entropies", out.path_entropies, torch.float32, pool),
        ("out.survivals", out.survivals, torch.float32, pool),
        ("out.depths", out.depths, torch.int32, pool),
        ("out.strata", out.strata, torch.int32, pool),
        ("out.num_nodes", out.num_nodes, torch.int32, per_req),
        ("out.columns", out.columns, torch.int32, nodes),
        ("out.node_survivals", out.node_survivals, torch.float32, nodes),
        ("out.parents", out.parents, torch.int32, rows),
        ("out.row_depths", out.row_depths, torch.int32, rows),
        ("out.ancestor_mask", out.ancestor_mask, torch.int64, rows),
    ):
        _require(tensor.dtype == dtype, f"{name}.dtype", tensor.dtype, dtype)
        _require(tuple(tensor.shape) == shape, f"{name}.shape", tuple(tensor.shape), shape)
        # Inputs may be columns of wider buffers; outputs are the caller's to keep dense.
        dense = tensor.dim() == 2 and tensor.stride(1) == 1 and not name.startswith("out.")
        _require(dense or tensor.is_contiguous(), f"{name}.stride()", tensor.stride(), "dense rows")
        _require(tensor.device == device, f"{name}.device", tensor.device, device)
    _check_tables(tables, device)


def _check_tables(tables: StrataTables, device: torch.device) -> None:
    _require(
        tables.edges.dim() == 2 and tables.edges.shape[0] >= 1,
        "edges.shape",
        tuple(tables.edges.shape),
        "at least one depth",
    )
    given = {"edges": tables.edges, "knots": tables.knots}
    if tables.survival is not None:
        given["survival"] = tables.survival
        shape, num_edges, num_knots = (
            tables.survival.shape,
            tables.edges.shape[1],
            tables.knots.numel(),
        )
        _require(
            len(shape) == 4 and shape[2] > num_edges and shape[3] == num_knots and num_knots >= 2,
            "survival.shape",
            tuple(shape),
            f"(temperatures, depths, more than {num_edges}, {max(num_knots, 2)})",
        )
    for name, tensor in given.items():
        _require(tensor.dtype == torch.float32, f"{name}.dtype", tensor.dtype, torch.float32)
        _require(tensor.is_contiguous(), f"{name}.stride()", tensor.stride(), "contiguous")
        _require(tensor.device == device, f"{name}.device", tensor.device, device)


def _require(holds: bool, name: str, found: object, allowed: object) -> None:
    if not holds:
        raise ValueError(f"strata_mask: {name} is {found}, allowed: {allowed}")
