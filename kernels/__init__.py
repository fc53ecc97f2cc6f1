"""Triton kernels, one file per operation, installed as imu_fast.kernels."""
