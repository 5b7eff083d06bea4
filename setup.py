"""Builds the extension through CMake. Needs setuptools, pybind11, cmake, ninja; never torch."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
EXTENSION = "seqpar_kernels.kernels._native"
GIB_PER_JOB = 2.0  # what one nvcc or one optimising gcc may take
NO_NVCC = (
    "SEQPAR_REQUIRE_CUDA=1, but no nvcc was found: looked at CUDACXX, CUDA_HOME, PATH and the nvidia-cuda-* wheels. "
    "Install the CUDA toolkit or `pip install 'seqpar-kernels[cuda-build]'`, or unset the variable."
)


def flag(name: str, default: str) -> bool:
    return os.environ.get(name, default) not in ("", "0")


def wheel_nvcc() -> str | None:
    """The nvcc that the nvidia-cuda-* wheels (extra ``cuda-build``) lay out under site-packages/nvidia/cu13/bin.

    Under build isolation sys.path leaves site-packages out, but sysconfig still says where they are.
    """
    places = {*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    found = {nvcc for place in places if place for nvcc in Path(place).glob("nvidia/*/bin/nvcc")}
    return str(max(found)) if found else None


def find_nvcc() -> str | None:
    """``CUDACXX``, then ``CUDA_HOME``, then PATH, then the nvidia-cuda-* wheels."""
    if os.environ.get("CUDACXX"):
        return os.environ["CUDACXX"]
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin/nvcc").is_file():
        return str(Path(home) / "bin/nvcc")
    return shutil.which("nvcc") or wheel_nvcc()


def free_gib() -> float:
    """Memory that can be had without swapping; a guess where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            fields = dict(line.split(":", 1) for line in meminfo)
        return int(fields["MemAvailable"].split()[0]) / 2**20
    except (OSError, ValueError, KeyError):
        return 8.0


def compile_jobs() -> int:
    """As many jobs as cores, but no more than free memory holds (SEQPAR_JOBS or MAX_JOBS overrides)."""
    override = os.environ.get("SEQPAR_JOBS") or os.environ.get("MAX_JOBS")
    if override:
        return max(1, int(override))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(free_gib() / GIB_PER_JOB)))


def cuda_arguments() -> list[str]:
    """What CMake is told about CUDA: a compiler, or nothing for the CPU kernels alone."""
    wanted, required = flag("SEQPAR_CUDA", "1"), flag("SEQPAR_REQUIRE_CUDA", "0")
    if required and not wanted:
        raise SystemExit("SEQPAR_REQUIRE_CUDA=1 and SEQPAR_CUDA=0 contradict each other: unset one of them.")
    nvcc = find_nvcc() if wanted else None
    if nvcc is None:
        if required:
            raise SystemExit(NO_NVCC)
        reason = "no nvcc found" if wanted else "SEQPAR_CUDA=0"
        print(f"seqpar_kernels: {reason}, building the CPU kernels only", flush=True)
        return []
    print(f"seqpar_kernels: building the CUDA kernels with {nvcc}", flush=True)
    arguments = ["-DSEQPAR_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    if os.environ.get("SEQPAR_CUDA_ARCHS"):
        arguments.append(f"-DSEQPAR_CUDA_ARCHS={os.environ['SEQPAR_CUDA_ARCHS']}")
    return arguments


def cmake_build(build_dir: Path) -> Path:
    """Configure and build in ``build_dir``; where the extension lies then."""
    import pybind11

    arguments = [
        "-G",
        "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DCMAKE_BUILD_TYPE=Release",
        *cuda_arguments(),
    ]
    build_dir.mkdir(parents=True, exist_ok=True)
    # A cache left by an earlier isolated build names a ninja and a pybind11 that are gone with their environment.
    (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build_dir), *arguments], check=True)
    subprocess.run(["cmake", "--build", str(build_dir), "-j", str(compile_jobs())], check=True)
    return next(path for path in build_dir.glob("_native*") if path.suffix in (".so", ".pyd", ".dylib"))


class CMakeBuild(build_ext):
    """The one extension, built by CMake."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        built = cmake_build(Path(self.build_temp).resolve() / "cmake")
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, output)


if __name__ == "__main__":
    setup(
        # bench/ lies beside the package, runs from there as `python -m bench`, and is installed inside of it.
        packages=[*find_packages(include=["seqpar_kernels", "seqpar_kernels.*"]), "seqpar_kernels.bench"],
        package_dir={"seqpar_kernels.bench": "bench"},
        ext_modules=[Extension(EXTENSION, sources=[])],
        cmdclass={"build_ext": CMakeBuild},
        # An editable install is a path, which type checkers follow, not an import hook, which they cannot.
        options={"editable_wheel": {"mode": "compat"}},
    )
