"""Triton kernels of the fast steps."""
