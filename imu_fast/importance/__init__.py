"""Squared per-sample gradients of every parameter, in one batched pass."""
