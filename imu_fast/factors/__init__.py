"""Per-sample gradients as factors."""
