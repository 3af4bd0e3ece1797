"""distill.export.model_card: every number of a card was measured or set."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from d2g.core.atomic_files import write_atomically
from d2g.core.config import override, to_json
from d2g.core.errors import UserError
from d2g.diffusion.pipelines import SHIPPED
from distill.config.export import CardOptions
from distill.config.run import DistillConfig
from distill.export.card_history import read_history
from distill.export.card_scores import own_results
from distill.export.model_card import (
    NAMED_LICENSES,
    AdapterUsage,
    PipelineUsage,
    kg_co2,
    license_fields,
    license_of,
    model_card,
)
from distill.planning.cost import evaluations
from distill.training.train import train
from jobs import distill_config, make_pairs

SECRET = "/somewhere/of/mine"
FRONT = {
    "library_name": "diffusers",
    "pipeline_tag": "text-to-image",
    "tags": ["one-step", "distillation", "diffusion2gan"],
}


def run_of(folder: Path, settings: tuple[str, ...] = (), nimg: int = 600, **fields: Any) -> Path:
    """Write a run folder without weights: settings that a resume may change are under `length`, the last
    report is later than the checkpoint, and the checkpoint holds only meta.json."""
    config = to_json(override(DistillConfig(teacher="miniature", **fields), settings))
    length = {name: config["train"].pop(name) for name in ("images", "minutes", "loggers")}
    length |= config.pop("engine") | {"text_cache": config["data"].pop("text_cache")}
    length["compile"] = "one of another machine"
    write_atomically(folder / "config.json", json.dumps({**config, "length": length}))
    lines = [{"nimg": nimg * i // 2, "loss/g": 1.0, "time/device_hours": 4.0 * i} for i in (1, 2, 3)]
    write_atomically(folder / "stats.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    meta = {"nimg": nimg, "steps": 1}
    write_atomically(folder / "checkpoints" / f"{nimg:09d}" / "meta.json", json.dumps(meta))
    return folder


def card_text(student: Path | str, **settings: Any) -> str:
    options = CardOptions(**settings)
    scores = own_results(str(student), options.scores)
    usage = PipelineUsage(pipeline="StableDiffusionPipeline", dtype="float32", guided=False, reads_text=True)
    return model_card(
        student=str(student), teacher="miniature", timestep="timestep 999", parity=2e-6, options=options,
        scores=scores, usage=usage,
    )  # fmt: skip


def stage(text: str, name: str) -> str:
    """The recipe of a stage, joined to one line."""
    part = text.partition(f"- Stage `{name}`: ")[2].partition("\n- ")[0].partition("\n\n")[0]
    return " ".join(part.split())


def test_a_part_of_the_pairs_is_named(tmp_path: Path) -> None:
    """The card lists the whole store; a run may have trained on a part of it, or on its noise in disorder."""
    text = stage(card_text(run_of(tmp_path / "part", ("data.max_pairs=5000", "train.batch_size=100"))), "ode")
    assert text.startswith("600 images of the first 5,000 pairs in batches of 100")
    text = stage(card_text(run_of(tmp_path / "rewired", ("data.rewire=true", "train.batch_size=100"))), "ode")
    assert text.startswith("600 images of pairs with the noise of other rows (data.rewire) in batches of 100")


def test_images_and_hours_are_those_of_the_exported_checkpoint(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ("train.images=5000", "train.batch_size=100"))
    text = card_text(run, watts=300, kg_per_kwh=0.1)
    assert "600 images in batches of 100" in stage(text, "ode")
    assert "Stage `ode`: 600 evaluations of student." in text
    assert "8 device hours, about 0.24 kg CO2 (assumed: 300 W per device, 0.1 kg CO2 per kWh" in text
    assert "The kind of device is not recorded." in text
    assert kg_co2(1000, CardOptions()) == pytest.approx(192)


EVALUATIONS = {
    "no penalty": (("gan.penalty=none",), 3200),
    "two D steps per G step": (("gan.penalty=none", "gan.d_steps_per_g_step=2"), 2800),
    "gradient accumulation runs the student twice": (
        ("gan.penalty=none", "engine.gradient_accumulation=2"),
        4000,
    ),
    "relativistic": (("gan.penalty=none", "gan.loss=rpgan"), 4000),
    "R1 of all rows, every 4 steps": (("gan.penalty=full", "gan.r1_interval=4"), 3400),
    "R1 of two rows, every 16 steps": (("gan.r1_rows=2",), 3214),
    "APT's approximation, every step": (("gan.penalty=approx",), 4000),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_evaluations_of_every_variant(case: str, tmp_path: Path) -> None:
    """Evaluations of 100 steps with batch size 8."""
    settings, expected = EVALUATIONS[case]
    run = run_of(tmp_path / "run", ("train.batch_size=8", *settings), nimg=800, stage="gan")
    (gan,) = read_history(str(run)).stages
    assert evaluations(gan.config) == expected
    assert f"Stage `gan`: {expected:.3g} evaluations of student and discriminator." in card_text(run)


RECIPES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "defaults": (
        "gan", (),
        ("adamw, learning rate 0.0001, bf16, EMA 0.9999, seed 0; all weights trained.",
         "Regression: `e_latent_lpips`, transforms `bgco`, weight 1.",
         "Discriminator: loss `ns`, weight 0.25, adamw, learning rate 1e-05; "
         "R1 of one row, gamma 0.01, every 16 steps; mix-and-match 0.25."),
        ("LoRA", "L1", "without transforms", "photographs", "dropout", "steps for each"),
    ),
    "no R1": ("gan", ("gan.penalty=none",), ("; no gradient penalty; mix",), ("R1", "gamma", "16 steps")),
    "no gamma": ("gan", ("gan.r1_gamma=0",), ("; no gradient penalty; mix",), ("R1", "gamma", "16 steps")),
    "approx": (
        "gan", ("gan.penalty=approx", "gan.approx_weight=50", "gan.approx_sigma=0.1"),
        ("approximated R1, weight 50, sigma 0.1, every step",), ("gamma", "16 steps"),
    ),
    "R3GAN": (
        "gan", ("gan.penalty=r1r2", "gan.r1_interval=1", "gan.r1_gamma=2", "gan.loss=rpgan"),
        ("loss `rpgan`", "R1 and R2 of all rows, gamma 2, every step"), (),
    ),
    "other options of D": (
        "gan",
        ("gan.d_steps_per_g_step=3", "gan.noise_augment=uniform", "gan.mix_fraction=0.5", "gan.real=photos",
         "gan.real_fraction=0.3"),
        ("3 steps for each step of the student", "noise augmentation: uniform", "mix-and-match 0.5",
         "photographs, 0.3 of its real rows"), ("photos,",),
    ),
    "ensemble": (
        "ode", ("regression.augment=bgo", "regression.losses=e_latent_lpips:3,latent_lpips:0.5,l1:0.25",
                "regression.draws=2"),
        ("`e_latent_lpips`, transforms `bgo`, 2 draws, weight 3; `latent_lpips`, weight 0.5; "
         "`l1`, weight 0.25.",), ("Discriminator", "R1"),
    ),
    "pixels": (
        "ode", ("regression.losses=lpips", "regression.lpips_net=alex", "regression.lpips_resize=224"),
        ("Regression: `lpips` of alex at 224 pixels, weight 1.",), ("transforms",),
    ),
    "pseudo-Huber": (
        "ode", ("regression.losses=pseudo_huber", "regression.huber_c=0.01"),
        ("Regression: `pseudo_huber`, c 0.01, weight 1.",), ("transforms",),
    ),
    "student": (
        "ode", ("student.lora_rank=8", "student.lora_alpha=4", "student.guidance_conditioning=true",
                "student.dropout=0.1", "train.precision=fp32", "train.ema_beta=0.5", "seed=7",
                "optim.lr=0.002", "optim.name=radam", "train.batch_size=32"),
        ("batches of 32, radam, learning rate 0.002, fp32, EMA 0.5, seed 7; LoRA of rank 8, alpha 4, "
 "guidance scale as an input, dropout 0.1.",), ("all weights", "Guidance by CLIP"),
    ),
    "frozen": (
        "ode", ('student.freeze=["*.conv1.*", "conv_in.*"]',),
        ("; all weights trained, without those that match `*.conv1.*`, `conv_in.*`.",), (),
    ),
    "text encoders": (
        "text", ("clip_guidance.weight=50", "clip_guidance.model=/secret/clip-l/"),
        ("; the text encoders alone trained.", "Guidance by CLIP `clip-l`: spherical, weight 50.",
         "Discriminator: loss `ns`, weight 0.25"), ("all weights", "secret"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_recipe_lists_only_settings_that_have_an_effect(case: str, tmp_path: Path) -> None:
    name, settings, present, absent = RECIPES[case]
    recipe = stage(card_text(run_of(tmp_path / "run", settings, stage=name)), name)
    for part in present:
        assert part in recipe, (part, recipe)
    for part in absent:
        assert part not in recipe, (part, recipe)


def test_all_pair_stores_are_listed(teacher: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    a = make_pairs(teacher, tmp_path / "a")
    b = make_pairs(teacher, tmp_path / "b", guidance=1.0, steps=5, solver="heun", num_pairs=6)
    ode = run_of(tmp_path / "ode", pairs=f"{a},{SECRET}/gone")
    gan = run_of(tmp_path / "gan", stage="gan", init=str(ode), pairs=f"{a},{b}")
    text = card_text(gan)
    assert text.count("12 of 6 prompts, ddim with 4 steps, guidance 3, latents 4x4x4") == 1
    assert text.count("6 of 6 prompts, heun with 5 steps, guidance 1, latents 4x4x4") == 1
    assert text.count("Pairs `gone`: their folder was not at hand") == 1
    assert f"Pairs: {12 * 4 * 2 + 6 * 9} evaluations of the teacher, without those of `gone`." in text
    assert SECRET not in text and str(tmp_path) not in text


def test_stages_are_listed_in_order_and_hours_add_up(tmp_path: Path) -> None:
    ode = run_of(tmp_path / "ode", nimg=1000)
    text = card_text(run_of(tmp_path / "gan", stage="gan", init=str(ode)))
    assert 0 < text.index("Stage `ode`: 1,000 images") < text.index("Stage `gan`: 600 images")
    assert "Training: 16 device hours" in text and "Before that" not in text


def test_gaps_in_the_history_are_stated(tmp_path: Path) -> None:
    text = card_text(run_of(tmp_path / "gan", stage="gan", init=f"{SECRET}/ode"))
    assert text.count("- Before that: an exported student or a run that is not at hand") == 2
    assert SECRET not in text
    old = run_of(tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    write_atomically(old / "config.json", json.dumps({**config, "widget": 3}))
    assert "another version (unknown setting 'widget'" in card_text(
        run_of(tmp_path / "new", stage="gan", init=str(old))
    )
    bare = run_of(tmp_path / "bare")
    shutil.rmtree(bare / "checkpoints" / "000000600")
    assert "Before that: a run whose checkpoint is gone" in card_text(
        run_of(tmp_path / "last", stage="gan", init=str(bare))
    )
    circle = run_of(tmp_path / "circle", stage="gan", init=str(tmp_path / "circle"))
    assert len(read_history(str(circle)).stages) == 1 and "trained again later" in card_text(circle)
    text = card_text("miniature")
    assert "Pairs and recipe: not recorded with an exported student; export the run itself." in text
    assert "Evaluations and device hours: not recorded" in text and "## Scores\n\nNot measured." in text
    (old / "stats.jsonl").unlink()
    write_atomically(old / "config.json", json.dumps(config))
    assert "Device hours: not recorded." in card_text(old)
    (old / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        card_text(old)


def test_scores_and_license(tmp_path: Path) -> None:
    result = {"protocol": "coco", "protocol_sha256": "abc" * 20, "fid": 9.29, "recall": None}
    result |= {"counts": {"images": 30000}, "extra": {"cmmd": 0.5}}
    result |= {"source": {"kind": "images", "name": "samples"}}
    write_atomically(tmp_path / "scores" / "result.json", json.dumps(result))
    text = card_text("miniature", scores=(str(tmp_path / "scores"),), license="mit")
    assert ModelCard(text).data.to_dict() == FRONT | {"license": "mit"} and "License: mit." in text
    for part in ("Protocol `coco` (`abcabcabcabcabca`; 30,000 images)", "| fid | 9.29 |", "| cmmd | 0.5 |"):
        assert part in text
    assert "| recall" not in text and "## Scores\n\nNot" not in text and "in fp32: 2.00e-06." in text


def save_snapshot(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a model_index.json into a cache of the hub as if it had been downloaded. Returns its folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    folder = cache / f"models--{name.replace('/', '--')}"
    write_atomically(folder / "refs" / "main", "0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    index = (SHIPPED["miniature"] / "teacher" / "model_index.json").read_text()
    write_atomically(snapshot / "model_index.json", index)
    return snapshot


def test_metadata_of_a_hub_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """base_model with its relation, the teacher's license, and a model-index of scores of the weights."""
    save_snapshot("stabilityai/stable-diffusion-3.5-medium", tmp_path, monkeypatch)
    source = {"kind": "student", "name": "runs/gan", "weights_sha256": "f" * 64}
    own = {"protocol": "coco", "protocol_sha256": "abc" * 20, "fid": 9.29, "recall": None, "source": source}
    others = {**own, "fid": 3.0, "source": {"kind": "images", "name": "samples"}}
    usages = {
        "finetune": PipelineUsage(
            pipeline="StableDiffusion3Pipeline", dtype="float32", guided=False, reads_text=True
        ),
        "adapter": AdapterUsage(pipeline="StableDiffusion3Pipeline", rank=4),
    }
    for relation, usage in usages.items():
        text = model_card(
            student="miniature", teacher="stabilityai/stable-diffusion-3.5-medium", timestep="timestep 999",
            parity=2e-6, options=CardOptions(), scores=[own, others], usage=usage,
        )  # fmt: skip
        data = ModelCard(text).data
        assert data.base_model == "stabilityai/stable-diffusion-3.5-medium"
        assert data.base_model_relation == relation
        assert (data.license, data.license_name) == ("other", "stabilityai-ai-community")
        assert data.license_link.startswith("https://")
        (result,) = data.eval_results
        assert (result.metric_type, result.metric_value) == ("fid", 9.29), "images are not the student's"
        assert result.dataset_name == f"coco ({'abc' * 5}a)" and not result.verified
        assert "License: stabilityai-ai-community." in text


LICENSE_OF = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-3.5-large": "stabilityai-ai-community",
    "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": "openrail++",
    "PixArt-alpha/PixArt-XL-2-1024-MS": "openrail++",
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": "nscl-v2-custom",
    "somebody/unknown": None,
}


@pytest.mark.parametrize("teacher", LICENSE_OF)
def test_licenses_of_published_teachers(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = save_snapshot(teacher, tmp_path, monkeypatch)
    assert license_of(teacher) == LICENSE_OF[teacher]
    named = LICENSE_OF[teacher] in NAMED_LICENSES or LICENSE_OF[teacher] is None
    assert license_fields(teacher)["license"] == ("other" if named else LICENSE_OF[teacher])
    # The card passes it on, beside the model that it is of.
    usage = PipelineUsage(pipeline="any", dtype="float32", guided=False, reads_text=True)
    text = model_card(
        student="miniature", teacher=teacher, timestep="timestep 999", parity=2e-6,
        options=CardOptions(), scores=[], usage=usage,
    )  # fmt: skip
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == (teacher, "finetune")
    assert {key: data.get(key) for key in license_fields(teacher)} == license_fields(teacher)
    # What the folder itself states, and what the user states, counts more.
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: my-terms\n---\n")
    assert license_of(teacher) == "my-terms"
    assert license_fields(teacher) == {"license": "other", "license_name": "my-terms"}
    assert license_of(teacher, "mit") == "mit"
    # A link into the teacher's own repository becomes an address.
    for name, expected in (
        ("own", f"https://huggingface.co/{teacher}/blob/main/LICENSE.md"),
        *NAMED_LICENSES.items(),
    ):
        (snapshot / "README.md").write_text(
            f"---\nlicense: other\nlicense_name: {name}\nlicense_link: LICENSE.md\n---\n"
        )
        assert license_fields(teacher)["license_link"] == expected


def test_the_card_says_that_a_license_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_snapshot("somebody/else", tmp_path, monkeypatch)  # resolve caches snapshots
    usage = AdapterUsage(pipeline="StableDiffusionPipeline", rank=4)
    text = model_card(
        student="miniature", teacher="somebody/else", timestep="timestep 999", parity=2e-6,
        options=CardOptions(), scores=[], usage=usage,
    )  # fmt: skip
    data = ModelCard(text).data
    assert data.license == "other" and "license_name" not in data.to_dict()
    assert data.base_model == "somebody/else" and data.base_model_relation == "adapter"
    assert "License: not stated in its folder; look it up before you share this." in text


def test_history_of_a_real_run(teacher: Path, tmp_path: Path) -> None:
    """The folder is written by training, not by `run_of`."""
    config = distill_config(teacher, make_pairs(teacher, tmp_path), "engine.gradient_accumulation=2")
    train(config, tmp_path / "ode")
    history = read_history(str(tmp_path / "ode"))
    assert history.gap == "" and history.stages[0].device_hours is not None
    assert history.stages[0].config.train == config.train and history.stages[0].config.engine == config.engine
    assert history.stages[0].device_hours > 0
