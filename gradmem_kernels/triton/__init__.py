"""Triton kernels, one module per op: for CUDA devices, and on a CPU under Triton's interpreter (for tests)."""
