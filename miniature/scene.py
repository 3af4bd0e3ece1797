"""What a scene is: facts that its caption says, and placements and a view that it leaves open.

World axes: x to the right, y up, z towards the camera; the ground is y = 0. An object stands on it at (x, z).
One world unit is about 10.7 pixels of a 64-pixel picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from miniature.captions import ObjectSpec, SceneFacts

FIELD_OF_VIEW_TAN = 3.0 / 16.0  # half the picture's width over the distance to the target
CAMERA_DISTANCE = 16.0
TARGET_HEIGHT = 0.75


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an object stands: its unit length `radius`, ground position x, z, and turn `yaw` in radians."""

    radius: float
    x: float
    z: float
    yaw: float


@dataclass(frozen=True, slots=True)
class CameraView:
    """Angles in radians; `zoom` about 1; `shift_x`: how far the camera stands to the right."""

    elevation: float
    zoom: float
    shift_x: float
    light_azimuth: float
    light_elevation: float


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption says (`facts`) and what it leaves open (`placements`, one per object, and `view`)."""

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
    """(right, up) of a world point, -1 to 1 across the picture, and the length there of a world unit."""
    sin, cos = math.sin(view.elevation), math.cos(view.elevation)
    x, y = x - view.shift_x, y - TARGET_HEIGHT
    scale = view.zoom / (FIELD_OF_VIEW_TAN * (CAMERA_DISTANCE - y * sin - z * cos))
    return x * scale, (y * cos - z * sin) * scale, scale
