# SPDX-License-Identifier: Apache-2.0
"""Calibration profiles: the file and its faults, whom a profile fits, the policies that are made with one."""

import copy
import json
import platform
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_drafter import step_costs
from safetensors.numpy import save_file

from heterospec_vllm import machine
from heterospec_vllm.config import METHOD, ConfigSource, HeteroSpecConfig, parse
from heterospec_vllm.engine.make_policy import make_policy
from heterospec_vllm.machine import machine_name
from heterospec_vllm.policy import profile as profiles
from heterospec_vllm.policy.base import FixedPolicy, PlainPolicy
from heterospec_vllm.policy.marginal import MarginalPolicy
from heterospec_vllm.policy.paper import PaperPolicy
from heterospec_vllm.policy.profile import (
    Profile,
    fingerprint,
    load_profile,
    misfit_reason,
    shipped_profile,
)
from heterospec_vllm.policy.survival import PROFILE_SHAPE, NodeFeatures

SURVIVALS = np.round(np.broadcast_to(np.linspace(0.01, 0.9, PROFILE_SHAPE[-1]), PROFILE_SHAPE), 3)


def content(**changes: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "target": "name:target",
        "head": "name:head",
        "machine": "a machine",
        "edges": [[0.5, 1.0], [1.0, 2.0, 3.0]],
        "paper_depth": 6,
        "paper_edges": [2.0, 4.0, 7.0],
        "survivals": SURVIVALS.tolist(),
        "costs": step_costs().as_dict(),
        **changes,
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "profile.json"


# ---- the file


def test_a_profile_survives_the_file(file: Path) -> None:
    made = Profile.model_validate(content(created="today", versions={"vllm": "1"}))
    made.save(file)
    again = load_profile(file)
    assert again == made
    assert again.strata.edges == ((0.5, 1.0), (1.0, 2.0, 3.0))
    assert (again.survival_table == SURVIVALS).all()
    assert [path.name for path in file.parent.iterdir()] == [file.name], "no part is left behind"


def test_a_saved_profile_is_private_and_follows_no_link(file: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for planted in (file, file.with_name("profile.json.part")):
        planted.symlink_to(victim)
    Profile.model_validate(content()).save(file)
    assert victim.read_text() == "precious"
    assert stat.S_IMODE(file.lstat().st_mode) == 0o600 and load_profile(file).version == 1


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets what a dotted path leads to."""

    def apply(held: Any) -> None:
        *above, last = (int(key) if key.isdigit() else key for key in path.split("."))
        for key in above:
            held = held[key]
        held[last] = value

    return apply


def without(path: str) -> Callable[[dict[str, Any]], None]:
    def apply(held: Any) -> None:
        *above, last = path.split(".")
        for key in above:
            held = held[key]
        del held[last]

    return apply


VERIFY = step_costs().as_dict()["verify"]
NAN = float("nan")


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (without("paper_edges"), "found nothing for paper_edges"),
        (without("costs.level.knots"), "found nothing for costs.level.knots"),
        (without("version"), "found the profile version None"),
        (change("version", 2), "found the profile version 2 in .* allowed: 1"),
        (
            change("surprise", 1),
            "found the unknown key surprise in .*, allowed: version, target, head, machine, dtype,",
        ),
        (
            change("costs.verify.knot", 1),
            "found the unknown key costs.verify.knot in .*, allowed: knots, seconds$",
        ),
        (change("edges.1.0", NAN), "found nan for edges.1.0"),
        (change("survivals.0.0.0.0", NAN), "found nan for survivals.0.0.0.0"),
        (change("survivals.0.0.0.0", 1.5), "found 1.5 for survivals.0.0.0.0"),
        (change("survivals.0.0.0.0", "x"), "found 'x' for survivals.0.0.0.0"),
        (
            change("survivals", [[[[0.5]]]]),
            r"found the shape \[1, 1, 1, 1\] for survivals in .*, allowed: the shape \[2, 8, 8, 15\]$",
        ),
        (
            change("survivals.1", SURVIVALS[1].tolist()[:7]),
            r"found lists of unequal lengths for survivals in .*: the shape \[2, 8, 8, 15\]$",
        ),
        (change("edges.1", [1.0, 1.0]), "for edges.1 .*edges must rise"),
        (change("edges.0", [2.0, 1.0]), "for edges.0 .*edges must rise"),
        (change("paper_edges", [3.0, 2.0]), "for paper_edges .*edges must rise"),
        (change("paper_edges", list(range(8))), "for paper_edges .*at most 7 edges"),
        (change("edges", []), "for edges"),
        (change("costs.verify.seconds.3", 1e-9), "for costs.verify .*seconds must not fall"),
        (change("costs.verify.seconds.0", 0.0), "found 0.0 for costs.verify.seconds.0"),
        (change("costs.verify.seconds.0", NAN), "found nan for costs.verify.seconds.0"),
        (change("costs.verify.seconds", VERIFY["seconds"][:3]), "as many seconds as knots"),
        (change("costs.verify.knots.1", 1), "for costs.verify .*knots must rise"),
        (change("costs.request_seconds", -1.0), "found -1.0 for costs.request_seconds"),
        (change("target", ""), "found '' for target"),
        (change("version", True), "found the profile version True .* allowed: 1"),
        (change("version", 1.0), "found the profile version 1.0 "),
        (change("version", "1"), "found the profile version '1' "),
        (change("num_prompts", -1), "found -1 for num_prompts in .*: an integer from 0 to"),
        (change("num_prompts", 10**400), "found 1000.* for num_prompts"),
        (change("num_prompts", True), "found True for num_prompts"),
        (change("num_nodes", 5.0), "found 5.0 for num_nodes"),
        (change("paper_depth", 10**400), "for paper_depth in .*: an integer from 1 to 16"),
        (change("paper_depth", "6"), "found '6' for paper_depth"),
        (change("costs.verify.knots.3", 10**400), "for costs.verify.knots.3 in .*from 1 to"),
        (change("costs.verify.knots.0", True), "found True for costs.verify.knots.0"),
        (change("costs.verify.seconds.3", 1e308), r"found 1e\+308 for .*> 0 and <= 3600$"),
        (change("costs.level.seconds.0", "1"), "found '1' for costs.level.seconds.0"),
        (change("costs.request_seconds", "0"), "found '0' for costs.request_seconds"),
        (change("costs.context_seconds", 1e308), r"found 1e\+308 for costs.context_seconds"),
        (change("edges.0.0", "1"), "found '1' for edges.0.0 .*: a finite number$"),
        (change("edges.0.0", True), "found True for edges.0.0"),
        (change("survivals.0.0.0.0", True), "found True for survivals.0.0.0.0"),
        (change("machine", 5), "found 5 for machine"),
        (change("\ud800", 5), r"found the unknown key .ud800 in .*, allowed: version"),
        (change("a\nb", 5), r"found the unknown key a.nb in .*, allowed: version"),
        (change("k" * 2**20, 5), "found the unknown key kkk.*, allowed: version"),
    ],
)
def test_a_broken_profile_is_refused_by_name(
    fault: Callable[[dict[str, Any]], None], found: str, file: Path
) -> None:
    broken = copy.deepcopy(content())
    fault(broken)
    file.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=found) as raised:
        load_profile(file)
    message = str(raised.value)
    assert message.startswith("speculative_config.profile: found ")
    assert str(file) in message and ", allowed: " in message and "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "no readable file"),
        ("{", "invalid JSON"),
        ("[1]", r"\[1\] \(list\)"),
        (b"\xff\xfe\x00", "bytes that are not UTF-8"),
    ],
)
def test_an_unreadable_profile_is_refused(text: str | bytes | None, found: str, file: Path) -> None:
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"profile: found {found}.*{re.escape(str(file))}"):
        load_profile(file)


@pytest.mark.parametrize(
    "path", sorted(profiles.SHIPPED.glob("*.json")), ids=lambda path: path.stem
)
def test_every_shipped_profile_is_read(path: Path) -> None:
    assert load_profile(path).costs.verify.seconds


def test_what_calibrate_makes_is_read(file: Path) -> None:
    """Its numbers come from numpy."""
    costs = step_costs()
    made = Profile(
        **content(
            edges=[[np.float64(0.5), np.float64(1.0)]],
            paper_edges=list(np.array([2.0, 4.0])),
            costs={**costs.as_dict(), "request_seconds": 0, "context_seconds": 1e-9},
            num_prompts=28,
            held_out={"log_loss": float("nan"), "nodes": 49504.0},
        )
    )
    made.save(file)
    assert load_profile(file).paper_edges == [2.0, 4.0]


def test_the_config_finds_a_profile_beside_it_which_is_read_where_it_is_needed(file: Path) -> None:
    options = {"method": METHOD, "model": "org/head", "profile": file.name}
    Profile.model_validate(content()).save(file)
    config = parse(ConfigSource(options, file.with_name("heterospec.json")))
    assert config.profile == str(file)
    load_profile(file)
    file.unlink()
    with pytest.raises(ValueError, match="profile: found no readable file"):
        load_profile(file)


# ---- whom it fits


def weights(folder: Path, value: float, name: str = "model.safetensors") -> str:
    folder.mkdir(exist_ok=True)
    save_file({"w": np.full(1000, value, dtype=np.float32)}, folder / name)
    return str(folder)


def test_a_fingerprint_names_the_weights_not_the_place(tmp_path: Path) -> None:
    one = fingerprint(weights(tmp_path / "a", 1.0))
    assert one == fingerprint(weights(tmp_path / "b", 1.0))
    assert one != fingerprint(weights(tmp_path / "c", 2.0))
    assert re.fullmatch("sha256:[0-9a-f]{32}", one)
    (tmp_path / "a" / "config.json").write_text("{}")
    assert fingerprint(str(tmp_path / "a")) == one
    weights(tmp_path / "a", 1.0, "more.safetensors")
    assert fingerprint(str(tmp_path / "a")) != one


def test_a_model_that_is_not_here_goes_by_its_name(tmp_path: Path) -> None:
    assert fingerprint("nobody/has-this-model") == "name:nobody/has-this-model"
    (tmp_path / "empty").mkdir()
    assert fingerprint(str(tmp_path / "empty")) == f"name:{tmp_path / 'empty'}"


def test_old_style_weights_have_a_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"1234")
    assert fingerprint(str(tmp_path)).startswith("sha256:")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_no_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="^model: found no readable file .Is a directory.*allowed"):
        fingerprint(str(tmp_path))
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="^head: found no readable file .No such file"):
        fingerprint(str(tmp_path), "head")


def test_a_profile_of_another_pair_is_told(tmp_path: Path) -> None:
    target, head = weights(tmp_path / "target", 1.0), weights(tmp_path / "head", 2.0)
    other = weights(tmp_path / "other", 3.0)
    fit = Profile.model_validate(content(target=fingerprint(target), head=fingerprint(head)))
    assert misfit_reason(fit, target, head) is None
    for name, pair in (("target", (other, head)), ("head", (target, other))):
        reason = misfit_reason(fit, *pair)
        assert reason is not None and f"made for another {name}" in reason
        assert fingerprint(other) in reason and "heterospec calibrate" in reason


def test_a_shipped_profile_is_found_by_its_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "profiles"
    shipped.mkdir()
    monkeypatch.setattr(profiles, "SHIPPED", shipped)
    target, head = weights(tmp_path / "target", 1.0), weights(tmp_path / "head", 2.0)
    (shipped / "a-broken.json").write_text("{")
    Profile.model_validate(content()).save(shipped / "b-other.json")
    assert shipped_profile(target, head) is None
    fit = content(target=fingerprint(target), head=fingerprint(head))
    Profile.model_validate(fit).save(shipped / "c-ours.json")
    assert shipped_profile(target, head) == shipped / "c-ours.json"


def test_the_machine_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert re.fullmatch(r".+, 3 threads", machine_name())


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "model name : AMD EPYC\nflags : fpu avx2 avx512f avx512_bf16",
            "AMD EPYC with avx512_bf16",
        ),
        ("model name : AMD EPYC\nflags : fpu avx avx2 fma", "AMD EPYC with avx2"),
        (
            "cpu family : 26\nmodel : 2\nmodel name : AMD EPYC\nflags : fpu avx2",
            "AMD EPYC (family 26, model 2) with avx2",
        ),
        ("processor : 0\nFeatures : fp asimd", "ours with asimd"),
        ("model name : old\nflags : fpu sse2", "old"),
    ],
)
def test_machines_named_alike_differ_by_generation_and_instructions(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, name: str
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: cpuinfo)
    monkeypatch.setattr(platform, "processor", lambda: "ours")
    assert machine._processor() == name


def test_costs_belong_to_a_machine_and_a_dtype() -> None:
    profile = Profile.model_validate(content(machine="here", dtype="bfloat16"))
    assert profile.has_costs_of("here", "bfloat16")
    assert not profile.has_costs_of("there", "bfloat16")
    assert not profile.has_costs_of("here", "float32")
    assert not Profile.model_validate(content(machine="here")).has_costs_of("here", "bfloat16")


# ---- the policies made with it


def config(policy: str, **options: Any) -> HeteroSpecConfig:
    return HeteroSpecConfig(method="heterospec", model="head", policy=policy, **options)


@pytest.mark.parametrize(
    ("name", "kind", "num_nodes"),
    [
        ("plain", PlainPolicy, 12),
        ("chain", FixedPolicy, 6),
        ("static", FixedPolicy, 12),
        ("paper", PaperPolicy, 12),
        ("marginal", MarginalPolicy, 12),
    ],
)
def test_a_config_names_its_policy(name: str, kind: type, num_nodes: int) -> None:
    policy = make_policy(config(name), 12, None, step_costs())
    assert type(policy) is kind
    assert policy.shape.num_nodes == num_nodes, "no more than vLLM makes room for"
    assert policy.shape.top_k == (1 if name == "chain" else 8)


def test_paper_takes_its_options_and_the_profile_s_edges() -> None:
    fitted = Profile.model_validate(content())
    options = {"meta_path": "B", "paper_first_index": 1}
    policy = make_policy(config("paper", **options), 16, fitted, None)
    assert isinstance(policy, PaperPolicy)
    assert policy.reading == "B" and policy.first_index == 1
    assert policy.edges.tolist() == fitted.paper_edges
    policy = make_policy(config("paper"), 16, None, None)
    assert isinstance(policy, PaperPolicy) and policy.edges.size == 7


def test_marginal_starts_from_the_profile() -> None:
    fitted = Profile.model_validate(content())
    policy = make_policy(config("marginal"), 16, fitted, step_costs())
    assert isinstance(policy, MarginalPolicy)
    assert policy.strata == fitted.strata
    one = np.zeros(1, dtype=np.int64)
    found = policy.tables.predict(NodeFeatures(np.zeros(1), one + 1, one, one))
    assert found.tolist() == pytest.approx([0.9])
