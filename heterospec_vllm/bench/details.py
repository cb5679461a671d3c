# SPDX-License-Identifier: Apache-2.0
"""What explains the ratios: counters, the split of a step, entropy, serving latencies, simulation, growth.

Pure frames for plots and tables, from the frames of `tables.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import gmean, spearmanr

from heterospec_vllm.bench.rows import Serving
from heterospec_vllm.bench.tables import MARGINAL, PLAIN, RUN, CellSummary, Frame, holding, timed
from heterospec_vllm.observe.counters import STEP_PARTS

PLACE = ["target", "temperature", "concurrency", "system"]

# Disjoint parts of a step from the spans of `heterospec step-table`, which lie inside each other: the parts named here
# are added up, and what lies inside another is taken off it. What no part names is vLLM's own.
GROWTH_PARTS: dict[str, tuple[str, ...]] = {
    "target forward": ("target forward", "-tree attention"),
    "tree attention": ("tree attention",),
    "trees in and out": ("match drafts", "tree layout", "walk", "compaction", "counters", "learn"),
    "head over true tokens": ("draft: true tokens",),
    "head, levels": ("draft: levels",),
    "choosing and cutting": ("draft", "-draft: true tokens", "-draft: levels"),
}
VLLM_PART = "vLLM's own work"


def step_counters(rows: Frame) -> Frame:
    """Sums over all rounds and prompt sets of a place (steady offline cells), turned into means.

    tokens_per_step: tokens a step and request; nodes: draft nodes a step and request. Both count steps without a draft:
    a request gets one token of the target a step, so its steps are its tokens less the accepted ones.
    batch_nodes: verified nodes a step of the whole batch; levels: head passes a drafting step; off: share of the time
    with speculation switched off; ms_PART: milliseconds a step. NaN where a system does not count it.
    """
    chosen = timed(rows)
    chosen = chosen[(chosen["mode"] == "offline") & (chosen["load"] == "steady")]
    records = []
    for place, part in chosen.groupby(PLACE, sort=False):
        kept = holding(part, "counters", dict)
        if len(kept):
            total = _total(kept["counters"])
            tokens = float(kept["num_tokens"].sum())
            records.append({**dict(zip(PLACE, place, strict=True)), **_means(total, tokens)})
    frame = pd.DataFrame(records, columns=[*PLACE, *_MEANS])
    return frame.astype(dict.fromkeys(_MEANS, float))


_MEANS = [
    *("tokens_per_step", "nodes", "batch_nodes", "levels", "off"),
    *(f"ms_{part}" for part in STEP_PARTS),
]


def _total(counters: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Numbers of the counters, summed; seconds by part as `seconds.PART`."""
    total: dict[str, float] = {}
    for one in counters:
        seconds = one.get("seconds") or {}
        flat = {**one, **{f"seconds.{part}": value for part, value in seconds.items()}}
        for name, value in flat.items():
            if isinstance(value, int | float):
                total[name] = total.get(name, 0.0) + value
    return total


def _means(total: Mapping[str, float], tokens: float) -> dict[str, float]:
    accepted = total.get("accepted_nodes", total.get("num_accepted_tokens", np.nan))
    nodes = total.get("verified_nodes", total.get("num_draft_tokens", np.nan))
    request_steps = tokens - accepted
    steps = total.get("steps", np.nan)
    seconds = {part: total.get(f"seconds.{part}", np.nan) for part in STEP_PARTS}
    return {
        "tokens_per_step": _over(tokens, request_steps),
        "nodes": _over(nodes, request_steps),
        "batch_nodes": _over(nodes, steps),
        "levels": _over(total.get("head_passes", np.nan), total.get("draft_steps", np.nan)),
        "off": _over(total.get("seconds_off", np.nan), sum(seconds.values())),
        **{f"ms_{part}": 1000 * _over(value, steps) for part, value in seconds.items()},
    }


def _over(value: float, count: float) -> float:
    return value / count if count > 0 else np.nan


def by_entropy(rows: Frame, prompts: Frame) -> Frame:
    """Speed-up over plain of each prompt decoded alone, with its entropy (nats a token) and half.

    A prompt's ratio is its median over rounds; entry i of `request_seconds` is the set's prompt with index i.
    """
    chosen = timed(rows)
    chosen = chosen[(chosen["concurrency"] == 1) & (chosen["mode"] == "offline")]
    chosen = holding(chosen, "request_seconds", list)
    key = ["target", "temperature", "prompt_set", "index"]
    if chosen.empty or prompts.empty:
        return pd.DataFrame(columns=[*key, "system", "ratio", "entropy", "high"])
    each = chosen[[*RUN, "cell", "system", *key[:3], "request_seconds"]]
    each = each.assign(index=[list(range(len(one))) for one in each["request_seconds"]])
    each = each.explode(["request_seconds", "index"])
    each = each.astype({"request_seconds": float, "index": int})
    plain = each[each["system"] == PLAIN].drop(columns="system")
    both = each[each["system"] != PLAIN].merge(
        plain, on=[*RUN, "cell", *key], suffixes=("", "_plain")
    )
    both["ratio"] = both["request_seconds_plain"] / both["request_seconds"]
    ratios = both.groupby([*key, "system"], sort=False)["ratio"].median().reset_index()
    known = prompts[["target", "prompt_set", "index", "entropy"]].astype({"index": int})
    found = ratios.merge(known, how="inner")
    # The same prompts for every system and temperature, so the split is over prompts, not over runs.
    distinct = found.drop_duplicates(["target", "prompt_set", "index"])
    middle = distinct.groupby("target")["entropy"].median()
    found["high"] = found["entropy"] > found["target"].map(middle)
    return found[[*key, "system", "ratio", "entropy", "high"]]


def entropy_halves(each: Frame) -> Frame:
    """Geometric mean of the speed-ups in each half: columns `low` and `high`, with the numbers of prompts."""
    groups = each.groupby(["target", "temperature", "system", "high"])["ratio"]
    means = groups.agg(gmean).unstack("high").rename(columns={False: "low", True: "high"})
    counts = groups.size().unstack("high").rename(columns={False: "num_low", True: "num_high"})
    return means.join(counts).reset_index()


def entropy_trend(each: Frame, system: str = MARGINAL) -> Frame:
    """Spearman's rank correlation of entropy and speed-up, by target and temperature."""
    records = []
    for (target, temperature), part in each[each["system"] == system].groupby(
        ["target", "temperature"]
    ):
        if len(part) > 2:
            found = spearmanr(part["entropy"], part["ratio"])
            records.append(
                {
                    "target": target,
                    "temperature": temperature,
                    "prompts": len(part),
                    "rho": float(found.statistic),
                    "p": float(found.pvalue),
                }
            )
    return pd.DataFrame(records, columns=["target", "temperature", "prompts", "rho", "p"])


def serving(rows: Frame, cells: Sequence[CellSummary]) -> Frame:
    """Medians over rounds of what `vllm bench serve` measured, by cell and system, with the ratio of E2EL."""
    chosen = holding(timed(rows), "serving", Serving)
    records = []
    for one in cells:
        for system in one.entries:
            of = chosen[(chosen["cell"] == one.cell) & (chosen["system"] == system)]["serving"]
            if not len(of):
                continue
            medians = pd.DataFrame([dict(s) for s in of]).astype(float).median()
            against = one.against(system, PLAIN)
            records.append(
                {
                    **dict(one.cell),
                    "system": system,
                    "cell": one.cell,
                    **medians,
                    "ratio": np.nan if against is None else against.ratio,
                }
            )
    return pd.DataFrame(records)


def same_name(policy: str) -> str:
    """The benchmark's name of a simulated policy: they differ in how a fixed tree is written."""
    return re.sub(
        r"^static (\d+) nodes, depth (\d+), top (\d+)$", r"static nodes=\1 depth=\2 top=\3", policy
    )


def simulated(result: Mapping[str, Mapping[str, Mapping[str, float]]], measured: Frame) -> Frame:
    """Simulated share of the oracle and ratio by batch and policy, beside the measured greedy ratio of each target.

    Replays take greedy requests by default, so only T=0 is set against them; `measured` is NaN where there is none.
    """
    frame = pd.DataFrame(
        [
            {
                "batch": int(batch),
                "policy": same_name(policy),
                "share": values["share_of_oracle"],
                "simulated": values["ratio_to_plain"],
            }
            for batch, policies in result.items()
            for policy, values in policies.items()
        ],
        columns=["batch", "policy", "share", "simulated"],
    )
    greedy = measured[(measured["temperature"] == 0) & measured["ratio"].notna()]
    greedy = pd.DataFrame(
        {
            "batch": greedy["concurrency"].astype(int),
            "policy": greedy["system"],
            "target": greedy["target"],
            "measured": greedy["ratio"].astype(float),
        }
    )
    return frame.merge(greedy, how="left", on=["batch", "policy"])


def growth_parts(growth: Frame) -> Frame:
    """Milliseconds of each disjoint part of a step; a row a point, a column a part."""
    records = []
    for spans, whole in zip(growth["spans_ms"], growth["ms_per_step"], strict=True):
        parts = {name: _part(spans, names) for name, names in GROWTH_PARTS.items()}
        # Medians of parts need not add up to the median step.
        records.append({**parts, VLLM_PART: max(0.0, whole - sum(parts.values()))})
    return pd.DataFrame(records, columns=[*GROWTH_PARTS, VLLM_PART], index=growth.index)


def _part(spans: Mapping[str, float], names: tuple[str, ...]) -> float:
    if names[0] not in spans and names[0] == "draft":
        return spans.get("draft: cut the tree", 0.0)
    total = 0.0
    for name in names:
        sign = -1.0 if name.startswith("-") else 1.0
        total += sign * spans.get(name.removeprefix("-"), 0.0)
    return max(0.0, total)
