"""Benchmarks: ``python -m benchmarks <suite>``; what is measured and how stands in docs/benchmarks.md."""
