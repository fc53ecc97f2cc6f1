"""Operations on plain tensors; the only place that knows which backend runs."""
