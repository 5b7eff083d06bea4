"""What ptxas and the machine code say of csrc/cuda: registers, spills, width of the accesses. Needs nvcc, no GPU."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc/cuda"
ARCHS = ("80", "90a", "100a")
FLAGS = ["-std=c++17", "-O3", "-fatbin", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", f"-I{CUDA}"]
FLAGS += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]

# Registers a thread may use for as many threads to be resident as the planner counts on (65536 to a multiprocessor).
REGISTERS = {
    "forward_kernel": 64,  # 1024 threads
    "backward_kernel": 128,  # 512
    "generic_forward_kernel": 128,  # 2 x 256
    "generic_backward_kernel": 128,
    "reduce_partials_kernel": 64,  # 2 x 512
    "reduce_vectors_kernel": 64,  # 4 x 256
    "reduce_elements_kernel": 64,
}
INSTANCES = {"forward_kernel": 28, "backward_kernel": 20, "reduce_vectors_kernel": 3}
# Rows whose dtypes all have 16-byte vectors; where a 16-bit row goes with an f32 one it moves 8 bytes at a time.
WIDE = re.compile(r"(forward|backward)_kernelI(NS0_4bf16ES2_|NS0_3f16ES2_|ff)|reduce_vectors_kernel")


class Usage(NamedTuple):
    arch: str
    symbol: str
    name: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("CUDACXX"), f"{home}/bin/nvcc" if home else None, "nvcc"]
    return next((found for found in map(shutil.which, filter(None, candidates)) if found), None)


def _cuobjdump() -> str | None:
    """On PATH, or the one that comes with triton."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found or spec is None or spec.origin is None:
        return found
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(path) if path.is_file() else None


NVCC, CUOBJDUMP = _nvcc(), _cuobjdump()
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc (CUDACXX, CUDA_HOME, PATH) to compile csrc/cuda with")


@pytest.fixture(scope="module")
def compiled() -> Path:
    """A folder with NAME.fatbin and NAME.log (ptxas' report) for every .cu file; kept until a source changes."""
    assert NVCC is not None
    sources = sorted(CUDA.glob("*.cu"))
    digest = hashlib.sha256(" ".join([NVCC, *FLAGS]).encode())
    for path in [*sources, *sorted(CUDA.glob("*.*h")), *sorted((ROOT / "csrc").glob("*.h"))]:
        digest.update(path.read_bytes())
    folder = ROOT / "build/cuda_sass" / digest.hexdigest()[:16]
    if folder.exists():
        return folder
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
    scratch.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> None:
        command = [NVCC, *FLAGS, str(source), "-o", str(scratch / f"{source.stem}.fatbin")]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stderr}"
        (scratch / f"{source.stem}.log").write_text(result.stdout + result.stderr)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources))
    try:
        scratch.rename(folder)
    except OSError:  # another session was faster
        shutil.rmtree(scratch)
    return folder


def _kernel_name(symbol: str) -> str:
    found = re.search(r"\d([a-z_]+_kernel)", symbol)
    assert found is not None, symbol
    return found.group(1)


@pytest.fixture(scope="module")
def usages(compiled: Path) -> list[Usage]:
    entry = re.compile(
        r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return [
        Usage(
            found["arch"],
            found["symbol"],
            _kernel_name(found["symbol"]),
            *(int(found[key]) for key in ("stack", "stores", "loads", "registers")),
        )
        for log in sorted(compiled.glob("*.log"))
        for found in entry.finditer(log.read_text())
    ]


def test_every_instance_is_there(usages: list[Usage]) -> None:
    for arch in ARCHS:
        for name, count in INSTANCES.items():
            assert len({u.symbol for u in usages if u.arch == arch and u.name == name}) == count, (arch, name)
        assert {u.name for u in usages if u.arch == arch} == set(REGISTERS)


def test_no_spills_no_stack(usages: list[Usage]) -> None:
    assert not [u for u in usages if u.stack or u.spill_stores or u.spill_loads]


def test_registers_are_within_the_plan(usages: list[Usage]) -> None:
    assert not [u for u in usages if u.registers > REGISTERS[u.name]]


@pytest.fixture(scope="module")
def sass(compiled: Path) -> dict[str, str]:
    """Machine code for sm_90a by symbol."""
    if CUOBJDUMP is None:
        pytest.skip("no cuobjdump, on PATH or with triton, to disassemble with")
    code = {}
    for fatbin in sorted(compiled.glob("*.fatbin")):
        command = [CUOBJDUMP, "-sass", "-arch", "sm_90a", str(fatbin)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        parts = re.split(r"Function : (\w+)", listing)
        code.update(zip(parts[1::2], parts[2::2], strict=True))
    return {symbol: text for symbol, text in code.items() if "_kernel" in symbol}


def test_no_local_memory(sass: dict[str, str]) -> None:
    assert len(sass) >= sum(INSTANCES.values())
    assert not [symbol for symbol, text in sass.items() if re.search(r"\b(LDL|STL)\b", text)]


def test_rows_move_16_bytes_at_a_time(sass: dict[str, str]) -> None:
    """Loads of rows bypass L1 (.NA); what is narrower are statistics, seed and fp8 outputs, never 16-bit elements."""
    wide = {symbol: text for symbol, text in sass.items() if WIDE.search(symbol)}
    assert len(wide) == 16 + 4 + 8 + 4 + 3
    for symbol, text in wide.items():
        row_loads = re.findall(r"\bLDG\.E\.NA(\S*)", text)
        assert row_loads and all(".128" in width for width in row_loads), symbol
        assert re.search(r"\bSTG\.E\.128\b", text), symbol
        assert not re.search(r"\b(LDG|STG)\.E\.(NA\.)?[US]?(8|16)\b", text), symbol


def test_several_loads_in_flight(sass: dict[str, str]) -> None:
    """The first loads of rows come one after the other, before anything waits for a row."""
    for symbol, text in sass.items():
        if not re.search(r"forward_kernelINS0_4bf16ES2_Li(2ELb[01]ELb0|1ELb[01]ELb1)|reduce_vectors_kernel", symbol):
            continue
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", text, re.MULTILINE)
        loads = [i for i, opcode in enumerate(opcodes) if opcode.startswith("LDG.E.NA.128")]
        between = opcodes[loads[0] : loads[3]]
        assert not [opcode for opcode in between if opcode.startswith(("STG", "BAR", "SHFL", "FADD", "FFMA"))], symbol
