# SPDX-License-Identifier: Apache-2.0
"""Path scores, strata, survivals, node selection and ancestor masks of draft trees, on the device (Triton).

Along the path root = v_0, v_1, ..., v_d = v of a candidate:

    log_prob(v) = sum_i local(v_i)          entropy(v) = sum_i H(v_i)
    stratum(v)  = number of edges of depth d below entropy(v)
    S(v)        = min over i of table[temperature, i, stratum(v_i)](log_prob(v_i)),  piecewise linear between the knots

and the tree is the `limit` best by S among those with S >= threshold and S > 0, the lower column first among equals.

One launch, one program per request, which holds its whole pool in registers: nothing has to pass between programs, and
between two launches the scores would only go through memory. Sums run level by level from the root, each candidate
taking its parent's last value, `max_depth` times; so they are the same float32 sums that level-by-level drafting makes
on the host. S never rises along a path and columns do, so falling order of (S, -column), one 64-bit key, puts parents
first and every prefix is a tree. No host read, no data-dependent shape; all results are written in place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .aot_registry import AotConfig
from .strata_mask_records import (
    MAX_NODES,
    MAX_POOL,
    NO_ROW,
    Candidates,
    Selection,
    StrataMask,
    StrataTables,
    check_arguments,
)

__all__ = ["MAX_NODES", "MAX_POOL", "Candidates", "Selection", "StrataMask", "StrataTables", "strata_mask"]  # fmt: skip

_NO_ROW = tl.constexpr(NO_ROW)


@triton.jit
def _parents_values(
    # [BLOCK]
    values,
    # [BLOCK] place of the parent, below BLOCK; < 0 at the root
    parents,
    root,
):
    """[BLOCK] what each place's parent holds, `root` at the root's children."""
    return tl.where(parents >= 0, tl.gather(values, tl.maximum(parents, 0), 0), root)


@triton.jit
def _strata(
    edges_ptr,
    # [BLOCK_POOL]
    depths,
    entropies,
    listed,
    NUM_EDGE_DEPTHS: tl.constexpr,
    NUM_EDGES: tl.constexpr,
):
    """[BLOCK_POOL] int32, edges below each entropy; a NaN is above all."""
    strata = tl.zeros_like(depths)
    row = (tl.minimum(depths, NUM_EDGE_DEPTHS) - 1) * NUM_EDGES
    for edge in range(NUM_EDGES):
        cut = tl.load(edges_ptr + row + edge, mask=listed, other=0.0)
        strata += tl.where(entropies <= cut, 0, 1)
    return strata


@triton.jit
def _survival(
    knots_ptr,
    survival_ptr,
    temperature,
    # [BLOCK_POOL]
    depths,
    strata,
    log_probs,
    present,
    NUM_DEPTHS: tl.constexpr,
    NUM_STRATA: tl.constexpr,
    NUM_KNOTS: tl.constexpr,
):
    """[BLOCK_POOL] interpolated between the knots, before it is held below the parent's."""
    lowest = tl.load(knots_ptr)
    highest = tl.load(knots_ptr + NUM_KNOTS - 1)
    x = tl.minimum(tl.maximum(log_probs, lowest), highest)
    low = tl.zeros_like(depths)
    for knot in range(1, NUM_KNOTS - 1):
        low += tl.where(tl.load(knots_ptr + knot) <= x, 1, 0)
    left = tl.load(knots_ptr + low, mask=present, other=0.0)
    right = tl.load(knots_ptr + low + 1, mask=present, other=1.0)
    cell = (temperature * NUM_DEPTHS + tl.minimum(depths, NUM_DEPTHS) - 1) * NUM_STRATA
    at = (cell + tl.minimum(strata, NUM_STRATA - 1)) * NUM_KNOTS + low
    below = tl.load(survival_ptr + at, mask=present, other=0.0)
    above = tl.load(survival_ptr + at + 1, mask=present, other=0.0)
    return below + (x - left) / (right - left) * (above - below)


@triton.jit
def _best(
    # [BLOCK_POOL] float32, >= 0
    survivals,
    BLOCK_POOL: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
):
    """[BLOCK_NODES] int64, the best first: survival's bits from the top down, then the column."""
    bits = survivals.to(tl.int32, bitcast=True)
    keys = ((0x7FFFFFFF - bits).to(tl.int64) << 32) | tl.arange(0, BLOCK_POOL).to(tl.int64)
    rows = tl.reshape(tl.sort(keys), [BLOCK_POOL // BLOCK_NODES, BLOCK_NODES])
    first = tl.arange(0, BLOCK_POOL // BLOCK_NODES)[:, None] == 0
    return tl.sum(tl.where(first, rows, 0), axis=0)


@triton.jit
def _strata_mask_kernel(
    # [num_reqs, pool_size]
    local_log_probs_ptr,
    # [num_reqs, pool_size]
    entropies_ptr,
    # [num_reqs, pool_size]
    parents_ptr,
    # [num_reqs]
    num_candidates_ptr,
    # [NUM_EDGE_DEPTHS, NUM_EDGES]
    edges_ptr,
    # [NUM_KNOTS]
    knots_ptr,
    # [num_temperatures, NUM_DEPTHS, NUM_STRATA, NUM_KNOTS]
    survival_ptr,
    # [num_reqs]
    temperatures_ptr,
    # [num_reqs]
    thresholds_ptr,
    # [num_reqs]
    limits_ptr,
    # [num_reqs, pool_size], written, likewise the next four
    out_log_probs_ptr,
    out_entropies_ptr,
    out_survivals_ptr,
    out_depths_ptr,
    out_strata_ptr,
    # [num_reqs], written
    num_nodes_ptr,
    # [num_reqs, max_nodes], written, likewise the next
    columns_ptr,
    node_survivals_ptr,
    # [num_reqs, max_nodes + 1], written, likewise the next two
    out_parents_ptr,
    row_depths_ptr,
    ancestor_mask_ptr,
    log_probs_stride,
    entropies_stride,
    parents_stride,
    pool_size,
    max_nodes,
    max_depth,
    NUM_EDGE_DEPTHS: tl.constexpr,
    NUM_EDGES: tl.constexpr,
    NUM_DEPTHS: tl.constexpr,
    NUM_STRATA: tl.constexpr,
    NUM_KNOTS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    BLOCK_POOL: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
):
    """Grid (num_reqs,)."""
    req = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_POOL)
    listed = column < tl.minimum(tl.load(num_candidates_ptr + req), pool_size)
    local = tl.load(local_log_probs_ptr + req * log_probs_stride + column, mask=listed, other=0.0)
    entropy = tl.load(entropies_ptr + req * entropies_stride + column, mask=listed, other=0.0)
    parents_ptr += req * parents_stride
    parents = tl.load(parents_ptr + column, mask=listed, other=_NO_ROW)
    parents = tl.minimum(parents, BLOCK_POOL - 1)
    log_probs, entropies, depths = local, entropy, tl.where(listed, 1, 0)
    # One round more than there are levels tells those that lie deeper: their depth comes out too high.
    for _ in range(max_depth):
        log_probs = _parents_values(log_probs, parents, 0.0) + local
        entropies = _parents_values(entropies, parents, 0.0) + entropy
        depths = tl.where(listed, _parents_values(depths, parents, 0) + 1, 0)
    listed = listed & (depths <= max_depth)
    depths = tl.where(listed, depths, 0)
    strata = _strata(edges_ptr, depths, entropies, listed, NUM_EDGE_DEPTHS, NUM_EDGES)
    present = listed & (log_probs > float("-inf"))
    if HAS_TABLE:
        temperature = tl.load(temperatures_ptr + req)
        own = _survival(
            knots_ptr, survival_ptr, temperature, depths, strata, log_probs, present,
            NUM_DEPTHS, NUM_STRATA, NUM_KNOTS,
        )  # fmt: skip
    else:
        own = tl.exp(log_probs)
    own = tl.where(present, own, 0.0)
    survivals = own
    for _ in range(max_depth - 1):
        survivals = tl.minimum(own, _parents_values(survivals, parents, 1.0))
    at, inside = req * pool_size + column, column < pool_size
    tl.store(out_log_probs_ptr + at, tl.where(listed, log_probs, float("-inf")), mask=inside)
    tl.store(out_entropies_ptr + at, tl.where(listed, entropies, 0.0), mask=inside)
    tl.store(out_survivals_ptr + at, survivals, mask=inside)
    tl.store(out_depths_ptr + at, depths, mask=inside)
    tl.store(out_strata_ptr + at, tl.where(listed, strata, 0), mask=inside)
    keys = _best(survivals, BLOCK_POOL, BLOCK_NODES)
    node = tl.arange(0, BLOCK_NODES)
    best = (0x7FFFFFFF - (keys >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    kept = (best > 0.0) & (best >= tl.load(thresholds_ptr + req))
    kept = kept & (node < tl.minimum(tl.load(limits_ptr + req), max_nodes))
    columns = tl.where(kept, (keys & 0x7FFFFFFF).to(tl.int32), _NO_ROW)
    tl.store(num_nodes_ptr + req, tl.sum(kept.to(tl.int32), axis=0))
    at, inside = req * max_nodes + node, node < max_nodes
    tl.store(columns_ptr + at, columns, mask=inside)
    tl.store(node_survivals_ptr + at, tl.where(kept, best, 0.0), mask=inside)
    above = tl.load(parents_ptr + columns, mask=kept, other=_NO_ROW)
    _store_trees(
        out_parents_ptr, row_depths_ptr, ancestor_mask_ptr, req * (max_nodes + 1),
        columns, above, kept, inside, max_depth, BLOCK_NODES,
    )  # fmt: skip


@triton.jit
def _store_trees(
    parents_ptr,
    depths_ptr,
    ancestor_mask_ptr,
    # offset of the request's root row
    root,
    # [BLOCK_NODES] column of each node, -1 where none is kept
    columns,
    # [BLOCK_NODES] column of its parent, -1: the root
    above,
    kept,
    # [BLOCK_NODES] whether the outputs have that node
    inside,
    max_depth,
    BLOCK_NODES: tl.constexpr,
):
    """Writes the root's row and the rows of the nodes."""
    node = tl.arange(0, BLOCK_NODES)
    # Place of the parent among the nodes; none equals -1, the root.
    same = (above[:, None] == columns[None, :]) & (above >= 0)[:, None]
    parent = tl.max(tl.where(same, node[None, :], _NO_ROW), axis=1)
    own = tl.full([BLOCK_NODES], 2, tl.int64) << node.to(tl.int64)
    masks, depths = own, node * 0
    for _ in range(max_depth):
        masks = own | _parents_values(masks, parent, 1)
        depths = _parents_values(depths, parent, 0) + 1
    at = root + 1 + node
    tl.store(parents_ptr + at, tl.where(kept, parent + 1, _NO_ROW), mask=inside)
    tl.store(depths_ptr + at, tl.where(kept, depths, 0), mask=inside)
    tl.store(ancestor_mask_ptr + at, tl.where(kept, masks, 0), mask=inside)
    tl.store(parents_ptr + root, _NO_ROW)
    tl.store(depths_ptr + root, 0)
    tl.store(ancestor_mask_ptr + root, 1)


def strata_mask(
    candidates: Candidates,
    tables: StrataTables,
    selection: Selection,
    out: StrataMask,
    max_depth: int,
) -> StrataMask:
    """Scores a ragged batch of candidates and selects each request's tree; returns `out`, filled.

    One launch. The contents of the tensors are not read on the host. A request without candidates, or with limit 0,
    gets the root alone. Padded requests of a captured graph have `num_candidates` 0.

    Args:
        max_depth: most levels of the draft, 1..63; deeper candidates count as absent.

    Raises:
        ValueError: names the argument, what was found and what is allowed.
    """
    check_arguments(candidates, tables, selection, out, max_depth)
    num_reqs, pool_size = candidates.parents.shape
    if not num_reqs:
        return out
    max_nodes = out.columns.shape[1]
    table = tables.knots if tables.survival is None else tables.survival
    sizes = (1, 1, 1, 1) if tables.survival is None else tables.survival.shape
    block_nodes = max(triton.next_power_of_2(max_nodes), 2)
    _strata_mask_kernel[(num_reqs,)](
        candidates.local_log_probs,
        candidates.entropies,
        candidates.parents,
        candidates.num_candidates,
        tables.edges,
        tables.knots,
        table,
        selection.temperatures,
        selection.thresholds,
        selection.limits,
        out.log_probs,
        out.path_entropies,
        out.survivals,
        out.depths,
        out.strata,
        out.num_nodes,
        out.columns,
        out.node_survivals,
        out.parents,
        out.row_depths,
        out.ancestor_mask,
        candidates.local_log_probs.stride(0),
        candidates.entropies.stride(0),
        candidates.parents.stride(0),
        pool_size,
        max_nodes,
        max_depth,
        NUM_EDGE_DEPTHS=tables.edges.shape[0],
        NUM_EDGES=tables.edges.shape[1],
        NUM_DEPTHS=sizes[1],
        NUM_STRATA=sizes[2],
        NUM_KNOTS=sizes[3],
        HAS_TABLE=tables.survival is not None,
        BLOCK_POOL=max(triton.next_power_of_2(max(pool_size, 1)), block_nodes),
        BLOCK_NODES=block_nodes,
        num_warps=_num_warps(block_nodes),
    )
    return out


def _num_warps(block_nodes: int) -> int:
    """Enough threads for the [BLOCK_NODES, BLOCK_NODES] comparison of nodes without spills."""
    return 8 if block_nodes > 32 else 4


_POINTERS = {
    "local_log_probs": "fp32", "entropies": "fp32", "parents": "i32", "num_candidates": "i32",
    "edges": "fp32", "knots": "fp32", "survival": "fp32", "temperatures": "i32",
    "thresholds": "fp32", "limits": "i32", "out_log_probs": "fp32", "out_entropies": "fp32",
    "out_survivals": "fp32", "out_depths": "i32", "out_strata": "i32", "num_nodes": "i32",
    "columns": "i32", "node_survivals": "fp32", "out_parents": "i32", "row_depths": "i32",
    "ancestor_mask": "i64",
}  # fmt: skip
_INTEGERS = (
    "log_probs_stride",
    "entropies_stride",
    "parents_stride",
    "pool_size",
    "max_nodes",
    "max_depth",
)
AOT_CONFIGS = tuple(
    AotConfig(
        _strata_mask_kernel,
        f"pool{pool}_nodes{nodes}_{'table' if has_table else 'probability'}",
        {f"{name}_ptr": f"*{kind}:16" for name, kind in _POINTERS.items()}
        | dict.fromkeys(_INTEGERS, "i32"),
        {
            "NUM_EDGE_DEPTHS": 8, "NUM_EDGES": 7, "NUM_DEPTHS": 8, "NUM_STRATA": 8,
            "NUM_KNOTS": 15, "HAS_TABLE": has_table, "BLOCK_POOL": pool, "BLOCK_NODES": nodes,
        },
        num_warps=_num_warps(nodes),
    )
    for pool, nodes, has_table in ((128, 16, True), (1024, 64, True), (512, 64, False))
)  # fmt: skip
