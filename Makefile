# Every target works on a fresh machine with python3 (3.10 or newer), make and a C++ compiler: it makes .venv first.
#
#   PYTHON=python3.12   the interpreter .venv is made from (and, for `make gpu`, the one whose torch is used)
#   RANKS=4 STEPS=40    the demo's ranks and steps          ARGS="tests/ops -x"   passed on to pytest or bench
#   OUT=gpu_out         where `make gpu` puts what it finds

PYTHON ?= python3
RANKS ?= 2
STEPS ?= 40
OUT ?= gpu_out
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What the extension is compiled from: a change here rebuilds it, a change in Python needs nothing (editable install).
BUILD_INPUTS := pyproject.toml setup.py constraints.txt CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
# The dev environment contains the demo's: where it exists, the demo uses it.
DEMO_ENV := $(if $(wildcard $(VENV)/dev.stamp),$(VENV)/dev.stamp,$(VENV)/demo.stamp)
CXX_FILES = $(shell find csrc tests/cuda_shim -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format docs findings gpu bench wheel clean distclean

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-10s %s\n", $$1, $$2 }'

demo: $(DEMO_ENV)  ## train GPT-2 and Llama on 1 and on RANKS processes, compare, draw demo_out/demo.png
	$(BIN)/python examples/demo.py --ranks $(RANKS) --steps $(STEPS) --out demo_out

test: $(VENV)/dev.stamp  ## every test that needs no GPU
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/dev.stamp  ## ruff, clang-format, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp  ## rewrite the sources the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(VENV)/dev.stamp  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

findings:  ## the surprises about other libraries, each checked in an environment of its own
	@for script in findings/*.sh; do echo "== $$script"; bash "$$script" || exit 1; done

gpu:  ## the tests marked gpu, then the benchmarks, into $(OUT); ARGS=--figures: the published figures alone
	$(PYTHON) .ci/gpu.py --out $(OUT) $(ARGS)

bench: $(DEMO_ENV)  ## all benchmarks this machine can run: tables here, rows and pictures in bench_out/
	$(BIN)/python -m bench all --save bench_out $(ARGS)
	$(BIN)/python -m bench plot bench_out

wheel: $(VENV)/pip.stamp  ## sdist and wheel in dist/, each built in isolation
	$(PIP) install --quiet build
	$(BIN)/python -m build --outdir dist

clean:  ## remove what was built or written, keep .venv's packages
	rm -rf build dist site *.egg-info demo_out bench_out gpu_out seqpar_kernels/kernels/_native*.so $(VENV)/demo.stamp $(VENV)/dev.stamp
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

distclean: clean  ## clean, and remove .venv
	rm -rf $(VENV)

$(VENV)/pip.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python 3.10 or newer is needed, $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	@touch $@

$(VENV)/demo.stamp: $(VENV)/pip.stamp $(BUILD_INPUTS)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[hf,bench]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/pip.stamp $(BUILD_INPUTS)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
