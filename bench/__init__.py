"""Benchmarks: ``python -m bench --help``. Every provider is checked before it is timed; every ceiling is measured."""
