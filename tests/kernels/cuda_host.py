"""Builds csrc/cuda for the CPU (tests/cuda_shim) and puts it where :mod:`seqpar_kernels.kernels.native` looks."""

import ctypes
import hashlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "tests/cuda_shim"
CUDA = ROOT / "csrc/cuda"
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
POISON = 0xFF  # every byte of what a kernel has to write: NaN in all floating-point formats
GUARD = 64  # bytes around it that must survive


def _sources() -> list[Path]:
    return [
        *sorted(CUDA.glob("*.cu")),
        *sorted(CUDA.glob("*.cpp")),
        *sorted(SHIM.glob("*.cpp")),
        ROOT / "csrc/bindings.cpp",
        ROOT / "csrc/bindings_attention.cpp",
    ]


def build() -> Path:
    """The extension module with the CUDA kernels compiled for the host; rebuilt when a source has changed."""
    import pybind11

    assert CXX is not None
    includes = [SHIM, ROOT / "csrc", CUDA, pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-DSEQPAR_WITH_CUDA",
        '-DSEQPAR_ARCHS="host"',
        "-Wno-unknown-pragmas",
    ]
    flags += [f"-I{path}" for path in includes]
    headers = [path for folder in (SHIM, CUDA, ROOT / "csrc") for path in sorted(folder.glob("*.*h"))]
    digest = hashlib.sha256(" ".join([CXX, *flags]).encode())
    for path in [*_sources(), *headers]:
        digest.update(path.read_bytes())
    folder = ROOT / "build/cuda_shim" / digest.hexdigest()[:16]
    module = folder / "_native.so"
    if module.exists():
        return module
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
    scratch.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        target = scratch / f"{source.name}.o"
        command = [CXX, *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, _sources()))
    subprocess.run([CXX, "-shared", *map(str, objects), "-o", str(scratch / "_native.so")], check=True)
    try:
        scratch.rename(folder)
    except OSError:  # another session was faster
        shutil.rmtree(scratch)
    return module


class HostCuda:
    """The host-run kernels and the device that the shim pretends to be."""

    def __init__(self) -> None:
        path = build()
        spec = importlib.util.spec_from_file_location("_native", path)
        assert spec is not None and spec.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.path = path
        self._library = ctypes.CDLL(str(path))

    def configure(self, multiprocessors: int = 4, major: int = 9, reverse: bool = False) -> None:
        self._library.shim_configure(multiprocessors, major, int(reverse))

    def forget_kernels(self) -> None:
        """None has run."""
        self._library.shim_forget_kernels()

    def kernels_run(self) -> set[int]:
        """Which template instances have run since they were forgotten: addresses within the module."""
        addresses = (ctypes.c_uint64 * 1024)()
        return set(addresses[: self._library.shim_kernels_run(addresses, 1024)])

    def kernels_built(self) -> dict[int, str]:
        """All that the module holds, by address."""
        symbols = subprocess.run(["nm", "-C", str(self.path)], check=True, capture_output=True, text=True).stdout
        # Whole symbols: not the lambdas, nor the "[clone .cold]" parts, that the compiler splits off
        kernel = (
            r"^([0-9a-f]+) [tTwW] (?:void )?(seqpar::cuda::(?:\(anonymous namespace\)::)?\w+_kernel<[^()]*>)\([^()]*\)$"
        )
        found = re.findall(kernel, symbols, re.MULTILINE)
        return {int(address, 16): name for address, name in found}


class PoisonedTorch:
    """Stands in for ``torch`` in native.py: poisoned memory between guards, matrices with padded rows."""

    def __init__(self, padding: int = 0, shift: int = 0) -> None:
        self.padding, self.shift = padding, shift  # elements
        self._made: list[tuple[Tensor, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        sizes = shape[0] if isinstance(shape[0], tuple) else shape
        return self._guarded(1, math.prod(sizes), 0, 0, dtype).view(sizes)

    def empty_like(self, like: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        return self.matrix(*like.shape, dtype)

    def matrix(self, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        return self._guarded(rows, cols, self.padding, self.shift, dtype)

    def _guarded(self, rows: int, cols: int, padding: int, shift: int, dtype: torch.dtype) -> Tensor:
        itemsize = torch.empty(0, dtype=dtype).element_size()
        count = rows * (cols + padding) + shift
        memory = torch.full((2 * GUARD + count * itemsize,), POISON, dtype=torch.uint8)
        offset = (-memory.data_ptr()) % GUARD // itemsize * itemsize  # 0 with torch's allocator
        body = memory[offset + GUARD if offset else GUARD :][: count * itemsize].view(dtype)[shift:]
        view = body.as_strided((rows, cols), (cols + padding, 1))
        self._made.append((memory, view))
        return view

    def check(self) -> None:
        """Nothing but the views was written."""
        for memory, view in self._made:
            saved = view.clone()
            if view.numel():
                view.view(torch.uint8).fill_(POISON)
            assert (memory == POISON).all(), f"a write outside of {tuple(view.shape)} {view.dtype}"
            view.copy_(saved)
