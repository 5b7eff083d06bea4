"""Builds the extension through CMake. Needs setuptools, pybind11, cmake, ninja; never torch."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
GIB_PER_JOB = 2.0  # what one nvcc or one optimising gcc may take


def wheel_cuda_root() -> Path | None:
    """The toolkit that the nvidia-cuda-* wheels lay out under site-packages/nvidia/cu13 (extra ``cuda-build``)."""
    spec = importlib.util.find_spec("nvidia")
    for base in spec.submodule_search_locations or [] if spec else []:
        for nvcc in sorted(Path(base).glob("*/bin/nvcc"), reverse=True):
            return nvcc.parent.parent
    return None


def find_nvcc() -> str | None:
    """``CUDACXX``, then ``CUDA_HOME``, then PATH, then the nvidia-cuda-* wheels."""
    if "CUDACXX" in os.environ:
        return os.environ["CUDACXX"]
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin/nvcc").is_file():
        return str(Path(home) / "bin/nvcc")
    found = shutil.which("nvcc")
    if found:
        return found
    root = wheel_cuda_root()
    return str(root / "bin/nvcc") if root else None


def compile_jobs() -> int:
    """As many jobs as cores, but no more than free memory holds (SEQPAR_JOBS or MAX_JOBS overrides)."""
    override = os.environ.get("SEQPAR_JOBS") or os.environ.get("MAX_JOBS")
    if override:
        return max(1, int(override))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            fields = dict(line.split(":", 1) for line in meminfo)
        available = int(fields["MemAvailable"].split()[0]) / 2**20
    except (OSError, ValueError, KeyError, AttributeError):
        available = 4.0
    return max(1, min(cores, int(available / GIB_PER_JOB)))


class CMakeBuild(build_ext):
    """One extension, ``seqpar_kernels._native``, built and installed by CMake."""

    def build_extension(self, ext: Extension) -> None:
        build_dir = Path(self.build_temp).resolve() / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        import pybind11

        arguments = [
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        nvcc = find_nvcc()
        required = os.environ.get("SEQPAR_REQUIRE_CUDA", "0") not in ("", "0")
        if os.environ.get("SEQPAR_CUDA", "1") == "0":
            nvcc = None
        if nvcc:
            arguments += ["-DSEQPAR_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
            if "SEQPAR_CUDA_ARCHS" in os.environ:
                arguments.append(f"-DSEQPAR_CUDA_ARCHS={os.environ['SEQPAR_CUDA_ARCHS']}")
        elif required:
            raise SystemExit(
                "SEQPAR_REQUIRE_CUDA=1, but no nvcc was found: looked at CUDACXX, CUDA_HOME, PATH and the nvidia-cuda-* "
                "wheels. Install the CUDA toolkit or `pip install 'seqpar-kernels[cuda-build]'`, or unset the variable."
            )
        else:
            print("seqpar_kernels: no nvcc found, building the CPU kernels only", flush=True)
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build_dir), *arguments], check=True)
        subprocess.run(["cmake", "--build", str(build_dir), "-j", str(compile_jobs())], check=True)
        built = next(path for path in build_dir.glob("_native*") if path.suffix in (".so", ".pyd", ".dylib"))
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, output)


setup(ext_modules=[Extension("seqpar_kernels._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
