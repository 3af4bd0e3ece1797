"""Signed distances of the five unit shapes, and marching along rays through them.

Positions are in an object's frame: its center at the origin, its `radius` as the unit, its yaw undone. Only
+ - * / sqrt min max are used: they are exactly rounded, so results do not depend on how rays are batched.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from miniature.vec3 import Vector, dot_product, length2, length3, normalize_vector

SignedDistance = Callable[[Tensor, Tensor, Tensor], Tensor]

MARCH_STEPS = 28
COMPACT_EVERY = 7
HIT_DISTANCE = 1e-3
SHADOW_STEPS = 14
SHADOW_SHARPNESS = 5.0
SHADOW_MARGIN = 0.35  # beyond the bounding sphere, for the penumbra

SPHERE_RADIUS = 0.98
CUBE_HALF, CUBE_ROUND = 0.72, 0.06
CYLINDER_RADIUS, CYLINDER_HALF, CYLINDER_ROUND = 0.76, 0.82, 0.05
CONE_RADIUS, CONE_BASE, CONE_APEX, CONE_ROUND = 0.92, -0.80, 1.02, 0.04
TORUS_RING, TORUS_TUBE = 0.70, 0.28


def _sphere(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return length3(x, y, z) - SPHERE_RADIUS


def _cube(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    edge = CUBE_HALF - CUBE_ROUND
    dx, dy, dz = x.abs() - edge, y.abs() - edge, z.abs() - edge
    outside = length3(dx.clamp(min=0), dy.clamp(min=0), dz.clamp(min=0))
    return outside + torch.maximum(dx, torch.maximum(dy, dz)).clamp(max=0) - CUBE_ROUND


def _cylinder(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    across = length2(x, z) - (CYLINDER_RADIUS - CYLINDER_ROUND)
    along = y.abs() - (CYLINDER_HALF - CYLINDER_ROUND)
    outside = length2(across.clamp(min=0), along.clamp(min=0))
    return outside + torch.maximum(across, along).clamp(max=0) - CYLINDER_ROUND


def _cone(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Distance to the triangle (0, apex), (rim, base), (0, base) in the plane of (distance to axis, y)."""
    rim, base, apex = CONE_RADIUS - CONE_ROUND, CONE_BASE + CONE_ROUND, CONE_APEX - CONE_ROUND
    q = length2(x, z)
    dx, dy = rim, base - apex  # the slant, from apex to rim
    along = ((q * dx + (y - apex) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    to_slant = length2(q - along * dx, y - apex - along * dy)
    to_base = length2((q - rim).clamp(min=0), y - base)
    beyond_slant = -q * dy + (y - apex) * dx
    inside = (beyond_slant < 0) & (y > base)
    distance = torch.minimum(to_slant, to_base)
    return torch.where(inside, -distance, distance) - CONE_ROUND


def _torus(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """An upright ring, with z as its axis."""
    return length2(length2(x, y) - TORUS_RING, z) - TORUS_TUBE


# shape: (distance, height of the center above the ground, bounding radius)
SHAPE_TABLE: dict[str, tuple[SignedDistance, float, float]] = {
    "sphere": (_sphere, SPHERE_RADIUS, SPHERE_RADIUS),
    "cube": (_cube, CUBE_HALF, 1.22),
    "cylinder": (_cylinder, CYLINDER_HALF, 1.12),
    "cone": (_cone, -CONE_BASE, 1.23),
    "torus": (_torus, TORUS_RING + TORUS_TUBE, TORUS_RING + TORUS_TUBE),
}


def march(shape: str, origin: Vector, direction: Vector) -> Tensor:
    """Sphere tracing of rays [N] with unit `direction`. Returns ray lengths [N], inf for a miss."""
    # Only rays that hit the bounding sphere are marched, between its two intersections.
    distance, _, bound = SHAPE_TABLE[shape]
    closest = -dot_product(origin, direction)
    chord = bound * bound - (dot_product(origin, origin) - closest * closest)
    half = chord.clamp(min=0).sqrt()
    result = torch.full_like(closest, torch.inf)
    live = (chord > 0).nonzero().squeeze(1)
    start, stop = closest - half, closest + half
    rays = [value[live] for value in (*origin, *direction, stop)]
    t = start[live]
    for step in range(MARCH_STEPS):
        ox, oy, oz, dx, dy, dz, end = rays
        h = distance(ox + t * dx, oy + t * dy, oz + t * dz)
        t = t + h
        # Now and then, drop rays that have hit the surface or left the sphere.
        if step % COMPACT_EVERY == COMPACT_EVERY - 1:
            hit = h < (HIT_DISTANCE if step < MARCH_STEPS - 1 else 10 * HIT_DISTANCE)
            result[live[hit]] = t[hit]
            keep = (~hit & (t < end)).nonzero().squeeze(1)
            live, t = live[keep], t[keep]
            rays = [value[keep] for value in rays]
    return result


def surface_normals(shape: str, x: Tensor, y: Tensor, z: Tensor) -> Vector:
    """Return unit normals at [N] points: the distance's gradient from four samples of a tetrahedron."""
    distance, e = SHAPE_TABLE[shape][0], 0.01
    a, b = distance(x + e, y - e, z - e), distance(x - e, y - e, z + e)
    c, d = distance(x - e, y + e, z - e), distance(x + e, y + e, z + e)
    return normalize_vector((a - b - c + d, c + d - a - b, b + d - a - c))


def soft_shadow(shape: str, origin: Vector, light: Vector) -> Tensor:
    """Return how much light reaches [N] points past the shape, 0 to 1; penumbra = sharpness * h / t."""
    distance, _, bound = SHAPE_TABLE[shape]
    reach = bound + SHADOW_MARGIN
    closest = -dot_product(origin, light)
    gap2 = dot_product(origin, origin) - closest * closest
    result = torch.ones_like(closest)
    # Only rays that pass near the bounding sphere can be shadowed.
    live = ((gap2 < reach * reach) & (closest > -bound)).nonzero().squeeze(1)
    ox, oy, oz, lx, ly, lz = (value[live] for value in (*origin, *light))
    t = (closest[live] - bound).clamp(min=0.03)
    lit = torch.ones_like(t)
    # Sphere tracing; the narrowest gap relative to the distance gives the penumbra.
    for _ in range(SHADOW_STEPS):
        h = distance(ox + t * lx, oy + t * ly, oz + t * lz)
        lit = torch.minimum(lit, SHADOW_SHARPNESS * h / t)
        t = t + h.clamp(0.06, 0.5)
    lit = lit.clamp(0, 1)
    result[live] = lit * lit * (3 - 2 * lit)
    return result
