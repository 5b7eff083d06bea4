"""Compiles what a call would launch, for a GPU that need not be there, and reads what came out.

The launch is recorded from the host function itself, so that tile, warps and specialisation are those of production.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


class Binary(NamedTuple):
    """What the assembler made of a launch."""

    name: str
    registers: int
    spilled: int  # bytes of stack a thread
    shared: int  # bytes a block
    ptx: str
    sass: list[str]  # opcodes, with their modifiers
    tensor_memory: int = 0  # columns a block, of 512; from sm_100 on

    def widths(self, opcode: str) -> dict[int, int]:
        """How many global loads (LDG) or stores (STG) of each width in bits; asynchronous copies count as loads."""
        counts: dict[int, int] = {}
        for op in self.sass:
            parts = op.split(".")
            if parts[0] == opcode or (opcode == "LDG" and parts[0] == "LDGSTS"):
                width = next((int(p) for p in parts if p in ("128", "64")), 32)
                width = next((int(p[1:]) for p in parts if re.fullmatch(r"[US](8|16)", p)), width)
                counts[width] = counts.get(width, 0) + 1
        return counts


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def record(*args: Any, **options: Any) -> None:
            self.launches.append(Launch(self.kernel, grid, args, options))

        return record


def record(function: Any, *args: Any, **kwargs: Any) -> list[Launch]:
    """The launches of ``function(*args, **kwargs)``, none of which is carried out."""
    launches: list[Launch] = []
    module = sys.modules[function.__module__]
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, triton.runtime.JITFunction)}
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Recorder(kernel, launches))
        function(*args, **kwargs)
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    return launches


def compile_launch(launch: Launch, arch: int) -> Binary:
    """Specialised as the launcher would: aligned pointers, sizes divisible by 16, ones and Nones as constants."""
    assert launch.options.get("enable_fp_fusion"), "a launch leaves fusing multiply-adds to the version of Triton"
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (param, value) in enumerate(zip(launch.kernel.params, launch.args, strict=True)):
        if (
            param.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and not param.do_not_specialize)
        ):
            signature[param.name], constants[i,] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[param.name] = f"tensordesc<{_TYPES[value.base.dtype][1:]}{value.block_shape}>"
        elif isinstance(value, torch.Tensor):
            signature[param.name] = _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = param.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        dump = [str(tools / "cuobjdump"), "-sass", "-res-usage", str(cubin)]
        report = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert usage is not None, report[-500:]
    return Binary(
        launch.kernel.__name__,
        int(usage[1]),
        int(usage[2]),
        compiled.metadata.shared,
        compiled.asm["ptx"],
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", report, re.MULTILINE),
        getattr(compiled.metadata, "tmem_size", None) or 0,
    )
