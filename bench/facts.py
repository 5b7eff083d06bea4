"""Where and with what a run was measured. No host names: results are published."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from functools import cache
from pathlib import Path

import torch

from .place import checkout

PACKAGES = ("triton", "transformers", "liger-kernel", "flash-attn", "quack-kernels", "megatron-core")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@cache
def versions() -> dict[str, str]:
    """Of this package, Python, and every peer that is installed."""
    import seqpar_kernels

    found = {"seqpar_kernels": seqpar_kernels.__version__, "python": platform.python_version()}
    found["torch"] = torch.__version__  # with what it was built for, which its package may not say
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


@cache
def cpu_name() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    name = re.sub(r"\(R\)|\(TM\)", "", name).strip()
    return f"{name}, {available_cores()} cores"


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def cache_bytes(device: str) -> int:
    """The last-level cache: what rotating buffers must exceed."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit])
    return max(sizes) or 32 * 2**20


def memory_budget(device: str) -> int:
    """Bytes that rotating buffers may take together."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] // 3
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (ValueError, OSError):
        return 2 * 2**30


@cache
def commit() -> str:
    """The checkout's commit, marked where tracked files differ from it; SEQPAR_COMMIT where that is set; else ""."""
    if os.environ.get("SEQPAR_COMMIT"):
        return os.environ["SEQPAR_COMMIT"]
    root = checkout()
    if root is None or not (root / ".git").exists():  # a repository around an unpacked sdist is not ours
        return ""

    def git(*args: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-c", "safe.directory=*", *args], cwd=root, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    return head + ("-modified" if head and git("status", "--porcelain", "--untracked-files=no") else "")


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
