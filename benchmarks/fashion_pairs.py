"""Supplement E and Table 6 of the paper in small: which pairs can be regressed, and consistency distillation
at equal evaluations of networks.

    python benchmarks/fashion_pairs.py run --data fashion-mnist --out DIR --arm NAME --seed 0 1 2     resumes
    python benchmarks/fashion_pairs.py table --out DIR                    writes fashion_pairs_DATE_cpu.md
    python benchmarks/fashion_pairs.py sheet --out DIR --seed 0 --file docs/fashion-pairs.png

The folder of `--data` has train.parquet and test.parquet of Fashion-MNIST, with the columns `image`, `label`.
A class-conditional EDM teacher of its 28 x 28 pixels makes pairs in 18 Euler steps. `run` prints each
command. 24,576 images of consistency distillation are 98,304 evaluations of networks, and so are 4,096 pairs
of 18 steps with 24,576 images of stage 1.
"""

import argparse
import json
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from textwrap import fill

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.common import spread, table, write
from d2g.core.atomic_files import write_atomically
from d2g.diffusion.teacher import load_teacher
from distill.sampling import load_student
from eval.evaluation import evaluate
from eval.images.folders import load_all, open_images, read_images
from eval.images.resize import NATIVE
from eval.measure.build_reference import build_reference
from eval.measure.reference import Reference
from eval.measure.required_networks import Networks
from eval.measure.source import ImageSource, batch_source
from eval.networks.base import FeatureNet, parameters_sha256
from eval.networks.efficientnet import load_efficientnet_lite0
from eval.protocols.protocol import PROTOCOLS
from eval.runner.samplers import SamplingRequest, ode_source, one_step_source

STEPS, PAIRS, IMAGES = 18, 4_096, 24_576
STUDENT = (
    "regression.losses=pseudo_huber", "optim.name=adamw", "optim.lr=1e-3", "optim.warmup_images=1280",
    "optim.decay_images=-1", "train.batch_size=64", "train.ema_start_images=0",
    "train.ema_halflife_images=2200", "train.precision=fp32",
)  # fmt: skip
"""Settings of all students."""
ARMS = {
    "deterministic pairs": ("ode", "pairs", "student.dropout=0"),
    "stochastic pairs": ("ode", "churned", "student.dropout=0"),
    "re-wired pairs": ("ode", "pairs", "student.dropout=0", "data.rewire=true"),
    "consistency distillation on the pairs' pictures": ("cd", "pairs"),
    "consistency distillation on real pictures": ("cd", "", "gan.real={real}", "gan.real_fraction=1"),
}
"""Stage, store of pairs and settings by name of the arm; `{real}` stands for the training pictures."""
COLUMNS = ("efficientnet", "classifier", "precision", "recall", "class_accuracy")
"""Scores: Frechet distances in features of EfficientNet-lite0 (ImageNet) and of a classifier of garments;
precision and recall in those of EfficientNet-lite0; the share of images that the classifier puts into their
class."""
CLASSES = [str(number) for number in range(10)]
REFERENCE, DRAWN = 2_000, 1_000


def d2g(*arguments: str | Path) -> None:
    """Print and run one d2g command. It resumes, and does nothing where all is done."""
    words = [str(word) for word in arguments]
    print("$ d2g", shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", "d2g_cli", *words], check=True, stdout=subprocess.DEVNULL)


def prepare(data: Path, out: Path) -> None:
    """The teacher, its deterministic pairs and its stochastic ones (S_churn of 40)."""
    teacher, train = out / "teacher", data / "train.parquet"
    d2g("teacher", "train", "--preset", "fashion-edm", "--data", train, "--set", "edm.fit.images=64000",
        "--out", teacher)  # fmt: skip
    pairs = ("pairs", "generate", "--teacher", teacher, "--num-pairs", str(PAIRS), "--solver", "euler",
             "--steps", str(STEPS), "--guidance", "1", "--shard-size", "512", "--seed", "0")  # fmt: skip
    d2g(*pairs, "--out", out / "pairs")
    d2g(*pairs, "--set", "churn=40", "--out", out / "churned")


def run(data: Path, out: Path, arm: str, seed: int, images: int) -> None:
    """Train one arm with one seed and score it, unless its scores are there."""
    folder = out / "students" / str(seed) / arm
    if (folder / "scores.json").is_file():
        return
    stage, pairs, *settings = ARMS[arm]
    options = [option.format(real=data / "train.parquet") for option in (*STUDENT, *settings)]
    d2g("distill", stage, "--preset", "cifar10", "--teacher", out / "teacher",
        *(("--pairs", out / pairs) if pairs else ()), "--seed", str(seed), "--images", str(images),
        *(word for option in options for word in ("--set", option)), "--out", folder)  # fmt: skip
    drawn = one_step_source(arm, load_student(str(folder)), request(seed))
    facts = json.dumps({"images": images, **score(data, out, drawn)}, indent=1)
    write_atomically(folder / "scores.json", facts)
    print(arm, seed, facts, flush=True)


def read(file: Path, per_class: int) -> tuple[Tensor, list[str]]:
    """The first pictures of each class, uint8 [N, 3, 28, 28], and their class numbers, class after class."""
    images, labels = load_all(read_images(open_images(file, "label")))
    of_class: dict[str, list[int]] = {name: [] for name in CLASSES}
    for row, label in enumerate(labels):
        of_class[label].append(row)
    rows = [row for of_one in of_class.values() for row in of_one[:per_class]]
    return images[rows], [labels[row] for row in rows]


class GarmentClassifier(nn.Module):
    """uint8 [B, 3, 28, 28] -> logits [B, 10], by three convolutional blocks and the spatial mean."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, channels in ((1, 32), (32, 64), (64, 128)):
            layers += [
                nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
                nn.Conv2d(channels, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU(),
            ]  # fmt: skip
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(128, len(CLASSES))

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, 28, 28] -> [B, 128]."""
        return self.trunk(images.float().mean(1, keepdim=True) / 127.5 - 1).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, 28, 28] -> logits [B, 10]."""
        return self.head(self.features(images))

    @torch.no_grad()
    def accuracy(self, images: Tensor, names: list[str]) -> float:
        """The share of images [N, 3, 28, 28] that fall into the classes of these numbers."""
        labels = torch.tensor([int(name) for name in names])
        logits = torch.cat([self(part) for part in images.split(500)])
        return (logits.argmax(1) == labels).float().mean().item()


@cache
def classifier(data: Path, out: Path, epochs: int = 3, batch: int = 128) -> GarmentClassifier:
    """The classifier of garments, trained on the training pictures unless its file is there."""
    file, (test, test_names) = out / "classifier.pt", read(data / "test.parquet", 1_000)
    torch.manual_seed(0)
    net = GarmentClassifier()
    if not file.is_file():
        images, names = read(data / "train.parquet", 6_000)
        labels, steps = torch.tensor([int(name) for name in names]), epochs * (len(names) // batch)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(names)).split(batch)[: len(names) // batch]:
                loss = nn.functional.cross_entropy(net(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        torch.save(net.state_dict(), file)
    net.load_state_dict(torch.load(file, weights_only=True))
    net.eval().requires_grad_(False)
    print(f"classifier: accuracy {net.accuracy(test, test_names):.3f} on 10,000 test pictures", flush=True)
    return net


@cache
def references(data: Path, out: Path) -> tuple[dict[str, FeatureNet], dict[str, Reference]]:
    """The feature networks, and the statistics of 200 test pictures of each class."""
    net = classifier(data, out)
    of_classifier = FeatureNet(
        name="classifier", dim=128, sha256=parameters_sha256(net), function=net.features
    )
    networks = {"efficientnet": load_efficientnet_lite0(), "classifier": of_classifier}
    source = batch_source("test pictures", [read(data / "test.parquet", REFERENCE // 10)])
    built = {n: build_reference(source, PROTOCOLS["folder"], {"features": networks[n]}) for n in networks}
    return networks, built


def request(seed: int) -> SamplingRequest:
    """Images of all classes in turn, of noises that the pairs (seed 0) do not have."""
    return SamplingRequest(prompts=CLASSES, seed=1_000 + seed)


def score(data: Path, out: Path, source: ImageSource) -> dict[str, float]:
    """Scores of the first DRAWN images of a source. They are drawn once."""
    (networks, built), net = references(data, out), classifier(data, out)
    batches = list(source.draw(range(DRAWN), 100, (NATIVE,)))
    drawn = [(batch.views[NATIVE], batch.prompts) for batch in batches]
    scores: dict[str, float] = {}
    for name, network in networks.items():
        result = evaluate(
            batch_source(source.name, drawn),
            PROTOCOLS["folder"],
            Networks(sets={"features": network}),
            metrics=("fid", "pr"),
            reference=built[name],
            count=DRAWN,
            resamples=0,
        ).result
        assert result.fid is not None and result.precision is not None and result.recall is not None
        scores[name] = result.fid
        if name == "efficientnet":
            scores |= {"precision": result.precision, "recall": result.recall}
    images, names = torch.cat([views for views, _ in drawn]), [name for _, texts in drawn for name in texts]
    return {**scores, "class_accuracy": net.accuracy(images, names)}


def teacher_source(out: Path, wanted: SamplingRequest) -> ImageSource:
    """Images of the teacher, by the solver of the pairs."""
    teacher = load_teacher(str(out / "teacher"), "cpu")
    return ode_source(teacher, wanted, steps=STEPS, guidance=1, solver="euler")


def score_others(data: Path, out: Path, seeds: list[int]) -> None:
    """Scores of the teacher, and of the test pictures that are not in the reference."""
    file = out / "others.json"
    if file.is_file():
        return
    teachers = [score(data, out, teacher_source(out, request(seed))) for seed in seeds]
    # 100 pictures of each class, after the 200 of the reference.
    images, names = read(data / "test.parquet", 300)
    rows = [row for row in range(len(names)) if row % 300 >= 200]
    pictures = batch_source("pictures", [(images[rows], [names[row] for row in rows])])
    floor = score(data, out, pictures)
    write_atomically(file, json.dumps({"teacher": teachers, "pictures": [floor]}, indent=1))


def lines_of(out: Path) -> list[str]:
    """The table: pictures, teacher, and all arms, with mean and standard deviation over seeds."""
    others = json.loads((out / "others.json").read_text())
    scores = {"test pictures, the floor": others["pictures"], f"teacher, {STEPS} steps": others["teacher"]}
    for arm in ARMS:
        files = sorted(out.glob(f"students/*/{arm}/scores.json"))
        if files:
            scores[arm] = [json.loads(file.read_text()) for file in files]
    rows = [
        [name, len(seeds), *(spread([one[column] for one in seeds]) for column in COLUMNS)]
        for name, seeds in scores.items()
    ]
    about = (
        f"{DRAWN:,} images against {REFERENCE:,} test pictures. Frechet distances by two feature networks; "
        "precision and recall by EfficientNet-lite0."
    )
    return [about, "", *table(["", "seeds", *COLUMNS], rows)]


def draw_sheet(out: Path, seed: int, file: Path) -> None:
    """One noise of each class: a row of the teacher, and one per arm."""
    from matplotlib.figure import Figure

    wanted = request(seed)
    rows = {f"teacher, {STEPS} steps": teacher_source(out, wanted)}
    for arm in ARMS:
        rows[arm] = one_step_source(arm, load_student(str(out / "students" / str(seed) / arm)), wanted)
    figure = Figure(figsize=(9, 0.56 * len(rows)), layout="constrained")
    for axes, (name, source) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        images = next(source.draw(range(len(CLASSES)), len(CLASSES), (NATIVE,))).views[NATIVE]
        axes.imshow(torch.cat(list(images), 2).permute(1, 2, 0))
        axes.set_ylabel(fill(name, 30), rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run arms, or write the table or the sheet."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["run", "table", "sheet"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--arm", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=IMAGES, help="training images of a student")
    parser.add_argument("--file", type=Path, help="the sheet")
    args = parser.parse_args()
    if args.what == "run":
        prepare(args.data, args.out)
        for seed in args.seed:
            for arm in args.arm:
                run(args.data, args.out, arm, seed, args.images)
        score_others(args.data, args.out, args.seed)
    elif args.what == "sheet":
        draw_sheet(args.out, args.seed[0], args.file)
    else:
        write(
            "fashion_pairs", "Which pairs, and consistency distillation, on Fashion-MNIST", lines_of(args.out)
        )


if __name__ == "__main__":
    main()
