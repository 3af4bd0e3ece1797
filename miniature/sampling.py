"""Samples scenes of the miniature world: functions of (seed, index), or of (caption, seed, index)."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch

from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from miniature.captions import (
    BACKGROUNDS,
    RELATIONS,
    SCENE_SPLITS,
    SIZES,
    TRIPLES,
    ObjectSpec,
    SceneFacts,
    parse_caption,
)
from miniature.render import render_scenes
from miniature.scene import CameraView, Placement, Scene, project

T = TypeVar("T")
ScreenDisc = tuple[float, float, float]  # right, up, radius on the screen

# A large sphere is about 21-28 pixels across, a small one 14-19: the bands stay apart at every depth.
RADII = {"large": (1.10, 1.24), "small": (0.72, 0.82)}
PROB_TWO_OBJECTS = 0.6
MAX_OVERLAP = 0.15  # largest share of the farther object's disc that the nearer one may cover
SCREEN_MARGIN = 0.03  # free border, in half image widths
MAX_DEPTH = 0.5  # between two objects side by side
MIN_DEPTH = 1.5  # between an object in front and one behind
MAX_DRAWS = 20_000  # the hardest captions, two large objects side by side, take about 20 on average


def caption_of(scene: Scene) -> str:
    """Return the caption of a scene; `parse_caption` of it equals `scene.facts`."""
    return str(scene.facts)


def sample_scene(seed: int, index: int, split: str = "train") -> Scene:
    """Return scene `index` of a seed. It equals scene_from_caption(its caption, seed, index)."""
    facts = sample_facts(seed, index, split)
    return _place(facts, seed, index)


def scene_from_caption(text: str, seed: int, index: int) -> Scene:
    """Return a scene that the caption describes; (seed, index) decides what the caption leaves open.

    Raises UserError for a caption that `parse_caption` does not accept.
    """
    return _place(parse_caption(text), seed, index)


def sample_facts(seed: int, index: int, split: str = "train") -> SceneFacts:
    """Sample the facts of scene `index`: 40 % have one object, the others two different ones.

    A "train" scene has no held-out (color, shape, material), a "heldout" scene has at least one. Raises
    UserError for another split.
    """
    if split not in SCENE_SPLITS:
        raise UserError(f"unknown split {split!r}: expected {' or '.join(SCENE_SPLITS)}")
    rng = _generator(seed, index, 1 + SCENE_SPLITS.index(split))
    # Attributes that decide the split first.
    num_objects = 2 if rng.random() < PROB_TWO_OBJECTS else 1
    triples = [_pick(rng, TRIPLES[split])]
    if num_objects == 2:
        others = TRIPLES["train" if split == "train" else "all"]
        triples.append(_pick(rng, tuple(other for other in others if other != triples[0])))
        rng.shuffle(triples)
    objects = tuple(
        ObjectSpec(_pick(rng, SIZES), color, material, shape) for color, shape, material in triples
    )
    relation = _pick(rng, RELATIONS) if num_objects == 2 else None
    return SceneFacts(objects, relation, _pick(rng, BACKGROUNDS))


def scene_captions(num: int, seed: int, split: str = "train") -> list[str]:
    """Return the captions of the first `num` scenes of a seed."""
    return [str(sample_facts(seed, index, split)) for index in range(num)]


def render_dataset(
    num: int, seed: int, split: str = "train", progress: Progress = quiet, batch: int = 64
) -> tuple[torch.Tensor, list[str]]:
    """Return images, uint8 [num, 3, 64, 64], and captions of the first `num` scenes of a seed."""
    images = torch.empty(num, 3, 64, 64, dtype=torch.uint8)
    texts: list[str] = []
    for start in range(0, num, batch):
        scenes = [sample_scene(seed, index, split) for index in range(start, min(start + batch, num))]
        images[start : start + len(scenes)] = render_scenes(scenes)
        texts.extend(map(caption_of, scenes))
        progress("render scenes", len(texts), num)
    return images, texts


def _place(facts: SceneFacts, seed: int, index: int) -> Scene:
    """Sample views and placements until the objects are in the image, apart, and in their relation."""
    rng = _generator(seed, index, 0)
    for _ in range(MAX_DRAWS):
        # Camera and light of one attempt.
        view = CameraView(
            elevation=math.radians(rng.uniform(22.0, 27.0)),
            zoom=rng.uniform(0.97, 1.03),
            shift_x=rng.uniform(-0.12, 0.12),
            light_azimuth=math.radians(rng.uniform(-75.0, -30.0)),
            light_elevation=math.radians(rng.uniform(44.0, 60.0)),
        )
        scene = Scene(facts, _placements(rng, facts), view)
        if _is_clear(scene):
            return scene
    raise AssertionError(f"no placement found for {facts} with seed {seed}, index {index}")


def _placements(rng: np.random.Generator, facts: SceneFacts) -> tuple[Placement, ...]:
    """Sample placements, sorted as the relation requires, so that few are rejected."""
    count = len(facts.objects)
    x = rng.uniform(-2.3, 2.3, count)
    z = rng.uniform(-2.4, 2.0, count)
    if facts.relation in ("left of", "right of"):
        z[1:] = z[0] + rng.uniform(-MAX_DEPTH, MAX_DEPTH)
        x = np.sort(x) if facts.relation == "left of" else -np.sort(-x)
    elif count == 2:
        z = np.sort(z) if facts.relation == "behind" else -np.sort(-z)
    radii = [rng.uniform(*RADII[item.size]) for item in facts.objects]
    # 11 to 45 degrees in either direction, so that a cube shows two sides and a torus its hole.
    yaws = rng.uniform(0.2, 0.8, count) * rng.choice([-1.0, 1.0], count)
    return tuple(Placement(r, float(x[k]), float(z[k]), float(yaws[k])) for k, r in enumerate(radii))


def _is_clear(scene: Scene) -> bool:
    # Every object lies inside the image.
    discs: list[ScreenDisc] = []
    for spot in scene.placements:
        right, up, scale = project(scene.view, spot.x, 0.9 * spot.radius, spot.z)
        radius = spot.radius * scale
        if max(abs(right), abs(up)) + radius > 1.0 - SCREEN_MARGIN:
            return False
        discs.append((right, up, radius))
    if len(discs) == 1:
        return True
    # Two objects are in their relation, and the near one leaves the far one visible.
    far, near = sorted((0, 1), key=lambda k: scene.placements[k].z)
    return _relation_holds(scene) and _covered(discs[far], discs[near]) <= MAX_OVERLAP


def _relation_holds(scene: Scene) -> bool:
    """Whether objects left/right are apart sideways only, and objects in front/behind in depth, both
    visible.
    """
    first, second = scene.placements
    reach = first.radius + second.radius
    sideways, depth = first.x - second.x, first.z - second.z
    if math.hypot(sideways, depth) < 1.08 * reach:
        return False
    if scene.relation in ("left of", "right of"):
        sign = -1.0 if scene.relation == "left of" else 1.0
        return sign * sideways >= reach and abs(depth) <= MAX_DEPTH
    sign = 1.0 if scene.relation == "in front of" else -1.0
    return sign * depth >= MIN_DEPTH and abs(sideways) >= 0.7


def _covered(far: ScreenDisc, near: ScreenDisc) -> float:
    """Return the share of the farther disc that the nearer one covers (the lens between two circles)."""
    distance = math.hypot(near[0] - far[0], near[1] - far[1])
    if distance >= near[2] + far[2]:
        return 0.0
    if distance <= abs(near[2] - far[2]):
        return 1.0
    r, s = near[2], far[2]
    angle_r = math.acos((distance**2 + r**2 - s**2) / (2 * distance * r))
    angle_s = math.acos((distance**2 + s**2 - r**2) / (2 * distance * s))
    lens = r**2 * (angle_r - math.sin(2 * angle_r) / 2) + s**2 * (angle_s - math.sin(2 * angle_s) / 2)
    return lens / (math.pi * s**2)


def _generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """Stream 0 is for what captions leave open; each split has its own stream for attributes."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, index, stream))))


def _pick(rng: np.random.Generator, values: tuple[T, ...]) -> T:
    return values[int(rng.integers(len(values)))]
