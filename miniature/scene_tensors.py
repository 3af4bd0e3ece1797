"""Scenes as tensors: one row per image (`Views`) and one per object (`Objects`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miniature.captions import SHAPES
from miniature.scene import CAMERA_DISTANCE, FIELD_OF_VIEW_TAN, TARGET_HEIGHT, Scene
from miniature.sdf import SHAPE_TABLE
from miniature.vec3 import Vector, normalize_vector, take_rows

RayFunction = Callable[[str, Vector, Vector], Tensor]

# Display colors, 0 to 1.
OBJECT_COLORS = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.16, 0.68, 0.18),
    "blue": (0.14, 0.28, 0.90),
    "yellow": (0.96, 0.83, 0.10),
    "purple": (0.56, 0.16, 0.80),
    "cyan": (0.12, 0.82, 0.92),
}
BACKGROUND_COLORS = {
    "pink": (0.96, 0.66, 0.76),
    "gray": (0.50, 0.50, 0.52),
    "white": (0.96, 0.96, 0.95),
    "teal": (0.08, 0.42, 0.40),
    "brown": (0.48, 0.31, 0.18),
}


@dataclass(frozen=True, slots=True)
class Views:
    """Per scene, [B] each. `tan` is that of half the field of view, `light` the direction to the light."""

    camera: Vector
    forward: Vector
    up: Vector
    tan: Tensor
    light: Vector
    ground: Tensor  # [3, B], linear


@dataclass(frozen=True, slots=True)
class Objects:
    """Per object, [K] each, ordered by scene. `slot` is 0 or 1 in its scene, `bound` in units of `radius`."""

    scene: Tensor
    slot: Tensor
    other: Tensor  # index of the scene's other object, or -1
    shape: list[str]
    center: Vector
    radius: Tensor
    bound: Tensor
    cos: Tensor
    sin: Tensor
    color: Tensor  # [3, K], linear
    metal: Tensor


def make_views(scenes: Sequence[Scene]) -> Views:
    """Compute camera and light of each scene."""

    def column(value: Callable[[Scene], float]) -> Tensor:
        return torch.tensor([value(scene) for scene in scenes], dtype=torch.float32)

    zero = torch.zeros(len(scenes))
    sin, cos = column(lambda s: math.sin(s.view.elevation)), column(lambda s: math.cos(s.view.elevation))
    shift = column(lambda s: s.view.shift_x)
    return Views(
        camera=(shift, TARGET_HEIGHT + CAMERA_DISTANCE * sin, CAMERA_DISTANCE * cos),
        forward=(zero, -sin, -cos),
        up=(zero, cos, -sin),
        tan=column(lambda s: FIELD_OF_VIEW_TAN / s.view.zoom),
        light=(
            column(lambda s: math.cos(s.view.light_elevation) * math.sin(s.view.light_azimuth)),
            column(lambda s: math.sin(s.view.light_elevation)),
            column(lambda s: math.cos(s.view.light_elevation) * math.cos(s.view.light_azimuth)),
        ),
        ground=linear_light([BACKGROUND_COLORS[s.background] for s in scenes]),
    )


def make_objects(scenes: Sequence[Scene]) -> Objects:
    """Collect the objects of all scenes, with the constants that rendering needs."""
    # One row per object; `other` is the row of the second object of its scene.
    rows = [(b, k) for b, scene in enumerate(scenes) for k in range(len(scene.objects))]
    specs = [scenes[b].objects[k] for b, k in rows]
    spots = [scenes[b].placements[k] for b, k in rows]
    others = [i + (1 - 2 * k) if len(scenes[b].objects) == 2 else -1 for i, (b, k) in enumerate(rows)]
    heights = [SHAPE_TABLE[spec.shape][1] * spot.radius for spec, spot in zip(specs, spots, strict=True)]
    bounds = [SHAPE_TABLE[spec.shape][2] for spec in specs]

    # All fields have one entry per row, so that rendering runs over all scenes at once.
    return Objects(
        scene=torch.tensor([b for b, _ in rows]),
        slot=torch.tensor([k for _, k in rows]),
        other=torch.tensor(others),
        shape=[spec.shape for spec in specs],
        center=(
            torch.tensor([s.x for s in spots]),
            torch.tensor(heights),
            torch.tensor([s.z for s in spots]),
        ),
        radius=torch.tensor([s.radius for s in spots]),
        bound=torch.tensor(bounds),
        cos=torch.tensor([math.cos(s.yaw) for s in spots]),
        sin=torch.tensor([math.sin(s.yaw) for s in spots]),
        color=linear_light([OBJECT_COLORS[spec.color] for spec in specs]),
        metal=torch.tensor([spec.material == "metal" for spec in specs]),
    )


def linear_light(colors: list[tuple[float, float, float]]) -> Tensor:
    """Convert display colors to linear light [3, N] (gamma 2)."""
    display = torch.tensor(colors, dtype=torch.float32).T
    return (display * display).contiguous()


def pixel_axis(count: int) -> Tensor:
    """Return the centers of `count` pixels on an axis from -1 to 1."""
    return (torch.arange(count) + 0.5) * (2 / count) - 1


def ray_directions(views: Views, scene: Tensor, ray: Tensor, count: int) -> Vector:
    """Return unit directions [N] of the rays with index `ray` in count x count images of `scene`."""
    axis, tan = pixel_axis(count), views.tan[scene]
    u, v = axis[ray % count] * tan, -axis[ray // count] * tan
    forward, up = take_rows(views.forward, scene), take_rows(views.up, scene)
    return normalize_vector((u, forward[1] + v * up[1], forward[2] + v * up[2]))


def by_shape(
    objects: Objects, item: Tensor, function: RayFunction, position: Vector, direction: Vector
) -> Tensor:
    """Evaluate function(shape, position, direction) in the frame of each object in `item`: returns [N]."""
    local = to_local(objects, item, position)
    cos, sin = objects.cos[item], objects.sin[item]
    turned = (cos * direction[0] - sin * direction[2], direction[1], sin * direction[0] + cos * direction[2])
    result = torch.empty_like(cos)
    for shape, rows in rows_by_shape(objects, item):
        result[rows] = function(shape, take_rows(local, rows), take_rows(turned, rows))
    return result


def rows_by_shape(objects: Objects, item: Tensor) -> list[tuple[str, Tensor]]:
    """Return, for each shape, the rows of `item` whose object has it."""
    kinds = torch.tensor([SHAPES.index(shape) for shape in objects.shape])[item]
    return [(shape, (kinds == kind).nonzero().squeeze(1)) for kind, shape in enumerate(SHAPES)]


def to_local(objects: Objects, item: Tensor, point: Vector) -> Vector:
    """Transform world points to their object's frame: center at 0, radius as unit, yaw undone."""
    cos, sin, inverse = objects.cos[item], objects.sin[item], 1 / objects.radius[item]
    x, y, z = (p - c[item] for p, c in zip(point, objects.center, strict=True))
    return (cos * x - sin * z) * inverse, y * inverse, (sin * x + cos * z) * inverse
