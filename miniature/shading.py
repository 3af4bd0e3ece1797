"""Shading: the linear color that surfaces and the ground reflect to the camera."""

from __future__ import annotations

import torch
from torch import Tensor

from miniature.scene_tensors import Objects, Views, by_shape, rows_by_shape, to_local
from miniature.sdf import soft_shadow, surface_normals
from miniature.vec3 import Vector, dot_product, normalize_vector, take_rows


def shade_objects(
    views: Views, objects: Objects, scene: Tensor, item: Tensor, point: Vector, direction: Vector
) -> Tensor:
    """Return the linear color [3, N] of surface points.

    Matte surfaces have Lambertian light and a sky, metal ones reflect a studio.
    """
    normal = _world_normals(objects, item, point)
    light, ground = take_rows(views.light, scene), views.ground[:, scene]
    albedo, metal = objects.color[:, item], objects.metal[item]
    other = objects.other[item]
    lit = torch.ones_like(point[0])
    pair = (other >= 0).nonzero().squeeze(1)
    lit[pair] = by_shape(objects, other[pair], soft_shadow, take_rows(point, pair), take_rows(light, pair))

    # Matte: sun, sky and light from the ground.
    facing = dot_product(normal, light)
    sun = facing.clamp(min=0) * lit
    sky = 0.5 + 0.5 * normal[1]
    near_ground = (point[1] / (0.6 * objects.radius[item])).clamp(0, 1)
    open_sky = 0.55 + 0.45 * near_ground
    matte = albedo * (1.12 * sun + 0.26 * sky * open_sky + 0.02)
    matte = matte + albedo * ground * (0.22 * (1 - sky) * open_sky)

    # Metal: the reflected studio, a highlight, and a Fresnel term.
    mirrored = _reflect(direction, normal)
    glint = dot_product(mirrored, light).clamp(min=0)
    glint = _power(glint, 5) * lit
    edge = 1 + dot_product(direction, normal).clamp(max=0)
    fresnel = edge * edge * edge
    studio = _studio(objects, item, point, mirrored, ground)
    tint = albedo + (1 - albedo) * (0.5 * fresnel)
    metal_color = tint * studio * (0.55 + 0.45 * lit) * open_sky + albedo * (0.18 * sun) + 1.6 * glint
    return torch.where(metal, metal_color, matte)


def _world_normals(objects: Objects, item: Tensor, point: Vector) -> Vector:
    local = to_local(objects, item, point)
    cos, sin = objects.cos[item], objects.sin[item]
    nx, ny, nz = (torch.empty_like(cos) for _ in range(3))
    for shape, rows in rows_by_shape(objects, item):
        nx[rows], ny[rows], nz[rows] = surface_normals(shape, *take_rows(local, rows))
    return cos * nx + sin * nz, ny, cos * nz - sin * nx


def _studio(objects: Objects, item: Tensor, point: Vector, mirrored: Vector, ground: Tensor) -> Tensor:
    """The reflected environment: floor, dark horizon, a sky that brightens upwards, and a bright lamp panel.

    It depends on the ray's start as well as its direction, as in a room. Otherwise each flat face would
    reflect a single color.
    """
    x, y, z = (
        m + 0.55 * (p - c[item]) / objects.radius[item]
        for m, p, c in zip(mirrored, point, objects.center, strict=True)
    )
    x, y, z = normalize_vector((x, y, z))
    sky = 0.10 + 1.25 * _ramp(y, 0.05, 0.95)
    panel_height = _ramp(y, 0.30, 0.38) * (1 - _ramp(y, 0.58, 0.66))
    panel = 1.7 * panel_height * _ramp(x, -0.75, -0.6) * (1 - _ramp(x, 0.1, 0.25))
    above = _ramp(y, -0.06, 0.06)
    strip = 0.9 * _ramp(x, -0.72, -0.50) * (1 - _ramp(x, -0.36, -0.14)) * (1 - above)
    floor = ground * (0.75 * _ramp(-y, -0.05, 0.9)) + 0.02
    return floor * (1 - above) + strip + (sky + panel) * above


def shade_ground(views: Views, objects: Objects, scene: Tensor, point: Vector) -> Tensor:
    """Return the linear color [3, N] of ground points: a floor with shadows that fades into a paler wall."""
    light = take_rows(views.light, scene)
    shadow, contact = torch.ones_like(point[0]), torch.ones_like(point[0])
    for slot in (0, 1):
        # Shadow and contact shadow of each scene's object in this slot.
        owners = (objects.slot == slot).nonzero().squeeze(1)
        table = torch.full((len(views.tan),), -1)  # index of each scene's object in this slot
        table[objects.scene[owners]] = owners
        item = table[scene]
        rows = (item >= 0).nonzero().squeeze(1)
        item = item[rows]
        here = take_rows(point, rows)
        shadow[rows] *= by_shape(objects, item, soft_shadow, here, take_rows(light, rows))
        dx, dz = here[0] - objects.center[0][item], here[2] - objects.center[2][item]
        gap = (dx * dx + dz * dz).sqrt() / objects.radius[item]
        contact[rows] *= 0.6 + 0.4 * _ramp(gap, 0.55, 1.5)
    # The floor, lit and shadowed, which fades into the wall.
    wall = _ramp(-point[2], 3.2, 5.6)
    spot = 1.06 - 0.012 * (point[0] * point[0] + point[2] * point[2])
    floor = spot.clamp(min=0.7) * (0.58 * shadow + 0.30 * contact)
    shade = floor + (1.02 - floor) * wall
    return views.ground[:, scene] * shade


def _ramp(x: Tensor, low: float, high: float) -> Tensor:
    """Smooth step from 0 at `low` to 1 at `high`."""
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _power(x: Tensor, doublings: int) -> Tensor:
    """x to the power 2**doublings, exactly rounded at each step (pow differs between vector lanes)."""
    for _ in range(doublings):
        x = x * x
    return x


def _reflect(direction: Vector, normal: Vector) -> Vector:
    twice = 2 * dot_product(direction, normal)
    return (
        direction[0] - twice * normal[0],
        direction[1] - twice * normal[1],
        direction[2] - twice * normal[2],
    )
