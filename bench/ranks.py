"""Runs a function on R processes, one rank and one thread each, in one process group; brings their answers back."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from .allocator import SETTINGS
from .errors import BenchError
from .links import Network

GROUP_TIMEOUT = timedelta(seconds=120)
Job = dict[str, Any]
#: A rank imports what this process would: ``python -m`` would put the current folder first, and in a checkout lies
#: another copy of an installed package, without its compiled module.
START = """
import importlib, json, pathlib, sys
sys.path[:] = json.loads(sys.argv[1])
importlib.import_module(sys.argv[2]).main(pathlib.Path(sys.argv[3]), int(sys.argv[4]))
"""


def run_ranks(
    target: str,
    job: Job,
    ranks: int,
    *,
    device: str = "cpu",
    network: Network | None = None,
    on_step: Callable[[str], None] = lambda text: None,
    limit: float = 1800.0,
) -> list[Any]:
    """Calls ``function(job, group, step)`` on every rank. ``target`` is "module:function", or ".module:function" for a
    module of this package.

    Args:
        job: JSON; the same for every rank.
        network: each rank runs in its namespace; None: all on loopback.
        on_step: called here with each text that rank 0 passes to ``step``.
        limit: seconds until the ranks count as hung.

    Returns:
        list: what the function returned on each rank (JSON).

    Raises:
        BenchError: a rank failed, with the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="seqpar-bench-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps({"target": target, "ranks": ranks, "device": device, "job": job}))
        env = {
            **os.environ,
            **SETTINGS,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": network.interface if network else "lo",
            "TOKENIZERS_PARALLELISM": "false",
        }
        processes = []
        try:
            for rank in range(ranks):
                command = [*(network.prefix(rank) if network else []), sys.executable, "-c", START]
                command += [json.dumps(sys.path), __name__, name, str(rank)]
                with (folder / f"log{rank}").open("wb") as log:
                    processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))
            _wait(processes, folder, on_step, limit)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(ranks)]


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path, on_step: Callable[[str], None], limit: float) -> None:
    deadline, shown = time.monotonic() + limit, 0
    steps = folder / "steps"
    while True:
        states = [process.poll() for process in processes]
        lines = steps.read_text().splitlines() if steps.is_file() else []
        for text in lines[shown:]:
            on_step(text)
        shown = len(lines)
        failed = [rank for rank, state in enumerate(states) if state]
        if failed:
            time.sleep(0.5)  # the first to fail is not always the first to be seen: let the others say their part
            texts = [(folder / f"log{rank}").read_text(errors="replace").strip() for rank in range(len(processes))]
            ends = [f"rank {rank}: " + "\n".join(text.splitlines()[-8:]) for rank, text in enumerate(texts) if text]
            raise BenchError(f"rank {failed[0]} of {len(processes)} failed:\n" + "\n".join(ends))
        if all(state == 0 for state in states):
            return
        if time.monotonic() > deadline:
            raise BenchError(f"the ranks did not finish within {limit:.0f} s: smaller sizes or --quick take less")
        time.sleep(0.1)


def _die_with_parent() -> None:
    """A rank must not outlive a benchmark that was killed."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main(folder: Path, rank: int) -> None:
    """One rank."""
    _die_with_parent()
    import torch
    import torch.distributed as dist

    order = json.loads((folder / "job.json").read_text())
    ranks, device = order["ranks"], order["device"]
    if device == "cuda":
        devices = torch.cuda.device_count()
        if devices < ranks:  # NCCL refuses two ranks of one host on one device
            os.environ["NCCL_HOSTID"] = f"virtual-host-{rank}"
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
            os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        torch.cuda.set_device(rank % devices)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=GROUP_TIMEOUT,
    )

    def step(text: str) -> None:
        if rank == 0:
            with (folder / "steps").open("a") as file:
                file.write(text + "\n")

    module, function = order["target"].split(":")
    result = getattr(importlib.import_module(module, __package__), function)(order["job"], dist.group.WORLD, step)
    (folder / f"result{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # destructors of a group wait for members that may be gone
