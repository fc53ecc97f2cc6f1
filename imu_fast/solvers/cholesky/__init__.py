"""Damped Cholesky factors and solves, on the CPU and on CUDA."""
