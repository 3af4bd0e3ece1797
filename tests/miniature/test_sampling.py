"""Scenes of the miniature: captions, placements and rendered images agree."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from d2g.core.errors import UserError
from miniature.captions import (
    BACKGROUNDS,
    COLORS,
    HELDOUT_TRIPLES,
    MATERIALS,
    RELATIONS,
    SCENE_SPLITS,
    SHAPES,
    ObjectSpec,
    SceneFacts,
    parse_caption,
    split_of,
)
from miniature.render import render_scenes
from miniature.sampling import (
    MAX_DEPTH,
    MIN_DEPTH,
    RADII,
    caption_of,
    render_dataset,
    sample_scene,
    scene_captions,
    scene_from_caption,
)
from miniature.scene import project
from miniature.scene_tensors import BACKGROUND_COLORS, OBJECT_COLORS
from miniature.sdf import SHAPE_TABLE, march, soft_shadow, surface_normals

EXAMPLE = "a large red metal sphere left of a small blue matte cube, pink background"
GOLDEN_MEAN = [133.13, 125.96, 126.64]


def show(text: str, index: int = 0) -> Tensor:
    """Render a caption: float image [3, 64, 64] in [0, 1]."""
    return render_scenes([scene_from_caption(text, 5, index)])[0].float() / 255


def near_color(picture: Tensor, color: str) -> Tensor:
    """Mask [64, 64] of the pixels whose hue is closer to this object color than to others or the ground."""
    hues = {
        name: torch.tensor(rgb) / sum(rgb) for name, rgb in {**OBJECT_COLORS, **BACKGROUND_COLORS}.items()
    }
    shade = picture / picture.sum(0, keepdim=True).clamp(min=1e-3)
    distance = torch.stack([(shade - hue.view(3, 1, 1)).square().sum(0) for hue in hues.values()])
    return distance.argmin(0) == list(hues).index(color)


# ---- captions


def test_parsing_an_example_caption():
    first, second = (
        ObjectSpec("large", "red", "metal", "sphere"),
        ObjectSpec("small", "blue", "matte", "cube"),
    )
    facts = SceneFacts((first, second), "left of", "pink")
    assert parse_caption(EXAMPLE) == facts
    assert str(facts) == EXAMPLE
    one = parse_caption("a small yellow matte cone, gray background")
    assert one == SceneFacts((ObjectSpec("small", "yellow", "matte", "cone"),), None, "gray")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_captions_parse_to_the_facts_of_their_scene(split):
    for index in range(100):
        scene = sample_scene(3, index, split)
        assert parse_caption(caption_of(scene)) == scene.facts


def test_capital_letters_and_spaces_are_ignored():
    assert parse_caption("  A large RED metal sphere  left of a small blue matte cube ,pink background ") == (
        parse_caption(EXAMPLE)
    )


@pytest.mark.parametrize(
    ("text", "got", "expected"),
    [
        ("a large gold metal sphere, pink background", "'gold'", "a color (red, green"),
        ("a large red metal dog, pink background", "'dog'", "a shape (sphere"),
        ("large red metal sphere, pink background", "'large'", "'a'"),
        ("a red metal sphere, pink background", "'red'", "a size (large, small)"),
        ("a large red metal sphere above a small red metal cone, pink background", "'above'", "left of"),
        ("a large red metal sphere, orange background", "'orange'", "a background (pink"),
        ("a large red metal sphere, pink", "the end", "'background'"),
        ("a large red metal sphere, pink background please", "'please'", "the end"),
        ("", "the end", "'a'"),
    ],
)
def test_invalid_captions_are_refused_with_the_bad_word(text, got, expected):
    with pytest.raises(UserError) as error:
        parse_caption(text)
    message = str(error.value)
    assert f"got {got} as word" in message and expected in message and "\n" not in message


# ---- scenes


def test_a_scene_depends_on_seed_and_index_only():
    assert sample_scene(1, 7) == sample_scene(1, 7)
    scenes = {sample_scene(seed, index).view for seed in (1, 2) for index in range(20)}
    assert len(scenes) == 40
    assert scene_from_caption(caption_of(sample_scene(1, 7)), 1, 7) == sample_scene(1, 7)
    assert scene_captions(5, seed=1) == [caption_of(sample_scene(1, index)) for index in range(5)]


def test_one_caption_has_many_scenes():
    scenes = [scene_from_caption(EXAMPLE, 1, index) for index in range(10)]
    assert {caption_of(scene) for scene in scenes} == {EXAMPLE}
    assert len({scene.placements for scene in scenes}) == 10


def test_heldout_combinations_are_not_in_the_train_split():
    for split in SCENE_SPLITS:
        assert all(split_of(parse_caption(text)) == split for text in scene_captions(400, 1, split))
    assert len(HELDOUT_TRIPLES) == len(COLORS) * len(SHAPES) * len(MATERIALS) // 10
    triples = {item.triple for text in scene_captions(2000, 1) for item in parse_caption(text).objects}
    assert len(triples) == 60 - len(HELDOUT_TRIPLES)  # train scenes contain all other combinations


def test_heldout_triples_are_pinned():
    assert ("green", "torus", "matte") in HELDOUT_TRIPLES
    assert ("cyan", "sphere", "metal") in HELDOUT_TRIPLES
    assert {color for color, _, _ in HELDOUT_TRIPLES} == set(COLORS)


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="unknown split 'test'"):
        sample_scene(1, 0, "test")


def test_attributes_are_uniform():
    scenes = [sample_scene(1, index) for index in range(2000)]
    two = [scene for scene in scenes if len(scene.objects) == 2]
    assert 0.56 < len(two) / len(scenes) < 0.64
    for values, read in (
        (RELATIONS, [scene.relation for scene in two]),
        (BACKGROUNDS, [scene.background for scene in scenes]),
        (SHAPES, [scene.objects[0].shape for scene in scenes]),
    ):
        for value in values:
            assert 0.75 < read.count(value) * len(values) / len(read) < 1.25


def test_placements_match_the_relation():
    for index in range(500):
        scene = sample_scene(4, index)
        for item, spot in zip(scene.objects, scene.placements, strict=True):
            assert RADII[item.size][0] <= spot.radius <= RADII[item.size][1]
        if scene.relation is None:
            continue
        first, second = scene.placements
        right, _, _ = project(scene.view, first.x - second.x + scene.view.shift_x, 0.75, 0.0)
        depth = first.z - second.z
        match scene.relation:
            case "left of":
                assert right < -0.4 and abs(depth) <= MAX_DEPTH
            case "right of":
                assert right > 0.4 and abs(depth) <= MAX_DEPTH
            case "in front of":
                assert depth >= MIN_DEPTH
            case "behind":
                assert depth <= -MIN_DEPTH


def test_objects_never_overlap():
    """Distances between the objects, sampled on their bounding circles."""
    widest = {"sphere": 0.98, "cube": 1.02, "cylinder": 0.76, "cone": 0.92, "torus": 0.98}
    for index in range(500):
        scene = sample_scene(6, index)
        if scene.relation is None:
            continue
        first, second = scene.placements
        reach = sum(
            widest[item.shape] * spot.radius
            for item, spot in zip(scene.objects, scene.placements, strict=True)
        )
        assert (first.x - second.x) ** 2 + (first.z - second.z) ** 2 > reach**2


# ---- images


def test_an_image_does_not_depend_on_its_batch():
    scenes = [sample_scene(2, index) for index in range(20)]
    batch = render_scenes(scenes)
    assert batch.shape == (20, 3, 64, 64) and batch.dtype == torch.uint8
    assert torch.equal(batch, torch.cat([render_scenes([scene]) for scene in scenes]))
    assert torch.equal(batch.flip(0), render_scenes(scenes[::-1]))
    assert render_scenes([]).shape == (0, 3, 64, 64)


def test_the_renderer_is_pinned():
    """Channel means of 32 scenes are those that the shipped models were trained on."""
    mean = render_scenes([sample_scene(1, index) for index in range(32)]).double().mean((0, 2, 3))
    assert mean.tolist() == pytest.approx(GOLDEN_MEAN, abs=0.05)


def test_rendering_at_half_size_gives_the_same_image():
    scenes = [sample_scene(2, index) for index in range(8)]
    small = render_scenes(scenes, size=32).float()
    shrunk = torch.nn.functional.avg_pool2d(render_scenes(scenes).float(), 2)
    assert (small - shrunk).abs().mean() < 3


@pytest.mark.parametrize(("size", "low", "high"), [("large", 20, 30), ("small", 13, 20)])
def test_object_sizes_in_pixels(size, low, high):
    for index in range(12):
        mask = near_color(show(f"a {size} red matte sphere, white background", index), "red")
        assert low <= int(mask.any(0).sum()) <= high


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_colors_are_distinguishable_on_every_background(color, background):
    picture = show(f"a large {color} matte sphere, {background} background")
    counts = {other: int(near_color(picture, other).sum()) for other in COLORS}
    assert max(counts, key=counts.__getitem__) == color
    assert counts[color] > 200


@pytest.mark.parametrize("shape", SHAPES)
def test_metal_has_highlights(shape):
    """In the same scene, a metal object has a wider range of brightness than a matte one."""
    matte = scene_from_caption(f"a large purple matte {shape}, gray background", 5, 1)
    metal_object = replace(matte.objects[0], material="metal")
    metal = replace(matte, facts=replace(matte.facts, objects=(metal_object,)))
    pictures = render_scenes([matte, metal]).float().mean(1) / 255
    mask = near_color(render_scenes([matte])[0].float() / 255, "purple")
    assert pictures[1][mask].std() > 1.3 * pictures[0][mask].std()


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_relation_is_visible_in_the_image(relation):
    for index in range(6):
        picture = show(
            f"a small red matte cube {relation} a large blue matte sphere, white background", index
        )
        red, blue = (near_color(picture, color).nonzero().float() for color in ("red", "blue"))
        assert len(red) > 80 and len(blue) > 200  # neither hides the other
        right = float(red[:, 1].mean() - blue[:, 1].mean())
        down = float(red[:, 0].quantile(0.97) - blue[:, 0].quantile(0.97))  # positions on the ground
        match relation:
            case "left of":
                assert right < -10
            case "right of":
                assert right > 10
            case "in front of":
                assert down > 4
            case "behind":
                assert down < -4


def test_objects_cast_shadows_away_from_the_light():
    """The light comes from the left, so the ground is darker right of an object than left of it."""
    scene = scene_from_caption("a large green matte cube, white background", 5, 2)
    scene = replace(scene, placements=(replace(scene.placements[0], x=0.0, z=0.0),))
    picture = render_scenes([scene])[0].float()
    left, right = picture[:, 38, 8:16].mean(), picture[:, 38, 45:53].mean()
    assert right < 0.8 * left


def test_the_nearer_object_occludes_the_farther_one():
    scene = scene_from_caption(
        "a large red matte cube in front of a large blue matte cube, white background", 5, 3
    )
    behind = replace(scene.placements[1], x=0.0, z=-1.5)
    hidden = replace(scene, placements=(replace(scene.placements[0], x=0.0, z=1.5), behind))
    swapped = replace(scene, placements=(behind, replace(scene.placements[0], x=0.0, z=1.5)))
    red, blue = (int(near_color(render_scenes([hidden])[0].float() / 255, c).sum()) for c in ("red", "blue"))
    assert red > 1.5 * blue
    red, blue = (int(near_color(render_scenes([swapped])[0].float() / 255, c).sum()) for c in ("red", "blue"))
    assert blue > 1.5 * red


def test_render_dataset_returns_images_with_their_captions():
    calls: list[tuple[int, int]] = []
    images, texts = render_dataset(
        10, 9, "heldout", lambda _, done, total: calls.append((done, total)), batch=4
    )
    assert calls == [(4, 10), (8, 10), (10, 10)]
    assert texts == scene_captions(10, 9, "heldout")
    assert torch.equal(images[3:4], render_scenes([sample_scene(9, 3, "heldout")]))


# ---- shapes


def points(count: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.rand(3, count, generator=torch.Generator().manual_seed(0)) * 4 - 2).unbind(0)


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distances_have_unit_gradients(shape):
    """The gradient has length one, and shapes stay inside their bounding sphere and above the ground."""
    distance, height, bound = SHAPE_TABLE[shape]
    x, y, z = (value.double().requires_grad_() for value in points())
    value = distance(x, y, z)
    gradient = torch.stack(torch.autograd.grad(value.sum(), (x, y, z)))
    outside = value > 0
    assert gradient[:, outside].norm(dim=0).sub(1).abs().quantile(0.99) < 1e-6
    far = torch.stack([x, y, z]).norm(dim=0)
    assert bool((value[far > bound] > 0).all())
    assert bool((value[y < -height] > 0).all())
    zero = torch.zeros(1)
    assert 0 < float(distance(zero, zero - height - 1e-3, zero)) < 0.01  # it touches the ground


def test_sphere_tracing_matches_the_closed_form():
    x, y, _ = (value * 0.5 for value in points(500))
    origin, direction = (
        (x, y, torch.full_like(x, 5.0)),
        (torch.zeros_like(x), torch.zeros_like(x), -torch.ones_like(x)),
    )
    length = march("sphere", origin, direction)
    radius = SHAPE_TABLE["sphere"][2]
    inside = x * x + y * y < (0.98 * radius) ** 2
    expected = 5 - (radius**2 - x * x - y * y).clamp(min=0).sqrt()
    assert (length[inside] - expected[inside]).abs().max() < 2e-3
    assert bool(length[x * x + y * y > radius**2].isinf().all())


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_are_the_gradient_of_the_distance(shape):
    x, y, z = (value.double().requires_grad_() for value in points(300))
    value = SHAPE_TABLE[shape][0](x, y, z)
    exact = torch.stack(torch.autograd.grad(value.sum(), (x, y, z)))
    ours = torch.stack(surface_normals(shape, x.detach(), y.detach(), z.detach()))
    away = value > 0.05  # near edges the four samples may lie on both sides
    assert (exact[:, away] * ours[:, away]).sum(0).quantile(0.05) > 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_shadows_are_dark_below_and_bright_beside_an_object(shape):
    base = -SHAPE_TABLE[shape][1]
    x = torch.tensor([0.0, 6.0, 0.0])
    y = torch.tensor([base - 0.02, base, 3.0])
    z = torch.zeros(3)
    up = (torch.zeros(3), torch.ones(3), torch.zeros(3))
    lit = soft_shadow(shape, (x, y, z), up)
    assert lit[0] < 0.05
    assert lit[1:].tolist() == [1.0, 1.0]
