"""`d2g`: parse, build a config, call one library function, print. Heavy imports happen inside the
commands.
"""

import json
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from core.config import override, pick, to_json
from core.errors import SettingError, UserError

T = TypeVar("T")
app = typer.Typer(help="Distill diffusion teachers into one-step conditional GANs.", no_args_is_help=True)
teacher_app = typer.Typer(help="Train or inspect a teacher.", no_args_is_help=True)
pairs_app = typer.Typer(help="Make and look after noise-latent pairs.", no_args_is_help=True)
lpips_app = typer.Typer(help="The latent perceptual distance.", no_args_is_help=True)
distill_app = typer.Typer(help="Train a one-step student.", no_args_is_help=True)
eval_app = typer.Typer(help="Measure students, teachers and images.", no_args_is_help=True)
for _name, _app in (
    ("teacher", teacher_app),
    ("pairs", pairs_app),
    ("lpips", lpips_app),
    ("distill", distill_app),
    ("eval", eval_app),
):
    app.add_typer(_app, name=_name)

Preset = Annotated[str | None, typer.Option(help="A named set of settings.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override one setting, a.b=value; repeatable.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print settings and plan; touch nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as stdout's last line.")]
Out = Annotated[Path, typer.Option(help="Output folder. Run the same command again to resume.")]
TeacherOption = Annotated[
    str | None, typer.Option(help="Folder or hub id in diffusers layout, or a shipped name: miniature.")
]


class Reporter:
    """Progress on stderr: rich bars on a terminal, else a line every 10 seconds."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.tasks: dict[str, Any] = {}
        self.begun: dict[str, tuple[float, int]] = {}
        self.last = 0.0

    def __call__(self, label: str, done: int, total: int) -> None:
        from core import dist

        if dist.rank() != 0:
            return
        now = time.monotonic()
        started, first = self.begun.setdefault(label, (now, done))
        rate = (done - first) / (now - started) if now > started else 0.0
        if self.console.is_terminal:
            if not self.tasks:
                self.bars.start()
            if label not in self.tasks:
                self.tasks[label] = self.bars.add_task(label, total=total or None, rate="")
            self.bars.update(self.tasks[label], completed=done, rate=f"{rate:.1f}/s")
        elif now - self.last >= 10 or (total and done >= total):
            self.last = now
            left = f", {(total - done) / rate:.0f} s left" if rate and total else ""
            print(f"{label}: {done}/{total or '?'} ({rate:.1f}/s{left})", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Leave the terminal clean before anything else is printed."""
        if self.tasks:
            self.bars.stop()


reporter = Reporter()


def configure(config: T, options: Mapping[str, Any], sets: list[str] | None) -> T:
    """A preset's config with the options that were given, then --set overrides."""
    given = {k: str(v) if isinstance(v, Path) else v for k, v in options.items() if v is not None}
    return override(replace(config, **given), sets or [])  # type: ignore[type-var]  # every config is a dataclass


def emit(result: Any, as_json: bool, title: str) -> None:
    """Print a result: one JSON line, or a table for people. Only rank 0 speaks."""
    from core import dist

    reporter.stop()
    data = result if isinstance(result, dict) else asdict(result)
    if dist.rank() != 0:
        return
    if as_json:
        print(json.dumps(data, default=str), flush=True)
        return
    table = Table(title=title, show_header=False)
    for key, value in data.items():
        shown = (
            f"{value:.4g}"
            if isinstance(value, float)
            else json.dumps(value, default=str)
            if isinstance(value, dict | list)
            else str(value)
        )
        table.add_row(key, shown)
    Console().print(table)


def dry(config: Any, as_json: bool, plan: Mapping[str, Any] | None = None) -> None:
    """Print what would run and leave."""
    emit({"config": to_json(config), **(plan or {})}, as_json, "dry run: nothing was touched")
    raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report, pictures and all that is made.")] = Path(
        "d2g-demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run of half a minute; its numbers mean little.")
    ] = False,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Distil the bundled miniature teacher: pairs, both stages, evaluation, a report with pictures."""
    from miniature.demo import PRESETS, run_demo

    config = configure(
        pick(PRESETS, preset or ("quick" if quick else "default"), "preset"), {"seed": seed}, sets
    )
    if dry_run:
        dry(config, as_json)
    result = run_demo(config, out, reporter)
    emit(result, as_json, f"pictures and curves: {result.report}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has, and what stands in the way."""
    from core.doctor import examine

    emit(examine(), as_json, "d2g doctor")


@teacher_app.command("train")
def teacher_train(
    data: Annotated[str | None, typer.Option(help="scenes, an image folder, or image-parquet.")] = None,
    out: Out = Path("teacher"),
    stages: Annotated[str, typer.Option(help="Which pieces, comma-separated.")] = "data,vae,unet,lpips,clip",
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a small Stable-Diffusion-shaped teacher on captioned pictures."""
    from miniature.teacher import PRESETS, train_teacher

    config = configure(pick(PRESETS, preset or "scenes", "preset"), {"data": data, "seed": seed}, sets)
    if dry_run:
        dry(config, as_json)
    emit(train_teacher(config, out, tuple(stages.split(",")), reporter), as_json, "teacher")


@teacher_app.command("info")
def teacher_info(teacher: str, as_json: Json = False) -> None:
    """What was found in a teacher's folder."""
    from pairgen.teacher import describe_teacher

    emit(describe_teacher(teacher), as_json, teacher)


def _pair_config(preset: str | None, sets: list[str] | None, **options: Any) -> Any:
    from pairgen.config import PRESETS

    return configure(pick(PRESETS, preset or "default", "preset"), options, sets)


Prompts = Annotated[Path | None, typer.Option(help=".txt .jsonl .csv .tsv .json (COCO) .parquet")]
NumPairs = Annotated[int | None, typer.Option(help="Default: one per prompt.")]
Steps = Annotated[int | None, typer.Option(help="Solver steps [50].")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance [8]; 1 is none.")]
Solver = Annotated[str | None, typer.Option(help="ddim or heun.")]
BatchSize = Annotated[int | None, typer.Option(help="Rows per network evaluation.")]


@pairs_app.command("generate")
def pairs_generate(
    teacher: TeacherOption = None,
    prompts: Prompts = None,
    out: Out = Path("pairs"),
    num_pairs: NumPairs = None,
    steps: Steps = None,
    guidance: Guidance = None,
    solver: Solver = None,
    batch_size: BatchSize = None,
    dtype: Annotated[str | None, typer.Option(help="Stored type, float16 or float32.")] = None,
    shard_size: Annotated[int | None, typer.Option(help="Rows per shard.")] = None,
    noise: Annotated[str | None, typer.Option(help="stored, or seeded: drawn again on reading.")] = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Send noise through the teacher and store (noise, latent, prompt) rows."""
    from core import dist
    from pairgen.generate import generate_pairs

    given = locals()
    names = (
        "teacher",
        "prompts",
        "num_pairs",
        "steps",
        "guidance",
        "solver",
        "batch_size",
        "dtype",
        "shard_size",
        "noise",
        "seed",
    )
    config = _pair_config(preset, sets, **{name: given[name] for name in names})
    if dry_run:
        dry(config, as_json)
    try:
        emit(generate_pairs(config, out, reporter), as_json, "pairs")
    finally:
        dist.finish()


@pairs_app.command("plan")
def pairs_plan(
    teacher: TeacherOption = None,
    prompts: Prompts = None,
    num_pairs: NumPairs = None,
    steps: Steps = None,
    guidance: Guidance = None,
    solver: Solver = None,
    batch_size: BatchSize = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Time a few batches here; print GPU-hours, GiB and shards before anything is spent."""
    from pairgen.generate import plan_pairs

    given = locals()
    names = ("teacher", "prompts", "num_pairs", "steps", "guidance", "solver", "batch_size", "seed")
    config = _pair_config(preset, sets, **{name: given[name] for name in names})
    if dry_run:
        dry(config, as_json)
    emit(plan_pairs(config), as_json, "plan")


@pairs_app.command("info")
def pairs_info(folder: Path, as_json: Json = False) -> None:
    """Pairs, shards, spec and size of a store."""
    from pairgen.verify import store_info

    emit(store_info(folder), as_json, str(folder))


@pairs_app.command("verify")
def pairs_verify(
    folder: Path,
    resimulate: Annotated[int, typer.Option(help="Also send this many rows through the teacher again.")] = 0,
    teacher: TeacherOption = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference --resimulate accepts.")] = 0.02,
    as_json: Json = False,
) -> None:
    """Read every byte of a store and say what is damaged or missing. Exit 1 when not ok."""
    from pairgen.verify import verify_store

    result: dict[str, Any] = asdict(verify_store(folder, reporter)) | {"max_abs_err": None}
    if resimulate and result["ok"]:
        from pairgen.generate import resimulate as again

        result["max_abs_err"] = again(folder, resimulate, teacher)
        result["ok"] = result["max_abs_err"] <= tolerance
    emit(result, as_json, str(folder))
    if not result["ok"]:
        print(f"error: {folder} is not ok; `d2g pairs repair {folder}`, then generate again", file=sys.stderr)
        raise typer.Exit(1)


@pairs_app.command("repair")
def pairs_repair(
    folder: Path,
    prompts: Annotated[
        Path | None, typer.Option(help="The store's prompt file: also make missing rows.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Move bad shards to quarantine/; with --prompts, make the missing rows again."""
    from pairgen.verify import repair_store

    quarantined, regenerated = repair_store(folder, reporter), 0
    if prompts is not None:
        from pairgen.generate import regenerate

        regenerated = regenerate(folder, prompts, reporter)
    emit({"quarantined": quarantined, "regenerated": regenerated}, as_json, str(folder))


@pairs_app.command("merge")
def pairs_merge(folders: list[Path], out: Out, as_json: Json = False) -> None:
    """Join stores of one spec that hold different shards."""
    from pairgen.verify import merge_stores, store_info

    merge_stores(folders, out)
    emit(store_info(out), as_json, str(out))


@lpips_app.command("distance")
def lpips_distance(
    a: Annotated[Path, typer.Argument(help="Image file.")],
    b: Annotated[Path, typer.Argument(help="Image file of the same size.")],
    teacher: TeacherOption = None,
    weights: Annotated[Path | None, typer.Option(help="LatentLPIPS folder [TEACHER/latent_lpips].")] = None,
    augment: Annotated[str, typer.Option(help="none, or letters of bgco.")] = "none",
    draws: Annotated[int, typer.Option(help="Transforms averaged over, with --augment.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the transforms.")] = 0,
    as_json: Json = False,
) -> None:
    """LatentLPIPS between two images, in a teacher's latent space."""
    from eval.lpips_pair import image_distance

    if teacher is None:
        raise SettingError("--teacher is not set; its VAE makes the latents")
    emit({"distance": image_distance(a, b, teacher, weights, augment, draws, seed)}, as_json, f"{a} | {b}")


def _distill(
    stage: str,
    preset: str | None,
    sets: list[str] | None,
    out: Path,
    dry_run: bool,
    as_json: bool,
    options: dict[str, Any],
    train_options: dict[str, Any],
) -> None:
    from core import dist
    from distill.config import preset as distill_preset

    config = distill_preset(preset or "sd15-cfg8", stage)
    config = replace(config, train=configure(config.train, train_options, None))
    config = configure(config, options, sets)
    if dry_run:
        from distill.config import plan

        dry(config, as_json, plan(config))
    from distill.train import train

    try:
        emit(train(config, out, reporter), as_json, f"distill {stage}")
    finally:
        dist.finish()


Pairs = Annotated[Path | None, typer.Option(help="Folder of `d2g pairs generate`.")]
Lpips = Annotated[Path | None, typer.Option(help="LatentLPIPS folder [TEACHER/latent_lpips].")]
Minutes = Annotated[float | None, typer.Option(help="Stop after so long, with a checkpoint.")]
Images = Annotated[int | None, typer.Option(help="Training images, over all ranks.")]


@distill_app.command("ode")
def distill_ode(
    pairs: Pairs = None,
    teacher: TeacherOption = None,
    out: Out = Path("runs/ode"),
    lpips: Lpips = None,
    minutes: Minutes = None,
    images: Images = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Stage 1: regress the teacher's latents from their noise in one step."""
    options = {"pairs": pairs, "teacher": teacher, "lpips": lpips, "seed": seed}
    _distill("ode", preset, sets, out, dry_run, as_json, options, {"minutes": minutes, "images": images})


@distill_app.command("gan")
def distill_gan(
    pairs: Pairs = None,
    teacher: TeacherOption = None,
    out: Out = Path("runs/gan"),
    init: Annotated[str | None, typer.Option(help="Stage-1 run, or exported student, to start from.")] = None,
    lpips: Lpips = None,
    minutes: Minutes = None,
    images: Images = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Stage 2: add the text- and noise-conditional discriminator."""
    options = {"pairs": pairs, "teacher": teacher, "lpips": lpips, "init": init, "seed": seed}
    _distill("gan", preset, sets, out, dry_run, as_json, options, {"minutes": minutes, "images": images})


@app.command()
def sample(
    student: Annotated[
        str | None, typer.Option(help="Run folder, exported student, or a shipped name.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text; repeatable.")] = None,
    prompts: Prompts = None,
    out: Out = Path("samples"),
    num: Annotated[int | None, typer.Option(help="Images per prompt [1].")] = None,
    teacher: TeacherOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step [32].")] = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Annotated[int | None, typer.Option(help="Image i uses the noise of (seed, i) [0].")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Draw images in one step: PNGs that carry their prompt, and a grid."""
    from distill.config import SAMPLE_PRESETS

    options = {
        "student": student, "prompt": tuple(prompt) if prompt else None, "prompts": prompts, "num": num,
        "teacher": teacher, "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    config = configure(pick(SAMPLE_PRESETS, preset or "default", "preset"), options, sets)
    if dry_run:
        dry(config, as_json)
    from distill.sample import save_samples
    from pairgen.prompts import read_prompts

    texts = [*config.prompt, *(read_prompts(Path(config.prompts)) if config.prompts else [])]
    if not texts:
        raise SettingError("nothing to draw; give --prompt TEXT or --prompts FILE")
    texts = [text for text in texts for _ in range(config.num)]
    drawn = save_samples(config.student, texts, out, config.seed, config.batch_size, config.teacher, reporter)
    emit(drawn, as_json, "samples")


@eval_app.command("run")
def eval_run(
    student: Annotated[
        str | None, typer.Option(help="Run folder, exported student, or a shipped name.")
    ] = None,
    teacher: TeacherOption = None,
    images: Annotated[Path | None, typer.Option(help="Folder or parquet of images to measure.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Real images: folder or parquet.")] = None,
    protocol: Annotated[str | None, typer.Option(help="Named protocol [custom].")] = None,
    metrics: Annotated[str | None, typer.Option(help="Of fid,kid,clip,pr, comma-separated.")] = None,
    features: Annotated[
        str | None, typer.Option(help="inception, inception-tf, squeezenet, clip, oracle.")
    ] = None,
    feature_weights: Annotated[
        str | None, typer.Option(help="Its weights file (clip: name or folder).")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP for the score: open_clip name:tag or folder.")
    ] = None,
    prompts: Prompts = None,
    num: Annotated[int | None, typer.Option(help="Images to draw [one per prompt].")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps of a teacher [50].")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance of a teacher [3].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per batch [64].")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Annotated[int | None, typer.Option(help="Image i uses the noise of (seed, i) [0].")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """FID, CLIP score, precision and recall of a student, a teacher or a folder of images."""
    from eval.config import PRESETS

    given = locals()
    names = (
        "student", "teacher", "images", "reference", "protocol", "features", "feature_weights", "clip",
        "prompts", "num", "steps", "guidance", "batch_size", "seed",
    )  # fmt: skip
    options = {name: given[name] for name in names} | {
        "metrics": tuple(metrics.split(",")) if metrics else None
    }
    config = configure(pick(PRESETS, preset or "default", "preset"), options, sets)
    if dry_run:
        dry(config, as_json)
    from miniature.judge import run_evaluation

    result = run_evaluation(**asdict(config), progress=reporter)
    if out is not None:
        from core.checkpoint import write_atomically

        write_atomically(out, json.dumps(result, indent=1))
    emit(result, as_json, f"protocol {config.protocol}")


@eval_app.command("stats")
def eval_stats(
    images: Annotated[Path, typer.Option(help="Real images: folder or parquet.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write, for `eval run --reference`.")],
    features: Annotated[str, typer.Option(help="inception, inception-tf, squeezenet or clip.")],
    feature_weights: Annotated[str, typer.Option(help="Its weights file (clip: name or folder).")],
    protocol: Annotated[str, typer.Option(help="Named protocol.")] = "custom",
    as_json: Json = False,
) -> None:
    """Feature statistics of a reference set, computed once."""
    from miniature.judge import save_statistics

    if out.suffix != ".safetensors":
        raise SettingError(f"--out is {out}; expected a name ending in .safetensors")
    emit(save_statistics(images, out, protocol, features, feature_weights, reporter), as_json, str(out))


@eval_app.command("compare")
def eval_compare(results: list[Path], as_json: Json = False) -> None:
    """A table of several results; refuses mixed protocols."""
    from eval.result import EvalResult, compare

    rows = compare({str(path): EvalResult.load(path) for path in results})
    emit({"results": rows}, as_json, "comparison")


@app.command()
def export(
    student: Annotated[str, typer.Option(help="Run folder.")],
    out: Out,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp16",
    as_json: Json = False,
) -> None:
    """Write a run's student as a small safetensors folder that `sample` and `distill gan --init` take."""
    from distill.export import export_student

    emit(export_student(student, out, dtype), as_json, "export")


def _version(value: bool) -> None:
    if value:
        print(f"diffusion2gan {installed_version('diffusion2gan')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options before the command."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every failure becomes one `error:` line and an exit code."""
    argv = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in argv
    try:
        app(args=[a for a in argv if a != "--debug"], standalone_mode=True)
    except UserError as error:
        _fail(error, str(error), error.exit_code, debug)
    except FloatingPointError as error:
        _fail(error, str(error), 1, debug)
    except SystemExit as left:
        # typer turns Ctrl-C outside the loops, which have their own answer, into a silent exit.
        if isinstance(left.__context__ and left.__context__.__cause__, KeyboardInterrupt):
            _fail(
                left, "interrupted; what was finished before is safe, run the same command again", 130, debug
            )
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        _fail(
            error,
            f"{type(error).__name__}: {text}; this is unexpected, run again with --debug and report it",
            1,
            debug,
        )


def _fail(error: BaseException, text: str, code: int, debug: bool) -> None:
    reporter.stop()
    if debug:
        traceback.print_exception(error)
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
