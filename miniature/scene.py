"""The data of a scene: facts that its caption says, and placements and a view that the caption leaves open.

World axes: x to the right, y up, z towards the camera. The ground is y = 0, and objects stand on it at (x,
z). One world unit is about 10.7 pixels of a 64-pixel image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from miniature.captions import ObjectSpec, SceneFacts

FIELD_OF_VIEW_TAN = 3.0 / 16.0  # half the image's width over the distance to the target
CAMERA_DISTANCE = 16.0
TARGET_HEIGHT = 0.75


@dataclass(frozen=True, slots=True)
class Placement:
    """An object's `radius` (its unit of length), ground position x, z, and rotation `yaw` in radians."""

    radius: float
    x: float
    z: float
    yaw: float


@dataclass(frozen=True, slots=True)
class CameraView:
    """Camera and light: angles in radians, `zoom` about 1, `shift_x` the camera's offset to the right."""

    elevation: float
    zoom: float
    shift_x: float
    light_azimuth: float
    light_elevation: float


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene: its caption's `facts`, and `placements` (one per object) and `view`, which captions leave
    open.
    """

    facts: SceneFacts
    placements: tuple[Placement, ...]
    view: CameraView

    @property
    def objects(self) -> tuple[ObjectSpec, ...]:
        return self.facts.objects

    @property
    def relation(self) -> str | None:
        return self.facts.relation

    @property
    def background(self) -> str:
        return self.facts.background


def project(view: CameraView, x: float, y: float, z: float) -> tuple[float, float, float]:
    """Project a world point to (right, up), -1 to 1 across the image, and the length of a world unit."""
    sin, cos = math.sin(view.elevation), math.cos(view.elevation)
    x, y = x - view.shift_x, y - TARGET_HEIGHT
    scale = view.zoom / (FIELD_OF_VIEW_TAN * (CAMERA_DISTANCE - y * sin - z * cos))
    return x * scale, (y * cos - z * sin) * scale, scale
