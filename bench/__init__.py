"""Benchmarks: ``python -m bench --help`` in a checkout, ``seqpar-bench --help`` where the package is installed.

Every provider is checked before it is timed. Every ceiling is measured.
"""
