"""``bench gemm``: the matmul that waits for its rows beside cuBLAS, on one GPU, at the sizes of Llama's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .options import positive

if TYPE_CHECKING:  # torch is imported late: --help is instant
    import argparse

    from .session import Session

TEXT = "the matmul that waits for its rows beside cuBLAS, on one GPU"
#: Torch's own matmul that waits for flags (CUTLASS, sm_90).
PEERS = ("async-input-mm",)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=positive, nargs="+", help="default: 8192 16384 (quick: 8192)")


def run_command(args: argparse.Namespace, session: Session) -> None:
    from . import gemm_cases
    from .report import timing_table

    rows = args.rows or ([8192] if args.quick else [8192, 16384])
    found = gemm_cases.run(session, list(gemm_cases.cases(args.dtype or ["bf16"], rows)))
    timing_table(found, f"gemm on {found[-1].machine}")
