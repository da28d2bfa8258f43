"""Blocks, which say what a weight is, and kernels, which move its bytes."""
