"""PyTorch's own fused kernels, one module per op, for the first order where they serve."""
