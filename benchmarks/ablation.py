"""Ablation of the method on the miniature: FID, recall and caption accuracy of each part, over several seeds.

    python benchmarks/ablation.py run --pairs DIR --out DIR --seed 0     runs of one seed; resumes
    python benchmarks/ablation.py table --out DIR                        benchmarks/ablation_DATE_cpu.md

Pairs come from `d2g pairs generate --preset miniature`, or from the demo. All runs of a seed share a first
stage. The parts (method.md "Ablation of the discriminator"), and the regression alone, continue from it for
the same number of images. The losses (method.md "Comparison of regression losses") are first stages. Each
student's EMA weights are evaluated on the same captions and noise.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import table, write
from d2g.core.atomic_files import write_atomically
from d2g.core.progress import Progress
from d2g.diffusion import pretrained
from distill.config.presets import DISTILL_PRESETS
from distill.config.run import DistillConfig
from distill.sampling import load_student
from distill.training.train import train
from eval.evaluation import evaluate
from eval.measure.build_reference import build_reference
from eval.measure.required_networks import Networks
from eval.measure.source import batch_source
from eval.networks.registry import load_clip
from eval.protocols.protocol import PROTOCOLS
from eval.runner.samplers import SamplingRequest, one_step_source
from miniature.metrics import oracle_features, oracle_measures, real_scenes
from miniature.oracle import load_oracle
from miniature.registration import register_eval_scenes

PARTS = ("d", "z", "r1", "multiscale", "mix")
LOSSES = ("mse", "pseudo-huber", "latent-lpips", "e-latent-lpips")
COLUMNS = ("fid", "precision", "recall", "caption_accuracy", "caption_exact")


def shortened(config: DistillConfig, images: int) -> DistillConfig:
    """The config for `images` images, with few reports and one checkpoint in the middle."""
    return replace(
        config,
        train=replace(config.train, images=images, report_images=images // 8, checkpoint_images=images // 2),
    )


def plan(pairs: str, out: Path, seed: int, images: tuple[int, int, int]) -> dict[str, DistillConfig]:
    """All runs of a seed by name, the shared first stage first."""
    base = replace(DISTILL_PRESETS["miniature"]["ode"], pairs=pairs, seed=seed)
    runs = {"first stage": shortened(base, images[0])}
    start = str(out / str(seed) / "first stage")
    parts = {name: DISTILL_PRESETS[f"miniature-ablation-{name}"]["gan"] for name in PARTS}
    parts = {"regression": replace(parts["d"], stage="ode"), **parts}
    for name, config in parts.items():
        continued = replace(config, pairs=pairs, seed=seed, init=start)
        runs[f"part {name}"] = shortened(continued, images[1])
    for name in LOSSES:
        loss_run = replace(DISTILL_PRESETS[f"miniature-loss-{name}"]["ode"], pairs=pairs, seed=seed)
        runs[f"loss {name}"] = shortened(loss_run, images[2])
    return runs


def score(run: Path, count: int) -> dict[str, float]:
    """Metrics of the student of a run on `count` test scenes."""
    register_eval_scenes()
    oracle, protocol = load_oracle(), PROTOCOLS["miniature"]
    networks = Networks(
        sets={"features": oracle_features(oracle)},
        clip=load_clip(str(pretrained.resolve("miniature") / "clip")),
        extra=oracle_measures(oracle, protocol.preprocessing),
    )
    scenes = real_scenes(count, lambda *_: None)
    texts = [text for _, batch in scenes for text in batch]
    real = build_reference(batch_source("scenes", scenes), protocol, networks.sets)
    source = one_step_source(
        str(run), load_student(str(run)), SamplingRequest(prompts=texts, seed=0, device="cpu")
    )
    metrics = ("fid", "pr", "caption_accuracy")
    result = evaluate(
        source, protocol, networks, metrics=metrics, reference=real, count=count, resamples=0
    ).result
    values = {name: getattr(result, name) for name in ("fid", "precision", "recall")}
    return {k: float(v) for k, v in {**values, **result.extra}.items() if k in COLUMNS and v is not None}


def run(pairs: str, out: Path, seed: int, images: tuple[int, int, int], count: int) -> None:
    """Train and evaluate the runs of a seed that have no scores yet."""

    def print_end(name: str) -> Progress:
        return lambda _, done, total: (
            print(f"{seed} {name}: {done}/{total}", flush=True) if done == total else None
        )

    for name, config in plan(pairs, out, seed, images).items():
        folder = out / str(seed) / name
        if (folder / "scores.json").is_file():
            continue
        summary = train(config, folder, print_end(name))
        facts = {"images": summary.images, "batch_size": config.train.batch_size, "judged": count}
        write_atomically(folder / "scores.json", json.dumps({**score(folder, count), **facts}, indent=1))


def spread(values: list[float]) -> str:
    """Mean and standard deviation as text; one value alone."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def tables(out: Path) -> list[str]:
    """Lines of a table of parts and a table of losses."""
    all_scores: dict[str, list[dict[str, float]]] = {}
    for file in sorted(out.glob("*/*/scores.json")):
        all_scores.setdefault(file.parent.name, []).append(json.loads(file.read_text()))
    lines = []
    for title, kind, names in (
        ("Parts, each added to the row above", "part", ("regression", *PARTS)),
        ("Losses of the first stage", "loss", LOSSES),
    ):
        rows = []
        for name in names:
            scores = all_scores.get(f"{kind} {name}", [])
            if scores:
                cells = [spread([score[column] for score in scores]) for column in COLUMNS]
                rows.append([name, len(scores), int(scores[0]["images"]), *cells])
        lines += [f"## {title}", "", *table(["", "seeds", "images", *COLUMNS], rows), ""]
    if first := all_scores.get("first stage"):
        cells = [f"{column} {spread([score[column] for score in first])}" for column in COLUMNS]
        lines += [f"The first stage of all parts, {int(first[0]['images'])} images: {', '.join(cells)}."]
    return lines


def main() -> None:
    """Run one seed, or write the table of all seeds."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--pairs")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--images", type=int, nargs=3, default=(24_000, 12_000, 24_000), metavar=("FIRST", "PART", "LOSS")
    )
    parser.add_argument("--judged", type=int, default=2_048, help="test scenes per student")
    args = parser.parse_args()
    if args.what == "run":
        run(args.pairs, args.out, args.seed, tuple(args.images), args.judged)
    else:
        write("ablation", "Ablation on the miniature", tables(args.out))


if __name__ == "__main__":
    main()
