"""A process that has ended is known to have; whatever is not certain counts as alive."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from seqpar_kernels.comm import alive

HERE = alive.identity()


@pytest.mark.skipif(not HERE, reason="processes cannot be told apart here")
def test_this_process_is_alive_and_one_that_has_exited_is_not() -> None:
    assert not alive.ended(HERE)
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('alive', sys.argv[1]); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.identity(), flush=True); input()"
    )
    run = [sys.executable, "-c", code, alive.__file__]
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        who = other.stdout.readline().strip()
        assert who and not alive.ended(who)
        other.kill()
        other.stdout.read()  # its end, though nobody has waited for the process yet
        for _ in range(100):
            if alive.ended(who):
                break
            time.sleep(0.1)
        assert alive.ended(who)
    assert alive.ended(who)


@pytest.mark.parametrize("who", ["", "x", "boot space 1 2", "a b c d e"])
def test_of_others_nothing_is_known(who: str) -> None:
    assert not alive.ended(who)
