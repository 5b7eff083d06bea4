#!/usr/bin/env bash
# torch 2.13.0, inductor. The compile cache on disk takes no notice of what a custom op's fake kernel returns.
#
# A new version of an extension in which an op of the same schema returns another shape finds the graph that was
# compiled with the old one: the second process fails inside of generated code, at an assertion on the op's result, and
# goes on failing until the cache is removed. The key has the op's name and the caller's code and inputs; neither the
# Python of the op nor that of its fake is in it. Without the cache the same program compiles and runs.
# Seen: "wrong number of dimensions" in the second of two processes with one TORCHINDUCTOR_CACHE_DIR; right with
# TORCHINDUCTOR_FORCE_DISABLE_CACHES=1, and with a folder of its own. Needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy setuptools
cat >"$folder/program.py" <<'PY'
"""The program with version 1 or 2 of the op: counts of each row, or of each pair of rows."""
import sys

import torch

dimensions = int(sys.argv[1])
library = torch.library.Library("demo", "DEF")
library.define("count(Tensor x) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)


def kernel(x):
    return x * 2, x.new_zeros(x.shape[:1] * dimensions)


library.impl("count", kernel, "CompositeExplicitAutograd")
torch.library.register_fake("demo::count", lambda x: (torch.empty_like(x), x.new_empty(x.shape[:1] * dimensions)), lib=library)


@torch.compile(fullgraph=True)
def step(x):
    y, counts = torch.ops.demo.count(x)
    return y + 1, counts


try:
    shape = tuple(step(torch.ones(3, 2))[1].shape)
except AssertionError as error:
    print(f"{type(error).__name__}: {error}")
else:
    print(f"torch {torch.__version__}, version {dimensions}: counts of shape {shape}")
PY
run() {
    TORCHINDUCTOR_CACHE_DIR="$folder/$2" "$folder/venv/bin/python" -W ignore "$folder/program.py" "$1"
}
run 1 shared
second=$(run 2 shared)
echo "version 2, with what version 1 left in the cache: $second"
uncached=$(TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 run 2 shared)
echo "version 2, caches disabled: $uncached"
own=$(run 2 own)
echo "version 2, a cache of its own: $own"
[[ "$second" == *"wrong number of dimensions"* ]] || { echo "changed: the cache noticed"; exit 1; }
[[ "$uncached" == *"(3, 3)"* && "$own" == *"(3, 3)"* ]]
