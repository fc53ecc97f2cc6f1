"""A layer's parameters as a matrix [C, D] and as the vector that PyTorch makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imu_fast.errors import InputError, check_flag, check_installed, check_tensor


def matrix_to_vector(matrix: Tensor, has_bias: bool) -> Tensor:
    """``[weight.flatten(), bias]`` of ``[weight, bias]``: [..., P] of [..., C, D], P = C D.

    The order of ``torch.nn.utils.parameters_to_vector(layer.parameters())``, of a linear layer or a
    convolution (transformers' ``Conv1D`` and transposed convolutions keep another one: [d, C], and
    [G c, C / G, *kernel] where the matrix is [C, c * kernel]).

    Args:
        matrix: [..., C, D], any dtype; of a layer with a bias the last column is the bias.
        has_bias: whether it has one, as ``factors.has_bias`` and ``fitted.has_bias`` say.

    Raises:
        InputError: no tensor of at least two axes, or no column for the bias.
    """
    check_flag("has_bias", has_bias)
    check_tensor("matrix", matrix, "any", "[..., C, D]")
    if matrix.dim() < 2:
        raise InputError(f"matrix has shape {tuple(matrix.shape)}; pass a tensor [..., C, D]")
    if not has_bias:
        return matrix.flatten(-2)
    if not matrix.shape[-1]:
        raise InputError(f"matrix has shape {tuple(matrix.shape)}: no column is the bias")
    return torch.cat([matrix[..., :-1].flatten(-2), matrix[..., -1]], dim=-1)


def vector_to_matrix(vector: Tensor, num_classes: int, has_bias: bool) -> Tensor:
    """``[weight, bias]`` of ``[weight.flatten(), bias]``: [..., C, D] of [..., P].

    The inverse of :func:`imu_fast.matrix_to_vector`.

    Args:
        vector: [..., P], any dtype. num_classes: C, the layer's outputs.

    Raises:
        InputError: P is no multiple of C.
    """
    check_flag("has_bias", has_bias)
    check_tensor("vector", vector, "any", "[..., P]")
    if not vector.dim():
        raise InputError("vector has no axes; pass a tensor [..., P]")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise InputError(f"num_classes={num_classes!r} must be an integer >= 1")
    size, rest = divmod(vector.shape[-1], num_classes)
    if rest or not size:
        raise InputError(
            f"vector has shape {tuple(vector.shape)}; expected [..., P], P a multiple of "
            f"num_classes={num_classes}"
        )
    if not has_bias:
        return vector.unflatten(-1, (num_classes, size))
    weight = vector[..., :-num_classes].unflatten(-1, (num_classes, size - 1))
    return torch.cat([weight, vector[..., -num_classes:, None]], dim=-1)


def scipy_operator(
    apply: Callable[[Tensor], Tensor], shape: tuple[int, int], has_bias: bool, device: torch.device
) -> Any:
    """A symmetric operator on [C, D] as a ``scipy.sparse.linalg.LinearOperator`` on vectors.

    Args:
        apply: of [m, C, D], float64, m >= 1.

    Raises:
        InputError: scipy is not installed.
    """
    check_installed("linear_operator()", "scipy.sparse.linalg")
    import numpy as np
    from scipy.sparse.linalg import LinearOperator

    order = shape[0] * shape[1]

    def many(columns: Any) -> Any:
        """[P, k] to [P, k]."""
        columns = np.asarray(columns)
        if np.iscomplexobj(columns):
            raise InputError(
                f"the operator is real and was given {columns.dtype}; apply it to the real and "
                "the imaginary part"
            )
        if not columns.shape[1]:
            return np.zeros((order, 0))
        rows = torch.from_numpy(np.array(columns.T, dtype=np.float64, order="C")).to(device)
        found = apply(vector_to_matrix(rows, shape[0], has_bias)).double()
        return matrix_to_vector(found, has_bias).cpu().numpy().T

    def one(x: Any) -> Any:
        return many(np.asarray(x).reshape(order, 1))[:, 0]

    return LinearOperator(
        (order, order), matvec=one, rmatvec=one, matmat=many, rmatmat=many, dtype=np.float64
    )
