"""Recipes of the miniature compared: losses, schedules, discriminators and their parts, over seeds, by three
feature networks.

    python benchmarks/recipe.py run --pairs DIR --out DIR --arm NAME NAME --seed 0 1 2     resumes
    python benchmarks/recipe.py table --out DIR                       writes recipe_DATE_cpu.md
    python benchmarks/recipe.py sheet --out DIR --arm NAME NAME --seed 0 --file FILE.png    their pictures

Pairs come from `d2g pairs generate --preset miniature`; docs/LOG.md, "Adversarial regression (ADM) as a first
stage", has the commands of the 49,152 pairs and their prompts. Arms of the second stage start from a first
stage of the same seed, the one that their name ends with ("gan from pseudo_huber"), which is trained when it
is not there. They have the losses of the preset's stage 2. "regression alone" and "part d" to "part
multiscale" are rows of method.md "Ablation of the discriminator", whose last row is "gan". The CLIP that
guides comes from `python benchmarks/text_phase.py clip`.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import spread, table, write
from benchmarks.student_scores import COLUMNS, score
from d2g.core.atomic_files import write_atomically
from d2g.core.captioned_grid import captioned_grid
from d2g.core.config import override
from d2g.core.png import save_png
from distill.config.presets import DISTILL_PRESETS
from distill.config.run import FROM_TEACHER, DistillConfig
from distill.sampling import load_student
from distill.training.train import train
from miniature.metrics import real_scenes

TODAY = ("optim.lr=5e-4", "train.ema_beta=0.99")
SCHEDULE = ("optim.warmup_images=2560", "optim.decay_images={images}", "train.ema_halflife_images=420")
FIRST = {
    "e_latent_lpips, constant rate": ("regression.losses=e_latent_lpips", *TODAY),
    "pseudo_huber, constant rate": ("regression.losses=pseudo_huber", *TODAY),
    "e_latent_lpips": ("regression.losses=e_latent_lpips", "optim.lr=5e-4", *SCHEDULE),
    "e_latent_lpips, 4 draws": (
        "regression.losses=e_latent_lpips", "regression.draws=4", "optim.lr=5e-4", *SCHEDULE
    ),
    "e_latent_lpips, 1e-3": ("regression.losses=e_latent_lpips", "optim.lr=1e-3", *SCHEDULE),
    "pseudo_huber": ("regression.losses=pseudo_huber", "optim.lr=1e-3", *SCHEDULE),
    "pseudo_huber, linear decay": (
        "regression.losses=pseudo_huber", "optim.lr=1e-3", *SCHEDULE, "optim.decay=linear"
    ),
    **{
        f"pseudo_huber, warm-up {images}": (
            "regression.losses=pseudo_huber", "optim.lr=1e-3", *SCHEDULE, f"optim.warmup_images={images}"
        )
        for images in (0, 640)
    },
    **{
        f"pseudo_huber, half-life {images}": (
            "regression.losses=pseudo_huber",
            "optim.lr=1e-3",
            *SCHEDULE,
            f"train.ema_halflife_images={images}",
        )
        for images in (100, 1_700)
    },
    "mse": ("regression.losses=mse", "optim.lr=1e-3", *SCHEDULE),
    "latent_lpips": ("regression.losses=latent_lpips", "optim.lr=5e-4", *SCHEDULE),
    "decoder_features": ("regression.losses=decoder_features", "optim.lr=1e-3", *SCHEDULE),
    "pseudo_huber + e_latent_lpips": (
        "regression.losses=pseudo_huber:1,e_latent_lpips:10", "optim.lr=1e-3", *SCHEDULE
    ),
    "pseudo_huber + decoder_features": (
        "regression.losses=pseudo_huber:1,decoder_features:1", "optim.lr=1e-3", *SCHEDULE
    ),
}  # fmt: skip
"""Settings of first stages by name of the arm; `{images}` stands for the length. Half-lives are those of the
student's exponential moving average, in images."""
STUDENT_SCHEDULE = ("optim.decay_images={images}", "train.ema_halflife_images=420")
GAN = (*STUDENT_SCHEDULE, "gan.optim.decay_images={images}")
PROJECTED = (
    'gan.feature_networks=["efficientnet-lite0"]',
    "gan.feature_size=64",
    "gan.loss=hinge",
    "gan.mix_z=0",
)
GUIDANCE = ("clip_guidance.weight=0.2", "clip_guidance.model={clip}")
SECOND = {
    "gan, constant rate": (),
    "gan": GAN,
    **{f"gan, weight {weight}": (*GAN, f"gan.weight={weight}") for weight in ("0.05", "1", "4")},
    "gan, constant rate of D": (*GAN, "gan.optim.decay_images=0"),
    "gan, low constant rate of D": (*GAN, "gan.optim.lr=3e-5", "gan.optim.decay_images=0"),
    "gan, rate of D to a tenth": (*GAN, "gan.optim.final_lr=3e-5"),
    "gan, adaptive weight 0.25": (*GAN, "gan.adaptive_weight=true"),
    "gan, coupled Adam": (*GAN, "optim.name=adam", "gan.optim.name=adam"),
    "gan, output head": (*GAN, "gan.output_head=true"),
    "projected": (*GAN, *PROJECTED, "gan.discriminator=projected"),
    "unet and projected": (*GAN, *PROJECTED, "gan.discriminator=unet+projected"),
    "gan, CLIP": (*GAN, *GUIDANCE),
    "projected, CLIP": (*GAN, *PROJECTED, "gan.discriminator=projected", *GUIDANCE),
    "adm": (*GAN, "regression.losses=[]", "gan.weight=1"),
    "regression alone": STUDENT_SCHEDULE,
    **{f"part {name}": GAN for name in ("d", "z", "r1", "multiscale")},
}
"""Settings of second stages by the first part of their name; `{clip}` stands for the CLIP that guides. adm:
adversarial regression on the pairs alone (arXiv 2507.18569)."""
_ADM = (*SCHEDULE, "gan.optim.decay_images={images}", "regression.losses=[]", "gan.weight=1")
ADVERSARIAL_FIRST = {"adm": _ADM, "adm, 1e-3": (*_ADM, "optim.lr=1e-3")}
"""Settings of the adversarial regression as a first stage: from the teacher's weights, on the schedule and
with the length of the other first stages, to compare with them. The first one has the rate of a GAN stage."""

STYLEGAN_T = (*PROJECTED, "gan.discriminator=projected", "gan.penalty=none")
FROM_RANDOM = {
    "stylegan-t": (),
    "gigagan": (),
    "stylegan-t, plain generator": (
        "student.generator.residual=false",
        "student.generator.second_order=false",
        "student.generator.text_bypass=false",
        "student.generator.w_dim=256",
    ),
    "stylegan-t, CLIP": GUIDANCE,
    "stylegan-t, projected": STYLEGAN_T,
    "stylegan-t, projected, CLIP": (*STYLEGAN_T, *GUIDANCE),
}
"""Settings of GANs without regression, whose generator has styles and random weights, as long as a first
stage. The plain one is StyleGAN-T's before the changes of section 3.1 (table 1)."""


def second_stage(name: str) -> DistillConfig:
    """The config that the settings of a second stage change."""
    part = name.removeprefix("part ")
    config = DISTILL_PRESETS["miniature" if part == name else f"miniature-ablation-{part}"]["gan"]
    return replace(config, stage="ode") if name == "regression alone" else config


def run(pairs: str, out: Path, arm: str, seed: int, images: tuple[int, int], count: int, clip: str) -> None:
    """Train one arm with one seed and score it, unless its scores are there; its first stage before it.

    images: of first and second stages. clip: the CLIP that guides.
    """
    second, _, first = arm.rpartition(" from ")
    folder = out / str(seed) / arm
    if (folder / "scores.json").is_file():
        return
    if arm in FROM_RANDOM:
        config = DISTILL_PRESETS[f"miniature-{arm.partition(',')[0]}"]["gan"]
        settings = FROM_RANDOM[arm]
    elif arm in ADVERSARIAL_FIRST:
        config = replace(DISTILL_PRESETS["miniature"]["gan"], init=FROM_TEACHER)
        settings = ADVERSARIAL_FIRST[arm]
    elif second:
        run(pairs, out, first, seed, images, count, clip)
        config = replace(second_stage(second), init=str(out / str(seed) / first))
        settings = SECOND[second]
    else:
        config, settings = DISTILL_PRESETS["miniature"]["ode"], FIRST[first]
    length = images[bool(second)]
    config = override(
        replace(config, pairs=pairs, seed=seed),
        ["train.precision=fp32", *(setting.format(images=length, clip=clip) for setting in settings)],
    )
    facts = train_and_score(config, folder, length, count)
    write_atomically(folder / "scores.json", json.dumps(facts, indent=1))
    print(arm, seed, json.dumps(facts), flush=True)


def train_and_score(config: DistillConfig, folder: Path, images: int, count: int) -> dict[str, float]:
    """Train for so many images; the student's scores on `count` test scenes, with its seconds."""
    options = replace(config.train, images=images, report_images=images // 8, checkpoint_images=images // 4)
    before = time.process_time()
    summary = train(replace(config, train=options), folder)
    facts = {
        "images": summary.images,
        "seconds": summary.seconds,
        "cpu_seconds": time.process_time() - before,
        "scored_scenes": count,
    }
    return {**score(folder, count), **facts}


def lines_of(out: Path) -> list[str]:
    """The table of all scores: mean and standard deviation over seeds."""
    scores: dict[str, list[dict[str, float]]] = {}
    for file in sorted(out.glob("*/*/scores.json")):
        scores.setdefault(file.parent.name, []).append(json.loads(file.read_text()))
    rows = [
        [
            arm,
            len(of_arm),
            int(of_arm[0]["images"]),
            *(spread([s[column] for s in of_arm]) for column in COLUMNS),
        ]
        for arm, of_arm in scores.items()
    ]
    scenes = {int(s["scored_scenes"]) for of_arm in scores.values() for s in of_arm}
    return [f"Students scored on {', '.join(map(str, scenes))} test scenes.", "",
            *table(["", "seeds", "images", *COLUMNS], rows)]  # fmt: skip


def draw_sheet(out: Path, arms: list[str], seed: int, file: Path) -> None:
    """A row of pictures per arm, of the first test captions; rows with noise of one shape share it."""
    captions = [text for _, texts in real_scenes(8) for text in texts]
    images = [load_student(str(out / str(seed) / arm))(captions) for arm in arms]
    titles = [title for arm in arms for title in (arm, *[""] * (len(captions) - 1))]
    save_png(captioned_grid(torch.cat(images), titles, " / ".join(captions), len(captions)), file, {})


def main() -> None:
    """Run arms, or write the table or the sheet."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["run", "table", "sheet"])
    parser.add_argument("--pairs")
    parser.add_argument("--out", required=True, type=Path)
    first = ", ".join((*FIRST, *FROM_RANDOM, *ADVERSARIAL_FIRST))
    arms = f"any of {first}; or {' or '.join(SECOND)}, from one of the first"
    parser.add_argument("--arm", nargs="+", default=[], help=arms)
    parser.add_argument("--clip", default="", help="the CLIP that guides, for arms with CLIP")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, nargs=2, default=(12_800, 3_200), metavar=("FIRST", "SECOND"))
    parser.add_argument("--scenes", type=int, default=2_048, help="test scenes per student")
    parser.add_argument("--file", type=Path, help="the sheet")
    args = parser.parse_args()
    if args.what == "run":
        for seed in args.seed:
            for arm in args.arm:
                run(args.pairs, args.out, arm, seed, tuple(args.images), args.scenes, args.clip)
    elif args.what == "sheet":
        draw_sheet(args.out, args.arm, args.seed[0], args.file)
    else:
        write("recipe", "Recipes of the miniature", lines_of(args.out))


if __name__ == "__main__":
    main()
