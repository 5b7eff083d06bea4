"""The documentation: a short README, links that lead somewhere, a site that builds, every public name in it."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import seqpar_kernels

ROOT = Path(__file__).resolve().parents[1]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 800


def test_relative_links_lead_to_files() -> None:
    missing = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.relative_to(ROOT)}: {target}")
    assert not missing


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = set(re.findall(r"^::: (\S+)", pages, re.MULTILINE))
    wanted = {f"seqpar_kernels.{name}" for name in seqpar_kernels.__all__} - {"seqpar_kernels.nn"}
    assert wanted == listed


def described(function: object) -> list[str]:
    """Names of the ``Args`` of a docstring; one entry may describe several."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", inspect.getdoc(function) or "", re.MULTILINE)
    entries = re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*): ", section[1] if section else "", re.MULTILINE)
    return [name.lstrip("*") for entry in entries for name in entry.split(", ")]


def test_described_arguments_are_in_the_signature() -> None:
    wrong, seen = [], 0
    for name in seqpar_kernels.__all__:
        public = getattr(seqpar_kernels, name)
        if not callable(public):
            continue
        names = described(public)
        seen += len(names)
        wrong += [f"{name}: {got}" for got in names if got not in inspect.signature(public).parameters]
    assert not wrong
    assert seen > 100


def test_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "api" / "functions" / "index.html").exists()
