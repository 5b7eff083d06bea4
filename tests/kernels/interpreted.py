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

HERE = Path(__file__).resolve().parent
SECONDS = 300


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
        self.process.wait(SECONDS)
        lines = self.log.read_text().splitlines()
        results = {r["case"]: r["failure"] for r in (json.loads(line) for line in lines if line.startswith("{"))}
        return results[name] if name in results else "never ran:\n" + "\n".join(lines[-20:])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def main(cases: dict[str, Callable[[], None]]) -> None:
    """Runs those named on the command line, or all, and prints one JSON line a case: name, and the failure or null."""
    for name in sys.argv[1:] or list(cases):
        start, failure = time.perf_counter(), None
        try:
            cases[name]()
        except Exception:
            failure = traceback.format_exc()
        print(json.dumps({"case": name, "failure": failure, "seconds": time.perf_counter() - start}), flush=True)
