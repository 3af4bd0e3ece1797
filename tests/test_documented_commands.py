"""The commands of the documentation run, page by page, on tiny models in place of the large ones it names.

Of the README the four commands of a run are in test_readme.py; docs/own-pictures.md has test_own_pictures.py,
docs/launch.md test_launch_examples.py, docs/LOG.md is a record of the past.
"""

import glob
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.models import squeezenet1_1

import tiny
import tiny_teachers
from d2g.core.config import to_json
from distill.config.student import StudentConfig
from distill.training.train import train
from exported import save_lora_run, save_result_of, save_run
from jobs import TRAIN, distill_config, make_clip, make_pairs
from labeled import save_classes, save_judgments
from own_pictures import image_folder
from pairgen.generate import generate_pairs
from test_documented_options import PAGES, commands
from vision_models import save_clip_model, save_vit

ELSEWHERE = {
    "demo": "d2g_cli/test_launch.py",
    "serve --student miniature --teacher miniature": "distill/test_browser_page.py",
    "eval prefer": "eval/test_study.py",
    "push RUN me/one-step": "distill/test_push.py",
    "export --student RUN --format onnx": "distill/test_to_onnx.py",
    "pairs generate --preset $PRESET": "test_readme.py",
    "distill ode --preset $PRESET": "test_readme.py",
    "distill gan --preset $PRESET": "test_readme.py",
}
"""Beginning of a command -> the test that runs it: it serves until Ctrl-C, talks to a hub, or takes long."""

ONE_STEP = {"images": 8, "batch_size": 8, "report_images": 8}
SHORT_RUN = {f"train.{name}": value for name, value in (to_json(TRAIN) | ONE_STEP).items()}
FEW_PAIRS = {"num_pairs": 8, "steps": 2, "shard_size": 4, "batch_size": 4}
NARROW = {
    "student.generator.channel_base": 64,
    "student.generator.channel_max": 16,
    "student.generator.residual_blocks": 1,
    "student.generator.z_dim": 8,
    "student.generator.w_dim": 8,
}


def with_settings(words: list[str], settings: dict[str, Any]) -> list[str]:
    """The command with these settings at its end, where they replace those of the page."""
    values = {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()
    }
    return [*words, *(part for name, value in values.items() for part in ("--set", f"{name}={value}"))]


def coco(folder: Path) -> None:
    """Ten pictures in the layout of COCO."""
    pictures = photographs(folder / "val2014", 10, suffix=".jpg").glob("*.jpg")
    images = [{"id": number, "file_name": path.name} for number, path in enumerate(sorted(pictures))]
    annotations = [{"id": n, "image_id": n, "caption": tiny.CAPTIONS[n % 6]} for n in range(10)]
    (folder / "annotations").mkdir()
    content = json.dumps({"images": images, "annotations": annotations})
    (folder / "annotations" / "captions_val2014.json").write_text(content)


def photographs(folder: Path, count: int = 8, size: int = 16, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    stream = torch.Generator().manual_seed(0)
    for number in range(count):
        pixels = torch.randint(256, (size, size, 3), generator=stream, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:02}{suffix}")
    return folder


class Page:
    """What the commands of a page find in `folder`, and how they are made small.

    `names`: a word of the page -> what it is here. `settings` and `options`: the beginning of a command ->
    what is set and added in each command that begins so.
    """

    def __init__(self, folder: Path, teacher: Path) -> None:
        self.folder, self.teacher = folder, str(teacher)
        self.names = {"$SD": self.teacher, "SD": self.teacher, "VAE": self.teacher, "RUN": "runs/gan"}
        self.settings: dict[str, dict[str, Any]] = {"pairs generate": FEW_PAIRS, "distill": SHORT_RUN}
        self.options: dict[str, list[str]] = {}

    def pairs_and_runs(self) -> None:
        """Pairs of the tiny teacher, and runs of one short training."""
        pairs = make_pairs(Path(self.teacher), self.folder)
        train(distill_config(Path(self.teacher), pairs, "train.images=8"), self.folder / "runs" / "gan")
        for name in ("ode", "text"):
            shutil.copytree(self.folder / "runs" / "gan", self.folder / "runs" / name)

    def command(self, words: list[str]) -> list[str]:
        """A command of the page as it runs here."""
        if words[0] == "launch":  # one process runs the command; test_readme.py runs it in several
            words = words[words.index("--") + 1 :]
        line = " ".join(words)
        words = [self.names.get(word, word) for word in words]
        words = [part for word in words for part in (sorted(glob.glob(word)) if "*" in word else [word])]
        for beginning, settings in self.settings.items():
            if line.startswith(beginning) and "--dry-run" not in words and "watch" not in words:
                words = with_settings(words, settings)
        for beginning, options in self.options.items():
            words += options if line.startswith(beginning) else []
        return words


def nothing(page: Page) -> None:
    """The bundled student draws."""


def recipes(page: Page) -> None:
    make_pairs(Path(page.teacher), page.folder)
    page.options["distill"] = ["--teacher", page.teacher]
    for stage in ("gan", "text"):
        page.settings[f"distill {stage}"] = {"clip_guidance.crop": 16}
    clip = save_clip_model(page.folder / "clip")
    page.names["clip_guidance.model=CLIP"] = f"clip_guidance.model={clip}"


def runs(page: Page) -> None:
    page.pairs_and_runs()
    save_run(page.folder / "runs" / "plain", page.teacher)
    save_lora_run(page.folder / "runs" / "lora", page.teacher, StudentConfig(lora_rank=2))
    save_result_of(page.folder / "results" / "gan", "runs/gan")
    page.options["export --student RUN --format lora"] = ["--student", "runs/lora"]


def scaling(page: Page) -> None:
    page.names["$SDXL"] = tiny_teachers.save_sdxl(page.folder / "sdxl")


def stable_diffusion(page: Page) -> None:
    page.names |= {"$LPIPS": str(Path(page.teacher) / "latent_lpips")}
    tiny.save_prompts(page.folder / "prompts.txt")
    for stage in ("ode", "gan"):  # frozen weights in bf16
        page.settings[f"distill {stage} --preset sd15-24gb"] = {"train.precision": "bf16"}
    page.settings["distill gan --preset sd15-cfg3"] = {"gan.r1_rows": 8}
    page.settings["pairs plan"] = {"num_pairs": 8, "steps": 2, "batch_size": 2}


def evaluation(page: Page) -> None:
    page.pairs_and_runs()
    clip = make_clip(Path(page.teacher), page.folder / "clip")
    photographs(page.folder / "photographs")
    coco(page.folder / "COCO")
    lines = "".join(f"{caption}\tx\n" for caption in tiny.CAPTIONS)
    (page.folder / "PartiPrompts.tsv").write_text(f"Prompt\tCategory\n{lines}")
    rows = "".join(f'{number},0,"{caption}"\n' for number, caption in enumerate(tiny.CAPTIONS))
    (page.folder / "dpg_bench.csv").write_text(f"item_id,proposition_id,text\n{rows}")
    page.names |= dict.fromkeys(("INCEPTION", "pt_inception-2015-12-05-6726825d.pth"), f"features={clip}")
    page.names |= {"results/ode": "results/gan", "results/text": "results/gan"}
    size = {"protocol.size": 16, "protocol.features": "any", "protocol.clip": "any"}
    coco_size = {"protocol.images": 8, "protocol.reference_images": 10}
    page.settings["eval stats"] = {**size, **coco_size}
    page.settings["eval run"] = {**size, "resamples": 10}
    page.settings["eval run --student runs/gan --protocol coco"] = coco_size
    page.settings["eval robustness"] = {"protocol.size": 32}
    page.options["eval stats"] = ["--features", "clip"]
    page.options["eval run"] = ["--clip", str(clip)]
    page.options["eval run --student runs/gan --protocol coco"] = ["--features", "clip"]
    for run in ("gan", "ode"):
        page.options[f"eval run --student runs/{run} --protocol parti"] = ["--metrics", "clip"]
    page.options["eval export --for geneval"] = ["--num", "1"]


def readme(page: Page) -> None:
    scaling(page)
    evaluation(page)
    page.names["…"] = "--dry-run"
    page.options["distill gan --preset sdxl-cfg7"] = ["--teacher", page.names["$SDXL"]]


def lpips(page: Page) -> None:
    for name in ("train/cnn", "train/noise", "val/cnn", "val/noise"):
        save_judgments(page.folder / "BAPPS" / name)
    save_classes(page.folder / "IMAGENET")
    save_classes(page.folder / "PICTURES", 2)
    page.settings["lpips train"] = {"size": 16, "width": 0.0625, "batch": 12, "epochs": 2, "workers": 0}
    own_size = {"patch.load": 0, "patch.upsample": 0}
    page.settings["lpips calibrate"] = own_size | {"heads.epochs": 2, "heads.batch": 8}
    page.settings["lpips score"] = own_size
    few = {"count": 2, "size": 32, "steps": 4, "report_steps": 2, "checkpoint_steps": 4}
    page.settings["lpips overfit"] = few


def gan_students(page: Page) -> None:
    """Pairs of the bundled teacher, whose latents have 8 x 8 pixels."""
    config = tiny.pair_config(
        "miniature", tiny.save_prompts(page.folder / "prompts.txt"), num_pairs=8, steps=2
    )
    generate_pairs(config, page.folder / "pairs")
    page.names["SD"] = "miniature"
    page.names |= {
        f"student.generator.resolution={a}": f"student.generator.resolution={b}"
        for a, b in ((16, 4), (32, 8))
    }
    page.settings["distill gan"] = NARROW
    page.settings["distill gan --preset stylegan-t-1b"] = {
        "clip_guidance.model": save_clip_model(page.folder / "clip"),
        "gan.token_heads": 3,
        "gan.feature_networks": json.dumps([save_vit("vit", page.folder / "vit")]),
    }
    clip = save_clip_model(page.folder / "gigagan_clip")
    page.settings["distill gan --preset gigagan"] = {
        "clip_guidance.model": clip,
        "gan.feature_networks": json.dumps([clip]),
        "gan.token_heads": 2,
        "gan.feature_size": 16,
        "gan.channel_base": 64,
        "gan.r1_rows": 1,
    }
    page.options["eval run"] = ["--num", "8"]


def teachers(page: Page) -> None:
    folder = page.folder
    page.names["STAGE_C"] = tiny_teachers.save_wuerstchen_prior(folder / "stage_c")
    page.names["STAGE_B"] = tiny_teachers.save_wuerstchen_decoder(folder / "stage_b")
    page.names |= {"TEACHER": tiny_teachers.save_edm(folder / "teacher"), "PROTOCOL": "folder"}
    tiny.save_prompts(folder / "prompts.txt")
    for label in range(10):
        photographs(folder / "IMAGES" / str(label), 2)
    image_folder(photographs(folder / "PICTURES", 0))
    clip = make_clip(Path(page.teacher), folder / "clip")
    page.options["eval run"] = [
        "--prompts",
        "prompts.txt",
        "--num",
        "4",
        "--metrics",
        "clip",
        "--clip",
        str(clip),
    ]
    page.settings["distill ode --teacher STAGE"] = {"regression.losses": "pseudo_huber"}
    # The preset of CIFAR10, with a narrow network for its LPIPS.
    torch.save(squeezenet1_1(weights=None).state_dict(), folder / "squeeze.pth")
    metric = {
        "regression.lpips_net": "squeeze",
        "regression.lpips_weights": "squeeze.pth",
        "regression.lpips_resize": 24,
    }
    for stage in ("ode", "gan", "cd"):
        page.settings[f"distill {stage} --preset cifar10 "] = metric
    page.settings["pairs generate --preset cifar10"] = {"dtype": "float32"}
    fit = {"fit.images": 32, "fit.batch_size": 16}
    parts = {
        "vqgan": {"channels": 8, "bottleneck_blocks": 1, "codes": 16},
        "compressor": {"channels": "[8,8,8]", "latent_channels": 3},
        "stage_b": {"channels": "[8,16]", "blocks": "[1,1]", "head_width": 8, "condition_width": 8},
        "stage_c": {"width": 16, "depth": 1, "heads": 2},
    }
    page.settings["teacher cascade"] = {"images": 40} | {
        f"{part}.{name}": value
        for part, settings in parts.items()
        for name, value in (settings | ({} if part == "compressor" else fit)).items()
    }


PREPARED: dict[str, Callable[[Page], None]] = {
    "README.md": readme,
    "evaluation.md": evaluation,
    "explore.md": nothing,
    "gan-students.md": gan_students,
    "index.md": nothing,
    "latent-lpips.md": lpips,
    "recipes.md": recipes,
    "runs.md": runs,
    "scaling.md": scaling,
    "stable-diffusion.md": stable_diffusion,
    "teachers.md": teachers,
}
OTHER_PAGES = {
    "launch.md": "test_launch_examples.py",
    "own-pictures.md": "test_own_pictures.py",
    "LOG.md": "",
}
"""Page -> the test that runs its commands. The log is a record of the past."""


def test_every_page_with_commands_is_run() -> None:
    with_commands = {path.name for path in PAGES if list(commands(path.read_text(encoding="utf-8")))}
    assert with_commands - set(OTHER_PAGES) == set(PREPARED)
    for file in (*ELSEWHERE.values(), *filter(None, OTHER_PAGES.values())):
        assert (Path(__file__).parent / file).is_file(), file


LONG_PAGES = ("evaluation.md", "gan-students.md", "teachers.md")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in LONG_PAGES else n for n in PREPARED]
)
def test_the_commands_of_a_page_run(
    name: str, teacher: Path, tmp_path: Path, d2g: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = Page(tmp_path, teacher)
    PREPARED[name](page)
    (path,) = [path for path in PAGES if path.name == name]
    failed, count = [], 0
    for words in commands(path.read_text(encoding="utf-8")):
        line = " ".join(words)
        if "--dry-run" not in words and line.startswith(tuple(ELSEWHERE)):
            continue
        ended = d2g(*page.command(words))
        count += 1
        if ended.code:
            failed.append(f"{line}\n  {' '.join(page.command(words))}\n  {ended.stderr[-600:]}")
    assert not failed, "\n".join(failed)
    assert count, f"no command of {name} was run"
