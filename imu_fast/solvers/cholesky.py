import torch


def damped_cholesky_solve(A, b, damping):
    L = torch.linalg.cholesky(A + damping * torch.eye(len(A), dtype=A.dtype))
    return torch.cholesky_solve(b, L)
