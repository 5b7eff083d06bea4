"""Prose that a machine can check: old terms, banned words, pointers to what does not exist, files that are too long."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "seqpar_kernels"
FOLDERS = ("seqpar_kernels", "bench", "csrc", "docs", "examples", "findings", "tests")
MOST_LINES = 500
CODE = (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh")

#: A term that is no longer used, as a pattern -> the one that is (CONTRIBUTING, Prose: one thing has one term).
OLD_TERMS = {
    r"\bwatch_of\b": "watchdog_of",
    r"\bseqpar-watch\b": "seqpar-watchdog",
    r"\bengine=.(collective|peer)\b": 'engine="p2p" or "symm_mem"',
}

#: Words of riddles and inversions, and words for persons where a rank, a caller or a module is meant.
BANNED = (
    r"\bwhom\b",
    r"\bamid\b",
    r"\b(has|have|had) to say\b",
    r"\bin vain\b",
    r"\bof one's own\b",
    r"\bdesign section\b",
    r"\bdesign\.md\b",
    r"\bREADME, [A-Z]",
)


def python_prose(text: str, messages: bool) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring and comment of a Python file, and of its messages if wanted."""
    for node in ast.walk(ast.parse(text)):
        if messages and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (docstring := ast.get_docstring(node)):
            yield node.body[0].lineno, docstring
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


@functools.cache
def prose(path: Path) -> tuple[tuple[int, str], ...]:
    """(line, text) of what a person reads in a file."""
    text = path.read_text()
    if path.suffix == ".py":
        return tuple(python_prose(text, messages="tests" not in path.parts))  # tests make up paths
    if path.name == "CONTRIBUTING.md":  # quotes what it bans
        text = re.sub(r"(?ms)^- Banned:.*?(?=^\S)", lambda match: "\n" * match[0].count("\n"), text)
    return tuple(enumerate(text.splitlines(), 1))


def files(*folders: str) -> list[Path]:
    found = [p for folder in folders for p in sorted((ROOT / folder).rglob("*")) if "__pycache__" not in p.parts]
    return [p for p in found if p.suffix in (".py", ".pyi", ".md", ".h", ".cpp", ".cu", ".cuh")]


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def hits(paths: list[Path], find: Callable[[str], Iterator[str]]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in paths
        for line, text in prose(path)
        for what in find(text)
    ]


@pytest.mark.parametrize("old", OLD_TERMS)
def test_old_terms_are_gone(old: str) -> None:
    paths = [*pages(), *files("seqpar_kernels", "bench", "csrc", "docs", "examples")]
    wrong = [str(p.relative_to(ROOT)) for p in paths if re.search(old, p.read_text())]
    assert not wrong, f"say {OLD_TERMS[old]}"


def test_banned_words() -> None:
    def find(text: str) -> Iterator[str]:
        for match in re.finditer("|".join(BANNED), text):
            yield match[0]

    assert not hits([*pages(), *files("seqpar_kernels", "bench", "csrc", "docs", "examples")], find)


def test_named_paths_exist() -> None:
    path = re.compile(r"(?<![\w./~-])(?:" + "|".join(FOLDERS) + r")/[\w./*-]*\w")

    def find(text: str) -> Iterator[str]:
        for match in path.finditer(text):
            if not any(ROOT.glob(match[0])):
                yield match[0]

    assert not hits([*pages(), *files(*FOLDERS)], find)


def modules() -> list[tuple[ModuleType, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if path.name != "__main__.py":
            found.append((importlib.import_module(name), path))
    return found


def resolves(target: str, module: ModuleType) -> bool:
    """Whether a role's target names something: from the module, its package, a class of the module, or the root."""
    package = module.__name__ if hasattr(module, "__path__") else module.__name__.rpartition(".")[0]
    while target.startswith(".."):
        target, package = target[1:], package.rpartition(".")[0]
    if target.startswith("."):
        return reached(package, target[1:].split("."))
    parts = target.split(".")
    classes = [value for value in vars(module).values() if inspect.isclass(value)]
    return (
        any(has(start, parts) for start in (module, *classes))
        or reached("seqpar_kernels", parts)
        or reached(parts[0], parts[1:])
    )


def reached(package: str, parts: list[str]) -> bool:
    try:
        found: Any = importlib.import_module(package)
    except ImportError:
        return False
    name = package
    for i, part in enumerate(parts):
        name = f"{name}.{part}"
        try:
            found = importlib.import_module(name)
        except ImportError:
            return has(found, parts[i:])
    return True


def has(found: Any, parts: list[str]) -> bool:
    for part in parts:
        fields = getattr(found, "__annotations__", {})
        if part in fields:
            return True
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def test_roles_name_what_exists() -> None:
    role = re.compile(r":(?:mod|func|class|meth|data|attr):`~?([\w.]+)`")
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {target}"
        for module, path in modules()
        for line, text in prose(path)
        for target in role.findall(text)
        if not resolves(target, module)
    ]
    assert not wrong


def test_no_file_is_too_long() -> None:
    sources = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in CODE]
    assert sources
    lengths = {path: len(path.read_text().splitlines()) for path in sources}
    assert not [f"{path.relative_to(ROOT)}: {n}" for path, n in lengths.items() if n > MOST_LINES]
