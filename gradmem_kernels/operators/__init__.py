"""Ops of compiled backends: their four kernels on two torch operators, one module per op, or family of ops."""
