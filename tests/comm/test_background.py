"""Threads that watch in the background have ended when the interpreter ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import atexit, sys, threading, time

def left():
    alive = [thread.name for thread in threading.enumerate() if thread.name.startswith("seqpar-")]
    print("alive at the end:", alive)

atexit.register(left)  # runs after what is registered later

import torch.distributed as dist
from seqpar_kernels.comm.background import pause, start_watching
from seqpar_kernels.comm.watchdog import watchdog_of

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
watchdog = watchdog_of(dist.group.WORLD)

def look(found):
    while pause(30.0):
        pass
    print("told to end")

start_watching(look, [], name="seqpar-test")
print("alive:", sorted(t.name for t in threading.enumerate() if t.name.startswith("seqpar-")))
began = time.monotonic()
atexit.register(lambda: print("began to end"))
"""


def test_watching_threads_end_before_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "alive: ['seqpar-test', 'seqpar-watchdog']",
        "began to end",
        "told to end",
        "alive at the end: []",
    ]
