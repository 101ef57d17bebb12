"""The solution of linear equations in ONNX, which has no operator for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from onnxscript import DOUBLE, FLOAT, opset18, script

op: Any = opset18

if TYPE_CHECKING:
    Matrix: TypeAlias = Any
    DoubleMatrix: TypeAlias = Any
else:  # onnxscript reads these
    Matrix, DoubleMatrix = FLOAT[...], DOUBLE[...]

_FLOAT, _DOUBLE = 1, 11


@script(default_opset=op)
def invert(matrix: Matrix) -> DoubleMatrix:
    """The inverse of a symmetric positive definite matrix `(n, n)`, by Gauss-Jordan elimination in place.

    Such matrices need no pivoting. Each of the n steps changes the matrix A to A - (a - e) (b + e) / p, where a and b
    are a column and the row of the same number, p is the number where they meet, and e is that unit vector. The matrix
    is first scaled to a diagonal of ones. So no p exceeds 1, and nothing cancels out.
    """
    matrix = op.Cast(matrix, to=_DOUBLE)
    diagonal = op.ReduceSum(matrix * op.EyeLike(matrix), op.Constant(value_ints=[1]))
    scales = op.Sqrt(op.Reciprocal(diagonal * op.Transpose(diagonal)))
    inverse = matrix * scales
    n = op.Gather(op.Shape(matrix), op.Constant(value_int=0))
    numbers = op.Range(op.Constant(value_int=0), n, op.Constant(value_int=1))
    for i in range(n):
        index = op.Reshape(i, op.Constant(value_ints=[1]))
        unit = op.Cast(op.Equal(numbers, i), to=_DOUBLE)
        column = op.Gather(inverse, index, axis=1)
        row = op.Gather(inverse, index, axis=0)
        pivot = op.Gather(row, index, axis=1)
        inverse = inverse - (column - op.Unsqueeze(unit, op.Constant(value_ints=[1]))) * ((row + unit) / pivot)
    return inverse * scales


def solve(matrix: Matrix, right: Matrix, left: bool = True) -> Matrix:
    """`torch.linalg.solve` for a symmetric positive definite matrix `(n, n)` and a right side `(n, m)`, in float32."""
    return op.Cast(op.MatMul(invert(matrix), op.Cast(right, to=_DOUBLE)), to=_FLOAT)


#: What `torch.onnx.export` is told of operators that it does not know.
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.linalg_solve.default: solve}
