"""Renders scenes by sphere tracing and shading in vectorized torch.

Every value is computed per ray with exactly rounded operations, so an image does not depend on its batch.
Colors are linear during rendering; images have gamma 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miniature.scene import Scene
from miniature.scene_tensors import (
    Objects,
    Views,
    by_shape,
    make_objects,
    make_views,
    pixel_axis,
    ray_directions,
)
from miniature.sdf import march
from miniature.shading import shade_ground, shade_objects
from miniature.vec3 import Vector, dot_product, point_along, take_rows

SCENES_PER_CHUNK = 16  # scenes at a time, so that temporaries fit the CPU cache
SAMPLES_PER_AXIS = 3  # per pixel and axis, for objects; the ground is smooth and needs one


def render_scenes(scenes: Sequence[Scene], size: int = 64) -> Tensor:
    """Render scenes to uint8 [B, 3, size, size]. Images are bit-equal under any batching."""
    chunks = [
        _render_chunk(scenes[i : i + SCENES_PER_CHUNK], size) for i in range(0, len(scenes), SCENES_PER_CHUNK)
    ]
    return torch.cat(chunks) if chunks else torch.empty(0, 3, size, size, dtype=torch.uint8)


@torch.no_grad()
def _render_chunk(scenes: Sequence[Scene], size: int) -> Tensor:
    views, objects = make_views(scenes), make_objects(scenes)
    fine = size * SAMPLES_PER_AXIS

    # Objects: (object, ray) pairs whose ray passes the bounding sphere, marched by shape.
    item, ray = _pairs(views, objects, fine)
    scene = objects.scene[item]
    direction = ray_directions(views, scene, ray, fine)
    camera = take_rows(views.camera, scene)
    length = by_shape(objects, item, march, camera, direction) * objects.radius[item]
    visible = _nearest(scene * fine * fine + ray, objects.slot[item], length, len(scenes) * fine * fine)
    item, ray, scene, length = item[visible], ray[visible], scene[visible], length[visible]
    direction = take_rows(direction, visible)
    camera = take_rows(camera, visible)
    point = point_along(camera, direction, length)
    color = shade_objects(views, objects, scene, item, point, direction)

    # Ground: one sample per pixel.
    ground, ground_point = _ground_points(views, len(scenes), size)
    backdrop = shade_ground(views, objects, ground, ground_point).view(3, len(scenes), size, size)

    # Each pixel is the mean of its samples, in linear light.
    total = (
        backdrop.repeat_interleave(SAMPLES_PER_AXIS, 2).repeat_interleave(SAMPLES_PER_AXIS, 3).reshape(3, -1)
    )
    total[:, scene * fine * fine + ray] = color
    total = total.view(3, len(scenes), size, SAMPLES_PER_AXIS, size, SAMPLES_PER_AXIS)
    parts = [total[:, :, :, i, :, j] for i in range(SAMPLES_PER_AXIS) for j in range(SAMPLES_PER_AXIS)]
    mean = sum(parts[1:], parts[0]) / SAMPLES_PER_AXIS**2
    return (mean.clamp(0, 1).sqrt() * 255 + 0.5).to(torch.uint8).transpose(0, 1).contiguous()


def _pairs(views: Views, objects: Objects, fine: int) -> tuple[Tensor, Tensor]:
    """Return the pairs (object, ray within the image) whose ray may hit the object's bounding sphere."""
    camera = take_rows(views.camera, objects.scene)
    offset = (objects.center[0] - camera[0], objects.center[1] - camera[1], objects.center[2] - camera[2])
    depth = dot_product(offset, take_rows(views.forward, objects.scene))
    scale = 1 / (depth * views.tan[objects.scene])
    u, v = offset[0] * scale, dot_product(offset, take_rows(views.up, objects.scene)) * scale
    reach = 1.03 * objects.radius * objects.bound * scale  # 3 % for perspective
    axis = pixel_axis(fine)
    du, dv = axis[None] - u[:, None], -axis[None] - v[:, None]
    near = (du * du)[:, None, :] + (dv * dv)[:, :, None] < (reach * reach)[:, None, None]
    item, ray = near.view(len(objects.shape), -1).nonzero().unbind(1)
    return item, ray


def _nearest(cell: Tensor, slot: Tensor, length: Tensor, num_cells: int) -> Tensor:
    """Return the indices of the hits that are first along their ray; a ray has at most one hit per slot."""
    owner = torch.full((num_cells,), -1)
    hits = [((slot == k) & length.isfinite()).nonzero().squeeze(1) for k in (0, 1)]
    owner[cell[hits[0]]] = hits[0]
    before = owner[cell[hits[1]]]
    closer = hits[1][(before < 0) | (length[hits[1]] < length[before])]
    owner[cell[closer]] = closer
    return owner[owner >= 0]


def _ground_points(views: Views, num: int, size: int) -> tuple[Tensor, Vector]:
    """Return the scene and the ground point of every pixel's center; every ray reaches the ground."""
    scene = torch.arange(num).repeat_interleave(size * size)
    direction = ray_directions(views, scene, torch.arange(size * size).repeat(num), size)
    camera = take_rows(views.camera, scene)
    return scene, point_along(camera, direction, -camera[1] / direction[1])
