"""The caption oracle: scoring of captions, and the accuracy of the shipped oracle on rendered scenes."""

import json
from dataclasses import replace

import pytest
import torch

from d2g.core.errors import SettingError, UserError
from miniature.captions import parse_caption
from miniature.oracle import (
    NUM_FEATURES,
    ORACLE_FOLDER,
    ORACLE_HEADS,
    Oracle,
    OracleReading,
    caption_accuracy,
    count_correct,
    load_oracle,
    read_attributes,
    save_oracle,
)
from miniature.oracle_training import (
    OracleConfig,
    augment_pixels,
    fit_oracle,
    render_oracle_data,
    scene_targets,
    score_oracle,
    train_oracle,
)
from miniature.render import render_scenes
from miniature.sampling import caption_of, sample_scene, scene_from_caption

SIDE_BY_SIDE = "a large red metal sphere left of a small blue matte cube, pink background"
DEPTH = "a large red metal sphere in front of a small blue matte cube, pink background"
TINY = OracleConfig(train=96, heldout=32, test=24, nimg=1280, batch=32, width=16, lr=5e-3)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return load_oracle()


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, list[str]]:
    """200 scenes of both splits with a seed that no model was trained on."""
    scenes = [sample_scene(77, index, split) for split in ("train", "heldout") for index in range(100)]
    return render_scenes(scenes).float() / 127.5 - 1, [caption_of(scene) for scene in scenes]


# ---- scoring


def reading_of(text: str, order: tuple[int, ...] = (0, 1), nearer: int = 0) -> OracleReading:
    facts = parse_caption(text)
    return OracleReading(tuple(facts.objects[k] for k in order), facts.background, nearer)


def test_a_correct_reading_scores_every_fact():
    assert count_correct(parse_caption(SIDE_BY_SIDE), reading_of(SIDE_BY_SIDE)) == (11, 11)
    one = "a small yellow matte cone, gray background"
    assert count_correct(parse_caption(one), reading_of(one, (0,))) == (6, 6)


def test_swapped_objects_lose_the_relation_only():
    assert count_correct(parse_caption(SIDE_BY_SIDE), reading_of(SIDE_BY_SIDE, (1, 0))) == (10, 11)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_in_front_is_decided_by_depth_not_by_side(order):
    facts = parse_caption(DEPTH)
    first = order.index(0)
    assert count_correct(facts, reading_of(DEPTH, order, nearer=first)) == (11, 11)
    assert count_correct(facts, reading_of(DEPTH, order, nearer=1 - first)) == (10, 11)
    behind = parse_caption(DEPTH.replace("in front of", "behind"))
    assert count_correct(behind, reading_of(DEPTH, order, nearer=1 - first)) == (11, 11)
    assert count_correct(behind, reading_of(DEPTH, order, nearer=first)) == (10, 11)


def test_each_wrong_attribute_loses_one_fact():
    facts, reading = parse_caption(SIDE_BY_SIDE), reading_of(SIDE_BY_SIDE)
    green = replace(reading.objects[1], color="green")
    assert count_correct(facts, replace(reading, objects=(reading.objects[0], green))) == (10, 11)
    assert count_correct(facts, replace(reading, background="teal")) == (10, 11)


def test_a_missing_object_loses_its_facts_the_count_and_the_relation():
    reading = reading_of(SIDE_BY_SIDE)
    for predicted in reading.objects:
        assert count_correct(parse_caption(SIDE_BY_SIDE), replace(reading, objects=(predicted,))) == (5, 11)


def test_an_extra_object_loses_the_count():
    facts = parse_caption("a small blue matte cube, pink background")
    assert count_correct(facts, reading_of(SIDE_BY_SIDE)) == (5, 6)


def test_ambiguous_objects_are_matched_in_favor_of_the_relation():
    """Of two matchings with equally many correct attributes, the one with the correct relation is scored."""
    twins = "a large red metal cube right of a large red metal cube, pink background"
    assert count_correct(parse_caption(twins), reading_of(twins)) == (11, 11)


# ---- the shipped oracle


def test_the_shipped_oracle_reads_new_renders(oracle, pictures):
    accuracy = caption_accuracy(oracle, *pictures)
    assert accuracy.attributes >= 0.995
    assert accuracy.exact >= 0.97


def test_the_shipped_oracle_is_robust_to_blur_and_noise(oracle, pictures):
    pixels, captions = pictures
    damaged = augment_pixels(pixels, torch.Generator().manual_seed(0))
    assert caption_accuracy(oracle, damaged, captions).attributes >= 0.98


def test_images_of_other_captions_score_low(oracle, pictures):
    pixels, captions = pictures
    accuracy = caption_accuracy(oracle, pixels, captions[1:] + captions[:1])
    assert accuracy.attributes < 0.5
    assert accuracy.exact < 0.02


def test_meta_records_training_and_accuracy():
    meta = json.loads((ORACLE_FOLDER / "meta.json").read_text())
    assert meta["parameters"] == sum(value.numel() for value in load_oracle().parameters()) <= 500_000
    assert {"train_attributes", "train_exact", "heldout_attributes", "heldout_exact"} == set(meta["scores"])
    assert min(meta["scores"]["train_attributes"], meta["scores"]["heldout_attributes"]) >= 0.99


def test_features_are_pooled_and_do_not_depend_on_the_batch(oracle, pictures):
    pixels = pictures[0][:7]
    features = oracle.features(pixels)
    assert features.shape == (7, NUM_FEATURES)
    assert (features[2:3] - oracle.features(pixels[2:3])).abs().max() < 1e-4
    assert read_attributes(oracle, pixels, batch=2) == read_attributes(oracle, pixels)


def test_an_unreadable_caption_is_refused(oracle, pictures):
    with pytest.raises(UserError, match="'dog'"):
        caption_accuracy(oracle, pictures[0][:1], ["a large red matte dog, pink background"])


# ---- training


def test_targets_are_ordered_from_left_to_right():
    text = "a large red metal sphere right of a small blue matte cube, teal background"
    answers = dict(zip(ORACLE_HEADS, scene_targets(scene_from_caption(text, 1, 0)), strict=True))
    words = {name: ORACLE_HEADS[name][value] for name, value in answers.items() if value >= 0}
    assert words == {
        "count": "2",
        "background": "teal",
        **dict(
            zip(
                ("left_size", "left_color", "left_material", "left_shape"),
                "small blue matte cube".split(),
                strict=True,
            )
        ),
        **dict(
            zip(
                ("right_size", "right_color", "right_material", "right_shape"),
                "large red metal sphere".split(),
                strict=True,
            )
        ),
    }


def test_depth_order_is_a_target_only_for_in_front_and_behind():
    nearer = list(ORACLE_HEADS).index("nearer")
    for index in range(20):
        scene = scene_from_caption(DEPTH, 1, index)
        left_is_first = scene.placements[0].x < scene.placements[1].x
        assert scene_targets(scene)[nearer] == (0 if left_is_first else 1)
    assert scene_targets(scene_from_caption(SIDE_BY_SIDE, 1, 0))[nearer] == -100


def test_a_single_object_has_no_targets_for_the_right_object():
    answers = scene_targets(scene_from_caption("a small cyan matte cone, white background", 1, 0))
    active_heads = {name for name, answer in zip(ORACLE_HEADS, answers, strict=True) if answer >= 0}
    assert active_heads == {"count", "background", "left_size", "left_color", "left_material", "left_shape"}


@pytest.mark.slow
def test_training_learns_and_is_deterministic():
    """A tiny oracle learns the background within 40 steps, and a second run gives the same weights."""
    first, scores = train_oracle(TINY)
    images, targets = render_oracle_data(64, TINY.test_seed, "train")
    with torch.no_grad():
        right = (
            first(images.float() / 127.5 - 1)["background"].argmax(1)
            == targets[:, list(ORACLE_HEADS).index("background")]
        )
    assert right.float().mean() > 0.6  # 0.2 by chance
    assert scores == score_oracle(first, TINY.test, TINY.test_seed)
    second, _ = train_oracle(TINY)
    for ours, theirs in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_non_finite_loss_stops_the_training():
    images, targets = render_oracle_data(16, 1, "train")
    with pytest.raises(FloatingPointError, match=r"oracle: loss is (nan|inf) at step \d+"):
        fit_oracle(images, targets, replace(TINY, lr=1e30, batch=16))


@pytest.mark.parametrize("setting", [{"nimg": 0}, {"width": 50}, {"seed": 2}, {"batch": -1}])
def test_invalid_settings_are_refused(setting):
    with pytest.raises(SettingError, match=next(iter(setting))):
        OracleConfig(**setting)


# ---- files


def test_a_saved_oracle_round_trips(tmp_path, oracle, pictures):
    save_oracle(oracle, tmp_path / "oracle", {"seed": 1})
    loaded = load_oracle(tmp_path / "oracle")
    assert torch.equal(loaded.features(pictures[0][:4]), oracle.features(pictures[0][:4]))
    assert json.loads((tmp_path / "oracle" / "meta.json").read_text()) == {"seed": 1}
    assert not any(value.requires_grad for value in loaded.parameters()) and not loaded.training


@pytest.mark.parametrize("component", ["model.safetensors", "config.json"])
def test_a_folder_without_a_file_is_refused(tmp_path, oracle, component):
    save_oracle(oracle, tmp_path, {})
    (tmp_path / component).unlink()
    with pytest.raises(UserError, match=rf"is no oracle: {component} is missing"):
        load_oracle(tmp_path)


def test_an_unwritable_folder_is_refused(tmp_path, oracle):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write oracle"):
        save_oracle(oracle, tmp_path / "file" / "oracle", {})


def test_damaged_files_are_refused(tmp_path, oracle):
    save_oracle(oracle, tmp_path, {})
    complete = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(complete[: len(complete) // 2])
    with pytest.raises(UserError, match="is damaged"):
        load_oracle(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(complete)
    (tmp_path / "config.json").write_text('{"width": 32}')
    with pytest.raises(UserError, match="is damaged") as error:
        load_oracle(tmp_path)
    assert "\n" not in str(error.value)
