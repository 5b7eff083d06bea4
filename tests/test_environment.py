"""Bad values of variables and of cached files: named in one clear error, or passed over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seqpar_kernels import environment
from seqpar_kernels.overlap import machine_profile_cache
from seqpar_kernels.overlap.machine_profile import default_profile


@pytest.mark.parametrize(
    ("text", "found"), [("", False), ("0", False), ("off", False), ("1", True), ("True", True), ("yes", True)]
)
def test_a_flag(monkeypatch: pytest.MonkeyPatch, text: str, found: bool) -> None:
    monkeypatch.setenv("SEQPAR_STRICT", text)
    assert environment.flag("SEQPAR_STRICT") is found


@pytest.mark.parametrize("text", ["2", "ja", "none", "-1"])
def test_a_flag_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SEQPAR_DEBUG", text)
    with pytest.raises(ValueError, match=f"SEQPAR_DEBUG: expected 1 or 0 .*, got '{text}'"):
        environment.flag("SEQPAR_DEBUG")


@pytest.mark.parametrize("text", ["0", "-1", "1G", "1e9", "1.5", "9" * 400, "9" * 5000, "\u0661"])
def test_a_number_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SEQPAR_MAX_WORKSPACE_BYTES", text)
    with pytest.raises(ValueError, match="SEQPAR_MAX_WORKSPACE_BYTES: expected a positive number of bytes, got "):
        environment.positive_int("SEQPAR_MAX_WORKSPACE_BYTES", "bytes")


def test_an_empty_number_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQPAR_MAX_WORKSPACE_BYTES", " ")
    assert environment.positive_int("SEQPAR_MAX_WORKSPACE_BYTES", "bytes") is None


CALL = "import torch, seqpar_kernels as sp; print(sp.dropout_add_rms_norm(torch.ones(2, 4), None, None).shape)"


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("SEQPAR_CPU_ISA", "sse", "SEQPAR_CPU_ISA=sse is not one of"),
        ("SEQPAR_CPU_ISA", "", ""),
        ("SEQPAR_MAX_WORKSPACE_BYTES", "", ""),
        ("SEQPAR_PEER", "maybe", "SEQPAR_PEER: expected 1 or 0"),
    ],
)
def test_as_a_user_sees_it(name: str, text: str, error: str) -> None:
    run = [sys.executable, "-c", CALL]
    done = subprocess.run(run, env={**os.environ, name: text}, capture_output=True, text=True)
    if error:
        assert done.returncode and error in done.stderr.splitlines()[-1], done.stderr
    else:
        assert done.stdout == "torch.Size([2, 4])\n", done.stderr


@pytest.mark.parametrize("value", ["1" + 400 * "0", "1" + 5000 * "0", "-1", "NaN", "1e999", '"2"', "true", "[" * 10**5])
def test_a_profile_file_with_numbers_no_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = machine_profile_cache.Place.here("cpu", "gloo", 2, True)
    machine_profile_cache.save(place, default_profile("cpu", True)._replace(link_bytes=123456.0))
    assert machine_profile_cache.load(place)[0] is not None
    text = place.file.read_text()
    assert text.count("123456.0") == 1
    place.file.write_text(text.replace("123456.0", value))
    found, reason = machine_profile_cache.load(place)
    assert found is None and "damaged" in reason and len(reason) < 500


def test_a_large_int_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = machine_profile_cache.Place.here("cpu", "gloo", 2, True)
    machine_profile_cache.save(place, default_profile("cpu", True))
    kept = json.loads(place.file.read_text())
    kept["profile"]["link_bytes"] = 10**12
    place.file.write_text(json.dumps(kept))
    found, _ = machine_profile_cache.load(place)
    assert found is not None and found.link_bytes == 1e12
