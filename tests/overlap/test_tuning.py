"""MachineProfile: measured on real ranks, kept on disk, and whatever is wrong with a file told instead of raised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp
from seqpar_kernels.overlap import tuning
from seqpar_kernels.overlap.engines import plan
from seqpar_kernels.overlap.machine_profile import MachineProfile, default_profile
from seqpar_kernels.overlap.machine_profile_cache import Place, load, save
from seqpar_kernels.overlap.planner import Work
from seqpar_kernels.overlap.tuning import profile_of, tune

from ..world import World

HERE = Place.here("cpu", "gloo", 2)
PROFILE = default_profile("cpu")._replace(link_bytes=1e9, source="a test")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "seqpar_kernels"


def test_what_is_saved_is_loaded(cache: Path) -> None:
    assert load(HERE) == (None, "never tuned here")
    assert save(HERE, PROFILE) == str(HERE.file)
    assert HERE.file.parent == cache
    assert load(HERE) == (PROFILE, "")
    save(HERE, PROFILE._replace(link_bytes=2e9))
    found, _ = load(HERE)
    assert found is not None and found.link_bytes == 2e9
    assert os.listdir(cache) == [HERE.file.name]  # nothing half-written is left


@pytest.mark.parametrize(
    "change", [{"ranks": 4}, {"one_host": True}, {"backend": "nccl"}, {"torch": "1.0"}, {"threads": 99}]
)
def test_another_place_has_other_figures(cache: Path, change: dict[str, Any]) -> None:
    save(HERE, PROFILE)
    assert load(HERE._replace(**change)) == (None, "never tuned here")


def damaged() -> dict[str, tuple[str, str]]:
    good = {"place": HERE._asdict(), "profile": PROFILE._asdict()}
    return {
        "empty": ("", "damaged or unreadable"),
        "half": (json.dumps(good)[:80], "damaged or unreadable"),
        "binary": ("\udcff\udcfe", "damaged or unreadable"),
        "list": ("[1]", "expected an object with profile and place"),
        "no profile": (json.dumps({"place": good["place"]}), "expected an object with profile and place"),
        "other machine": (
            json.dumps({**good, "place": {**HERE._asdict(), "machine": "elsewhere"}}),
            "another machine or version",
        ),
        "missing": (json.dumps({**good, "profile": {"link_bytes": 1}}), "expected an object with"),
        "zero": (json.dumps({**good, "profile": {**PROFILE._asdict(), "link_bytes": 0}}), "link_bytes: expected"),
        "nan": (json.dumps({**good, "profile": {**PROFILE._asdict(), "flops_16": float("nan")}}), "flops_16: expected"),
        "text": (json.dumps({**good, "profile": {**PROFILE._asdict(), "flops_32": "fast"}}), "flops_32: expected"),
        "source": (json.dumps({**good, "profile": {**PROFILE._asdict(), "source": 1}}), "source: expected a text"),
    }


@pytest.mark.parametrize("what", damaged())
def test_a_bad_file_is_passed_over_with_the_reason(cache: Path, what: str) -> None:
    text, reason = damaged()[what]
    cache.mkdir()
    HERE.file.write_bytes(text.encode(errors="surrogateescape"))
    found, told = load(HERE)
    assert found is None and reason in told and str(HERE.file) in told


def test_a_folder_that_cannot_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert save(HERE, PROFILE).startswith("not kept: ")
    assert load(HERE)[0] is None


# --- on real ranks ---------------------------------------------------------------------------------------------------


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def in_cache_of(rank: int, folder: str) -> str:
    """Every rank has a home of its own, as on machines of its own."""
    os.environ["XDG_CACHE_HOME"] = os.path.join(folder, str(rank))
    return os.environ["XDG_CACHE_HOME"]


def tuned_case(folder: str) -> dict[str, Any]:
    rank, ranks = group().rank(), group().size()
    in_cache_of(rank, folder)
    try:
        first = dist.new_group(list(range(ranks)))
        arguments: Any = (torch.randn(1, 8, 8), torch.randn(8, 8), None, first, -2, None, "auto", None)
        untuned, operands = sp.functional.checked_all_gather_linear(*arguments)
        untuned(*operands)
        profile = tune(first)
        assert profile_of(first)["cpu"] == profile
        call, operands = sp.functional.checked_all_gather_linear(*arguments)
        call(*operands)
        assert call.plan.estimate != untuned.plan.estimate  # planned with the new profile
        again = profile_of(dist.new_group(list(range(ranks))))  # loaded from rank 0's file
        return {
            "profile": profile,
            "later": again["cpu"],
            "cuda": again["cuda"].source,
            "files": [str(p) for p in Path(folder, str(rank)).rglob("*.json")],
            "ran": call.plan,
        }
    finally:
        del os.environ["XDG_CACHE_HOME"]


def test_tuning_measures_keeps_and_agrees(world2: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = world2.run(tuned_case, folder)
    profile = first["profile"]
    assert profile == second["profile"] and first["ran"] == second["ran"]
    assert len(first["files"]) == 1 and not second["files"]
    assert "measured on" in profile.source and first["files"][0] in profile.source
    assert first["later"] == second["later"]
    assert first["later"][:-1] == profile[:-1]
    assert "unmeasured" in first["cuda"] and "never tuned here" in first["cuda"]
    assert all(value > 0 for value in profile[:-1])
    assert profile.flops_32 > profile.flops_64 / 4 and profile.link_bytes > 1e5


def one_host_case(interface: str) -> tuple[MachineProfile, MachineProfile]:
    """Before and after something has proved that the ranks share a host."""
    try:
        unknown = profile_of(dist.new_group(list(range(group().size()))))["cpu"]
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        return unknown, profile_of(dist.new_group(list(range(group().size()))))["cpu"]
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]


def test_ranks_of_one_host_plan_with_its_link(world2: World) -> None:
    """A matmul of 43 ms with 4 MiB, whatever the threads: worth cutting over 1 Gbit/s, not between processes."""
    (unknown, here), other = world2.run(one_host_case, "lo")
    assert (unknown, here) == other
    assert "assumed, 1 Gbit/s" in unknown.source and "processes of one host" in here.source
    job = Work(2, 1024, int(43e-3 * here.flops_32), 4 << 20, 4 << 20, torch.float32, 1)
    assert plan("auto", None, job, unknown).engine == "p2p"
    assert plan("auto", None, job, here).reason.startswith("below the size floor")


def foreign_case(folder: str) -> tuple[MachineProfile, bool]:
    """Only this rank's cache is good: rank 0 has a damaged one."""
    rank = group().rank()
    in_cache_of(rank, folder)
    try:
        place = Place.here("cpu", "gloo", group().size())
        if rank == 0:
            place.file.parent.mkdir(parents=True)
            place.file.write_text("{")
        else:
            save(place, PROFILE)
        g = dist.new_group(list(range(group().size())))
        y = sp.all_gather_linear(torch.ones(1, 2, 3), torch.ones(4, 3), group=g)
        return profile_of(g)["cpu"], bool((y == 3).all())
    finally:
        del os.environ["XDG_CACHE_HOME"]


def test_rank_0_decides_and_a_damaged_cache_is_no_error(world2: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (first, right), (second, also_right) = world2.run(foreign_case, folder)
    assert first == second and right and also_right
    assert first.source.startswith("defaults for cpu") and "is damaged" in first.source


def test_what_cannot_be_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"tune: torch.distributed has not been initialised"):
        tune()
    with pytest.raises(ValueError, match="group: expected a ProcessGroup"):
        tune("all")  # type: ignore[arg-type]
    ran = subprocess.run([sys.executable, "-m", "seqpar_kernels", "tune"], capture_output=True, text=True)
    assert ran.returncode and "start one process a rank: torchrun" in ran.stderr


def wrong_device() -> None:
    with pytest.raises(ValueError, match=r"device: expected one of \['cpu'"):
        tune(group(), device="meta")


def test_a_device_out_of_reach_is_named(world2: World) -> None:
    world2.run(wrong_device)


def late_case() -> str:
    """Rank 0 never comes."""
    from datetime import timedelta

    g = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    if group().rank() == 0:
        return ""
    with pytest.raises(RuntimeError, match="rank 0 did not reach its first op on this group within the time-out") as e:
        tuning.profile_of(g)
    return str(e.value)


def test_without_rank_0_there_is_no_plan(world2: World) -> None:
    assert "0:00:01" in world2.run(late_case)[1]


def command_case(folder: str) -> str | None:
    """What ``torchrun -m seqpar_kernels tune`` runs, on this group's ranks, in a group of its own."""
    from seqpar_kernels import __main__ as main

    in_cache_of(0, folder)
    rank = group().rank()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    initialise, destroy = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda: None  # type: ignore[assignment]
    try:
        return main.tune_ranks()
    finally:
        dist.init_process_group, dist.destroy_process_group = initialise, destroy
        for name in ("RANK", "LOCAL_RANK", "XDG_CACHE_HOME"):
            del os.environ[name]
        tuning._known.clear()


def test_the_command(world2: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = world2.run(command_case, folder)
    assert second is None and "link_bytes" in first and "measured on" in first
