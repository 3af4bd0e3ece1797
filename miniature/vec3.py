"""3D vectors as three tensors of one shape, so that components are contiguous and operations exactly
rounded.
"""

from __future__ import annotations

from torch import Tensor

Vector = tuple[Tensor, Tensor, Tensor]


def dot_product(a: Vector, b: Vector) -> Tensor:
    """a . b"""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def normalize_vector(v: Vector) -> Vector:
    """Scale to unit length."""
    scale = 1 / length3(*v).clamp(min=1e-9)
    return v[0] * scale, v[1] * scale, v[2] * scale


def point_along(origin: Vector, direction: Vector, length: Tensor) -> Vector:
    """origin + length * direction"""
    return (
        origin[0] + length * direction[0],
        origin[1] + length * direction[1],
        origin[2] + length * direction[2],
    )


def take_rows(vector: Vector, rows: Tensor) -> Vector:
    """Index every component by `rows`."""
    return vector[0][rows], vector[1][rows], vector[2][rows]


def length2(x: Tensor, y: Tensor) -> Tensor:
    """Length of a 2D vector."""
    return (x * x + y * y).sqrt()


def length3(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Length of a 3D vector."""
    return (x * x + y * y + z * z).sqrt()
