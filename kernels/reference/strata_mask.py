# SPDX-License-Identifier: Apache-2.0
"""The truth that the Triton `strata_mask` is tested against: plain PyTorch, one column after the other."""

from __future__ import annotations

import torch

from ..gpu.strata_mask_records import NO_ROW, Candidates, Selection, StrataMask, StrataTables


def strata_mask_reference(
    candidates: Candidates,
    tables: StrataTables,
    selection: Selection,
    out: StrataMask,
    max_depth: int,
) -> None:
    """What `strata_mask` computes (same arguments)."""
    score_reference(candidates, tables, selection, out, max_depth)
    select_reference(candidates, selection, out)


def score_reference(
    candidates: Candidates,
    tables: StrataTables,
    selection: Selection,
    out: StrataMask,
    max_depth: int,
) -> None:
    """Fills the scores of all candidates; sums run from the root, in float32 like the kernel's."""
    depths = torch.zeros_like(out.depths)  # of the absent, too
    for column in range(candidates.parents.shape[1]):
        parent = torch.where(
            column < candidates.num_candidates, candidates.parents[:, column], NO_ROW
        )
        above, has_parent = parent.clamp(min=0).long()[:, None], parent >= 0

        def parents_of(values: torch.Tensor, root: float, above=above, has_parent=has_parent):
            return torch.where(has_parent, values.gather(1, above)[:, 0], root)

        depth = depths[:, column] = parents_of(depths, 0) + 1
        log_prob = parents_of(out.log_probs, 0) + candidates.local_log_probs[:, column]
        entropy = parents_of(out.path_entropies, 0) + candidates.entropies[:, column]
        cuts = tables.edges[depth.clamp(1, len(tables.edges)).long() - 1]
        stratum = (~(entropy[:, None] <= cuts)).sum(dim=1)
        own = _survival(tables, selection.temperatures, depth, stratum, log_prob)
        survival = torch.minimum(own, parents_of(out.survivals, 1))
        # Beyond the tables of this launch's depth a candidate counts as absent, like one that was never proposed.
        listed = (column < candidates.num_candidates) & (depth <= max_depth)
        out.depths[:, column] = torch.where(listed, depth, 0)
        out.log_probs[:, column] = torch.where(listed, log_prob, -torch.inf)
        out.path_entropies[:, column] = torch.where(listed, entropy, 0)
        out.strata[:, column] = torch.where(listed, stratum, 0)
        out.survivals[:, column] = torch.where(listed & (log_prob > -torch.inf), survival, 0)


def _survival(
    tables: StrataTables,
    # [num_reqs]
    temperatures: torch.Tensor,
    # [num_reqs]
    depth: torch.Tensor,
    # [num_reqs]
    stratum: torch.Tensor,
    # [num_reqs]
    log_prob: torch.Tensor,
) -> torch.Tensor:
    """[num_reqs] interpolated between the knots, before it is held below the parent's."""
    if tables.survival is None:
        return log_prob.exp()
    _, num_depths, num_strata, num_knots = tables.survival.shape
    x = log_prob.nan_to_num(nan=-torch.inf).clamp(tables.knots[0], tables.knots[-1])
    low = torch.searchsorted(tables.knots, x, right=True).sub(1).clamp(max=num_knots - 2)
    weight = (x - tables.knots[low]) / (tables.knots[low + 1] - tables.knots[low])
    cell = tables.survival[
        temperatures.long(),
        depth.clamp(1, num_depths).long() - 1,
        stratum.clamp(max=num_strata - 1),
    ]
    below = cell.gather(1, low[:, None])[:, 0]
    above = cell.gather(1, low[:, None] + 1)[:, 0]
    return below + weight * (above - below)


def select_reference(candidates: Candidates, selection: Selection, out: StrataMask) -> None:
    """Selects from the survivals in `out` and fills its trees."""
    for values, fill in (
        (out.columns, NO_ROW), (out.node_survivals, 0), (out.parents, NO_ROW),
        (out.row_depths, 0), (out.ancestor_mask, 0),
    ):  # fmt: skip
        values.fill_(fill)
    out.ancestor_mask[:, 0] = 1
    max_nodes = out.columns.shape[1]
    for req, survivals in enumerate(out.survivals.tolist()):
        threshold, limit = float(selection.thresholds[req]), int(selection.limits[req])
        order = sorted(range(len(survivals)), key=lambda column: -survivals[column])  # stable
        kept = [c for c in order if survivals[c] > 0 and survivals[c] >= threshold]
        kept = kept[: max(min(limit, max_nodes), 0)]
        out.num_nodes[req] = len(kept)
        row_of = {NO_ROW: 0} | {column: row for row, column in enumerate(kept, start=1)}
        masks = [1]
        for row, column in enumerate(kept, start=1):
            parent = row_of[int(candidates.parents[req, column])]
            masks.append(masks[parent] | 1 << row)
            out.columns[req, row - 1] = column
            out.node_survivals[req, row - 1] = survivals[column]
            out.parents[req, row] = parent
            out.row_depths[req, row] = out.row_depths[req, parent] + 1
            out.ancestor_mask[req, row] = masks[row] - (2**64 if masks[row] >= 2**63 else 0)
