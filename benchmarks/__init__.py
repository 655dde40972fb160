"""Suites of pytest-benchmark, and the reports made of their results: ``python -m benchmarks.<name>``."""
