"""Cases that run under TRITON_INTERPRET=1, which has to be set before Triton is imported: in a process of their own.

Both ends: :class:`Interpreted` in the test session, :func:`main` in the script that holds the cases.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SECONDS = 280  # below the limit of a test, so that it is told what ran


class Interpreted:
    """The cases of one script, running beside the session from the start."""

    def __init__(self, script: str, folder: Path) -> None:
        self.log = folder / "cases.jsonl"
        path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(HERE / script)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
            )

    def failure(self, name: str) -> str | None:
        """Of that case, as soon as it has run."""
        end = time.monotonic() + SECONDS
        while True:
            ended = self.process.poll() is not None
            lines = self.log.read_text().splitlines()
            results = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
            for result in results:
                if result["case"] == name:
                    failure: str | None = result["failure"]
                    return failure
            if ended:
                return "never ran:\n" + "\n".join(lines[-20:])
            if time.monotonic() > end:
                return f"not done within {SECONDS} s:\n" + "\n".join(lines[-20:])
            time.sleep(0.1)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def multiply_as_a_gpu_does() -> None:
    """Each element summed in the same order wherever it lies in its tile, as tensor cores do and some BLAS does not.

    The interpreter also keeps bf16 as its bits, and would multiply those.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(t: Any) -> Any:
        if t.dtype == tl.bfloat16:
            return (t.data.astype(np.uint32) << 16).view(np.float32)
        return t.data.astype(np.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        columns, rows = widened(a).T, widened(b)  # [K, M], [K, N]
        product = np.zeros(d.data.shape, d.data.dtype)
        for column, row in zip(columns, rows, strict=True):
            product += np.multiply.outer(column, row)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot


def main(cases: dict[str, Callable[[], None]]) -> None:
    """Runs those named on the command line, or all, and prints one JSON line a case: name, and the failure or null."""
    for name in sys.argv[1:] or list(cases):
        start, failure = time.perf_counter(), None
        try:
            cases[name]()
        except Exception:
            failure = traceback.format_exc()
        print(json.dumps({"case": name, "failure": failure, "seconds": time.perf_counter() - start}), flush=True)
