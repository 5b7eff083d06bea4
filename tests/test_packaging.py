"""sdist and wheel, built as a stranger would build them: in isolation, without torch, with no nvcc to be found."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

# The first test waits for two isolated builds and a compiler, which on a busy machine take longer than a hang may.
pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).resolve().parent.parent
BUILD_REQUIREMENTS = {"setuptools", "pybind11", "cmake", "ninja"}
FOREIGN_LIBRARIES = ("libcuda", "libcudart", "libtorch", "libc10", "libgomp", "libpython")
# Of what begins with a dot, .ci alone is carried.
NOT_SOURCES = shutil.ignore_patterns(".[!c]*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "*_out")
BENCH = {f"seqpar_kernels/bench/{path.name}" for path in ROOT.glob("bench/*.py")}
# Takes the place of a compiler where what it would build is there already.
FAKE_CMAKE = """#!/bin/sh
if [ "$1" = --build ]; then cp '{extension}' "$2"; fi
"""
# Any import of torch during the build meets this instead.
POISON = "raise AssertionError('the build imported torch')"


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("seqpar_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def needed_libraries(extension: Path) -> list[str]:
    dynamic = subprocess.run(["readelf", "-d", str(extension)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One sdist, and from it one wheel, in an environment that has nothing but pip."""
    folder = tmp_path_factory.mktemp("packaging")
    sources = shutil.copytree(ROOT, folder / "sources", ignore=NOT_SOURCES)
    (folder / "poison").mkdir()
    (folder / "poison" / "torch.py").write_text(POISON)
    env = {**os.environ, "SEQPAR_CUDA": "0", "PYTHONPATH": str(folder / "poison")}
    env.pop("SEQPAR_REQUIRE_CUDA", None)

    def run(*command: str | Path) -> str:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, cwd=folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    run(sys.executable, "-m", "venv", folder / "env")
    python = folder / "env" / "bin" / "python"
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder / "dist", sources)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    log = run(python, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", folder / "dist", sdist)
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder / "unpacked")
    return SimpleNamespace(folder=folder, sdist=sdist, wheel=wheel, names=names, log=log, python=python)


def extension_of(built: SimpleNamespace) -> Path:
    (extension,) = (built.folder / "unpacked" / "seqpar_kernels" / "kernels").glob("_native*.so")
    return extension


def test_the_isolated_build_installs_its_requirements_and_nothing_else(built: SimpleNamespace) -> None:
    installed = re.search(r"Successfully installed (.+)", built.log)
    assert installed, built.log
    assert {item.rsplit("-", 1)[0] for item in installed[1].split()} == BUILD_REQUIREMENTS


def test_sdist_holds_what_a_build_needs(built: SimpleNamespace) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "csrc/bindings.cpp", "csrc/seqpar.h"} <= names
    for folder in ("csrc", "bench", ".ci"):
        carried = [path for path in ROOT.glob(f"{folder}/**/*") if path.is_file() and path.suffix != ".pyc"]
        assert carried and {str(path.relative_to(ROOT)) for path in carried} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_holds_the_package_and_nothing_else(built: SimpleNamespace) -> None:
    package = [name for name in built.names if not name.split("/")[0].endswith(".dist-info")]
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("seqpar_kernels/**/*.py")}
    assert {name for name in package if name.endswith(".py")} == sources | BENCH
    extension = [name for name in package if re.fullmatch(r"seqpar_kernels/kernels/_native[^/]*\.(so|pyd)", name)]
    assert len(extension) == 1
    assert {name for name in package if not name.endswith((".py", ".pyi"))} == {extension[0], "seqpar_kernels/py.typed"}


def test_extension_of_the_wheel_loads_without_torch_and_without_a_driver(built: SimpleNamespace) -> None:
    extension = extension_of(built)
    code = f"import sys; sys.path.insert(0, {str(extension.parent)!r}); import _native; print(_native.has_cuda)"
    done = subprocess.run([built.python, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_wheel_links_no_library_of_cuda_torch_or_openmp(built: SimpleNamespace) -> None:
    assert [name for name in needed_libraries(extension_of(built)) if name.startswith(FOREIGN_LIBRARIES)] == []


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_installed_extension_links_no_library_of_cuda_torch_or_openmp() -> None:
    """The one the tests run on: with the CUDA kernels inside, where there is an nvcc."""
    spec = importlib.util.find_spec("seqpar_kernels.kernels._native")
    assert spec is not None
    assert spec.origin is not None
    assert [name for name in needed_libraries(Path(spec.origin)) if name.startswith(FOREIGN_LIBRARIES)] == []


def environment(folder: Path) -> Path:
    """The Python of an environment with an empty site-packages, beside which it sees those of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")  # the .pth files there are not read
    return folder / "bin" / "python"


def call(*command: str | Path, cwd: Path, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Of this process's variables none names a folder to import from."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env={**inherited, **env})
    assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def installed(built: SimpleNamespace) -> Path:
    """The folder of commands of an environment into which the wheel was installed; torch is this environment's."""
    python = environment(built.folder / "user")
    call(python, "-m", "pip", "install", "--no-deps", "--no-index", built.wheel, cwd=built.folder)
    return python.parent


def test_an_installed_package_has_the_benchmarks(installed: Path, tmp_path: Path) -> None:
    """As a command and as a module. Ranks import what their parent does, whatever lies where the command is typed."""
    module = [installed / "python", "-m", "seqpar_kernels.bench"]
    assert "usage: python -m seqpar_kernels.bench" in call(*module, "--help", cwd=tmp_path).stdout
    (tmp_path / "seqpar_kernels").mkdir()  # as in a checkout, whose extension is not built
    (tmp_path / "seqpar_kernels" / "__init__.py").write_text("raise AssertionError('another copy was imported')")
    sizes = ["--rows", "16", "--hidden", "8", "--op", "all_gather_linear", "--chunks", "--peers", "by-hand"]
    command = [installed / "seqpar-bench", "linear", "--quick", "--seconds", "0.01", *sizes]
    call(*command, "--save", tmp_path / "rows", cwd=tmp_path)
    (file,) = (tmp_path / "rows").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["status"] for row in rows} == {"ok"} and {"ours", "by-hand"} <= {row["provider"] for row in rows}
    assert {row["command"].partition(" linear")[0] for row in rows} == {"python -m seqpar_kernels.bench"}
    assert {row["commit"] for row in rows} == {os.environ.get("SEQPAR_COMMIT", "")}


def unpacked(built: SimpleNamespace, folder: Path) -> Path:
    with tarfile.open(built.sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (sources,) = folder.iterdir()
    return sources


def test_an_editable_install_has_the_benchmarks(built: SimpleNamespace, tmp_path: Path) -> None:
    """bench/ of the checkout, under the name that an installed package has; and under its own where it lies."""
    sources = unpacked(built, tmp_path / "sdist")
    (tmp_path / "bin").mkdir()
    cmake = tmp_path / "bin" / "cmake"
    cmake.write_text(FAKE_CMAKE.format(extension=extension_of(built)))
    cmake.chmod(0o755)
    python = environment(tmp_path / "env")
    path = f"{cmake.parent}{os.pathsep}{os.environ['PATH']}"
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--editable"]
    call(python, "-m", "pip", "install", *options, sources, cwd=tmp_path, PATH=path, SEQPAR_CUDA="0")
    code = "import seqpar_kernels.bench.cli as b, seqpar_kernels.kernels.native as n; print(b.__file__, n.build_error)"
    found = call(python, "-c", code, cwd=tmp_path).stdout.split()
    assert found == [str(sources / "bench" / "cli.py"), "None"]
    assert (python.parent / "seqpar-bench").is_file()
    assert "usage: python -m bench" in call(python, "-m", "bench", "--help", cwd=sources).stdout


def test_tests_of_the_benchmarks_run_from_the_sdist(built: SimpleNamespace, tmp_path: Path) -> None:
    """Those that measure nothing. They read bench/results, docs/ and .ci/."""
    sources = unpacked(built, tmp_path)
    shutil.copy2(extension_of(built), sources / "seqpar_kernels" / "kernels")
    code = "from importlib.util import find_spec; print(*(find_spec(n).origin for n in ('bench', 'seqpar_kernels')))"
    found = call(sys.executable, "-c", code, cwd=sources, PYTHONPATH=str(sources)).stdout.split()
    assert found == [str(sources / name / "__init__.py") for name in ("bench", "seqpar_kernels")]
    tests = ["tests/bench/test_project.py", "tests/bench/test_results.py", "tests/test_make_gpu.py"]
    chosen = "test_project or tables or runs or benchmarks_know"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", chosen]
    done = call(*command, cwd=sources, PYTHONPATH=str(sources))
    assert re.search(r"\d\d passed", done.stdout), done.stdout


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py where no nvcc can be found."""
    for name in ("CUDACXX", "CUDA_HOME", "SEQPAR_REQUIRE_CUDA", "SEQPAR_CUDA", "SEQPAR_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    setup = load_setup()
    monkeypatch.setattr(setup, "wheel_nvcc", lambda: None)
    return setup


def test_required_cuda_without_nvcc_is_an_error_that_says_where_it_looked(
    no_nvcc: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQPAR_REQUIRE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"no nvcc was found.*CUDACXX, CUDA_HOME, PATH.*cuda-build"):
        no_nvcc.cuda_arguments()


def test_required_and_refused_cuda_contradict(no_nvcc: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQPAR_REQUIRE_CUDA", "1")
    monkeypatch.setenv("SEQPAR_CUDA", "0")
    with pytest.raises(SystemExit, match="contradict"):
        no_nvcc.cuda_arguments()


def test_without_nvcc_the_cpu_kernels_are_built_and_it_says_so(
    no_nvcc: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert no_nvcc.cuda_arguments() == []
    assert "no nvcc found, building the CPU kernels only" in capsys.readouterr().out


def test_nvcc_is_looked_for_in_order(no_nvcc: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CUDACXX before CUDA_HOME before PATH before the wheels; a CUDA_HOME without an nvcc is passed over."""

    def compiler(path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o755)
        return str(path)

    monkeypatch.setattr(no_nvcc, "wheel_nvcc", lambda: "wheel")
    assert no_nvcc.find_nvcc() == "wheel"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert no_nvcc.find_nvcc() == "wheel"
    on_path = compiler(tmp_path / "nvcc")
    assert no_nvcc.find_nvcc() == on_path
    in_home = compiler(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert no_nvcc.find_nvcc() == in_home
    monkeypatch.setenv("CUDACXX", "/chosen/nvcc")
    assert no_nvcc.find_nvcc() == "/chosen/nvcc"


def test_nvcc_of_the_wheels_is_found_although_isolation_hides_site_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    setup = load_setup()
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(setup.sys, "path", [])
    assert setup.wheel_nvcc() == str(nvcc)


@pytest.mark.parametrize(
    ("free_gib", "cores", "override", "jobs"),
    [(64.0, 8, None, 8), (5.0, 8, None, 2), (0.5, 8, None, 1), (0.5, 8, "3", 3), (64.0, 2, None, 2)],
)
def test_compile_jobs_are_bounded_by_cores_and_free_memory(
    free_gib: float, cores: int, override: str | None, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = load_setup()
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.delenv("SEQPAR_JOBS", raising=False)
    if override:
        monkeypatch.setenv("SEQPAR_JOBS", override)
    monkeypatch.setattr(setup, "free_gib", lambda: free_gib)
    monkeypatch.setattr(setup.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert setup.compile_jobs() == jobs
