"""Kernels of csrc: C++ on a CPU."""
