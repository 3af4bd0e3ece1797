"""The command line: help, usage errors, --dry-run, and the JSON keys that docs and scripts rely on."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import cli
import tiny
from eval.features import new_clip, save_clip
from eval.html_parts import shown
from jobs import distill_arguments, distill_config
from pairgen.reader import PairReader

ROOT = Path(__file__).parents[1]


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command's words, groups included."""
    group = group or typer.main.get_command(cli.app)
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


COMMANDS = list(commands())
WORKS = [
    "demo",
    "teacher train",
    "pairs generate",
    "pairs plan",
    "distill ode",
    "distill gan",
    "sample",
    "eval run",
    "eval stats --images x --out x.safetensors",
    "eval curve --over guidance=1,2 --out x",
]


class Said:
    """A command's exit code and words. `json`: stdout, one object on one line and nothing else."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        assert len(self.out.splitlines()) == 1, self.out
        found: dict[str, Any] = json.loads(self.out)
        return found


@pytest.fixture
def d2g(capfd: pytest.CaptureFixture[str]) -> Any:
    """`d2g(words…)`: the command line in this process."""

    def run(*words: object) -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main([str(word) for word in words])
        code = left.value.code
        return Said(code if isinstance(code, int) else 0, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def job(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts.txt, pairs/, ode/ and gan/, made through the command line."""
    folder = tmp_path_factory.mktemp("job")
    tiny.save_prompts(folder / "prompts.txt")
    for words in (pair_words(teacher, folder), *(stage_words(s, teacher, folder) for s in ("ode", "gan"))):
        with pytest.raises(SystemExit) as left:
            cli.main(words)
        assert left.value.code == 0, words
    return folder


def pair_words(teacher: Path, folder: Path) -> list[str]:
    options = {
        "teacher": teacher,
        "prompts": folder / "prompts.txt",
        "out": folder / "pairs",
        "num-pairs": 12,
    }
    options |= {
        "steps": 4,
        "guidance": 3,
        "shard-size": 5,
        "batch-size": 4,
        "dtype": "float32",
        "solver": "ddim",
    }
    return [
        "pairs",
        "generate",
        *(str(part) for name, value in options.items() for part in (f"--{name}", value)),
    ]


def stage_words(stage: str, teacher: Path, folder: Path) -> list[str]:
    init = folder / "ode" if stage == "gan" else ""
    return distill_arguments(
        distill_config(teacher, folder / "pairs", stage=stage, init=init), folder / stage
    )


# Help and usage.


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "d2g")
def test_help(words: tuple[str, ...]) -> None:
    found = CliRunner().invoke(cli.app, [*words, "--help"])
    assert found.exit_code == 0 and "Usage" in found.output and len(found.output.splitlines()) > 5


def test_the_contracts_commands_are_there() -> None:
    named = {" ".join(words) for words in COMMANDS}
    contract = {"demo", "doctor", "teacher train", "teacher info", "sample", "export", "lpips distance"}
    contract |= {f"pairs {name}" for name in ("plan", "generate", "info", "verify", "repair", "merge")}
    contract |= {"distill ode", "distill gan", "eval run", "eval compare", "eval stats", "eval curve"}
    assert contract <= named and {words.partition(" --")[0] for words in WORKS} <= named


def test_help_needs_no_torch() -> None:
    """In a fresh process: `--help` answers at once because nothing heavy is imported."""
    code = "import sys, cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    for words in (["--help"], ["distill", "gan", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "Usage" in done.stdout, done.stderr


def test_version_from_a_fresh_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("diffusion2gan ") and done.stderr == ""


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("pairs generate --gidance 3", "--guidance"),
        ("pairs genrate", "generate"),
        ("pairs generate --steps many", "--steps"),
        ("pairs generate --preset sd15-cfg33", "'sd15-cfg3'"),
        ("pairs generate --set guidence=3", "did you mean 'guidance'?"),
        ("pairs generate --set guidance=strong", "takes float"),
        ("pairs generate --set guidance", "name=value"),
        ("pairs generate --solver huen", "did you mean 'heun'?"),
        ("pairs generate", "teacher is not set; give --teacher"),
        ("distill ode --preset minature", "did you mean 'miniature'?"),
        ("distill ode --set regresion.draws=2", "did you mean 'regression'?"),
        ("distill gan --set gan.r1_gama=2", "did you mean 'r1_gamma'?"),
        ("distill gan --set gan=2", "is a group; set one of its members"),
        ("distill gan --set train.images=-1", "train.images is -1"),
        ("distill ode", "pairs is not set; give --pairs"),
        ("teacher train --stages vae,unett --out x", "did you mean 'unet'?"),
        ("demo --preset quik", "did you mean 'quick'?"),
        ("sample --student x", "nothing to draw"),
        ("sample --student x --prompt a --num 0", "num is 0"),
        ("eval run", "give --student or --teacher, or --images"),
        ("eval run --images x --protocol minature", "did you mean 'miniature'?"),
        ("eval run --images x --set protocol.sise=9", "did you mean 'size'?"),
        ("eval run --images x --set protocol.resize=lanzcos", "did you mean 'lanczos'?"),
        ("eval run --images x --metrics fad", "did you mean 'fid'?"),
        ("eval stats --images x --out x.npz", "expected a name ending in .safetensors"),
        ("eval curve --student x --out x --over guidence=1", "curve over 'guidence'"),
        ("eval curve --student x --out x --over guidance=1", "means nothing for a student"),
        ("eval curve --teacher x --out x --over steps=a", "expected say guidance=1,2,4"),
        ("eval curve --teacher x --out x.json --over steps=1", "give a folder"),
        ("eval protocols coco2014-30k", "did you mean 'coco2014-30k-d2gan'?"),
        ("export --student x --dtype int8 --out y", "dtype is 'int8'"),
        ("lpips distance a b", "--teacher is not set"),
    ],
)
def test_bad_usage_exits_2_and_names_what_is_right(
    d2g: Any, words: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    said = d2g(*words.split())
    assert said.code == 2 and names in said.err and said.out == "" and "Traceback" not in said.err, said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", WORKS)
def test_a_dry_run_touches_nothing(
    d2g: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = d2g(*words.split(), "--dry-run", "--json", "--seed", "7").json
    assert found["config"]["seed"] == 7 and list(tmp_path.iterdir()) == []
    shown = d2g(*words.split(), "--dry-run")
    assert shown.code == 0 and "nothing was touched" in shown.out and list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_presets_options_and_overrides_in_that_order(d2g: Any) -> None:
    words = (
        "pairs generate --preset sd15-cfg3 --guidance 4 --seed 1 --set seed=2 --set steps=9 --dry-run --json"
    )
    config = d2g(*words.split()).json["config"]
    assert (config["num_pairs"], config["guidance"], config["seed"], config["steps"]) == (
        3_000_000,
        4.0,
        2,
        9,
    )
    plan = d2g("distill", "gan", "--preset", "sd15-cfg3", "--images", "512", "--dry-run", "--json").json
    assert (plan["steps"], plan["evaluations"], plan["config"]["train"]["images"]) == (2, 2048, 512)


def test_debug_shows_the_traceback(d2g: Any, tmp_path: Path) -> None:
    said = d2g("pairs", "info", tmp_path / "none", "--debug")
    assert said.code == 1 and "Traceback" in said.err and said.err.splitlines()[-1].startswith("error: ")


# The job, and its JSON.


def test_pairs_generate_again_makes_nothing_new(d2g: Any, job: Path, teacher: Path) -> None:
    found = d2g(*pair_words(teacher, job), "--json").json
    assert {"out", "pairs", "new_pairs", "shards", "seconds", "pairs_per_sec"} <= set(found)
    assert (found["pairs"], found["new_pairs"], found["shards"]) == (12, 0, 3)


def test_pairs_info_verify_and_repair(d2g: Any, job: Path) -> None:
    info = d2g("pairs", "info", job / "pairs", "--json").json
    assert {"pairs", "shards", "spec", "complete", "gib"} <= set(info)
    assert info["complete"] is True and info["spec"]["guidance"] == 3.0
    verified = d2g("pairs", "verify", job / "pairs", "--resimulate", 3, "--json").json
    assert {"ok", "checked", "bad_shards", "max_abs_err"} <= set(verified)
    assert verified["ok"] is True and verified["checked"] == 12 and verified["max_abs_err"] < 1e-4
    assert d2g("pairs", "repair", job / "pairs", "--json").json == {"quarantined": [], "regenerated": 0}
    strict = d2g("pairs", "verify", job / "pairs", "--resimulate", 3, "--tolerance", -1)
    assert strict.code == 1 and strict.err.splitlines()[-1].startswith("error: ")


def test_pairs_plan(d2g: Any, job: Path, teacher: Path) -> None:
    given = ["--teacher", teacher, "--prompts", job / "prompts.txt", "--num-pairs", 2**20, "--steps", 4]
    plan = d2g("pairs", "plan", *given, "--batch-size", 2, "--json").json
    keys = {"pairs", "gib", "gib_with_noise", "shards", "seconds_per_pair", "gpu_hours", "measured_on"}
    assert keys <= set(plan) and plan["pairs"] == 2**20 and plan["gib"] == 0.125


def test_pairs_merge(d2g: Any, job: Path, tmp_path: Path) -> None:
    found = d2g("pairs", "merge", job / "pairs", job / "pairs", "--out", tmp_path / "all", "--json").json
    assert found["pairs"] == 12 and PairReader(tmp_path / "all").complete


@pytest.mark.parametrize("stage", ["ode", "gan"])
def test_distill_again_is_done_already(d2g: Any, job: Path, teacher: Path, stage: str) -> None:
    found = d2g(*stage_words(stage, teacher, job), "--json").json
    assert {"out", "images", "steps", "seconds", "images_per_sec", "loss", "checkpoint"} <= set(found)
    assert (found["images"], found["steps"]) == (20, 5) and Path(found["checkpoint"]).is_dir()
    wanted = {"g", "e_latent_lpips"} | ({"d", "g_gan"} if stage == "gan" else set())
    assert wanted <= set(found["loss"])


def test_distill_goes_on_from_where_it_stopped(d2g: Any, job: Path, teacher: Path) -> None:
    words = distill_arguments(distill_config(teacher, job / "pairs"), job / "more", "train.images=8")
    assert d2g(*words, "--json").json["steps"] == 2
    assert d2g(*words, "--images", 99, "--set", "train.images=12", "--json").json["steps"] == 3


def test_sample(d2g: Any, job: Path, tmp_path: Path) -> None:
    words = [
        "--prompt",
        "a red cube",
        "--prompt",
        "a blue sphere",
        "--num",
        2,
        "--seed",
        3,
        "--batch-size",
        3,
    ]
    found = d2g("sample", "--student", job / "gan", *words, "--out", tmp_path, "--json").json
    assert {"out", "images", "seconds_per_image"} <= set(found) and found["images"] == 4
    with Image.open(tmp_path / "00003.png") as image:
        assert image.info == {"prompt": "a blue sphere", "seed": "3", "index": "3"}
    many = d2g(
        "sample", "--student", job / "ode", "--prompts", job / "prompts.txt", "--out", tmp_path, "--json"
    ).json
    assert many["images"] == 6


def test_export(d2g: Any, job: Path, tmp_path: Path) -> None:
    found = d2g("export", "--student", job / "gan", "--out", tmp_path / "student", "--json").json
    assert {"out", "parity_max_abs_err"} <= set(found) and found["parity_max_abs_err"] < 0.05
    drawn = d2g(
        "sample", "--student", tmp_path / "student", "--prompt", "a", "--out", tmp_path / "drawn", "--json"
    ).json
    assert drawn["images"] == 1


def test_teacher_info_and_doctor(d2g: Any, teacher: Path) -> None:
    info = d2g("teacher", "info", teacher, "--json").json
    assert {
        "pipeline",
        "prediction_type",
        "latent_shape",
        "params",
        "solver_defaults",
        "conditioning",
    } <= set(info)
    assert info["latent_shape"] == [4, 4, 4]
    doctor = d2g("doctor", "--json").json
    assert {"torch", "cuda", "devices", "bf16", "memory_gib", "disk_free_gib", "versions", "problems"} <= set(
        doctor
    )
    assert doctor["torch"] == torch.__version__ and doctor["memory_gib"] > 0


def test_a_table_for_people(d2g: Any, job: Path) -> None:
    said = d2g("pairs", "info", job / "pairs")
    assert said.code == 0 and "complete" in said.out and "True" in said.out


# Evaluation.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = torch.Generator().manual_seed(0)
    for number in range(10):
        pixels = torch.randint(256, (16, 16, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{n}.png", "caption": tiny.CAPTIONS[n % 6]}) for n in range(10)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torchvision.models import squeezenet1_0

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file(squeezenet1_0(weights=None).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def clip(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 16 px and 8 features, untrained."""
    folder = tmp_path_factory.mktemp("clip")
    tower = {"width": 16, "layers": 1, "mlp_ratio": 1.0}
    vocabulary = len(json.loads((teacher / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "head_width": 8, **tower},
        "text_cfg": {
            "context_length": 12,
            "vocab_size": vocabulary,
            "heads": 2,
            "hf_tokenizer_name": "tokenizer files beside this one",
            **tower,
        },
    }
    torch.manual_seed(0)
    shape = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    save_clip(new_clip(config), config, shape, teacher / "tokenizer", folder)
    return folder


KEYS = {"protocol", "protocol_sha256", "fid", "clip_score", "precision", "recall", "counts", "models", "ci"}


def test_eval_of_images_with_squeezenet(d2g: Any, pictures: Path, squeezenet: Path) -> None:
    words = ["--images", pictures, "--reference", pictures, "--features", "squeezenet", "--metrics", "pr"]
    found = d2g("eval", "run", *words, "--weights", squeezenet, "--json").json
    assert KEYS <= set(found) and found["models"]["features"]["name"] == "squeezenet"
    assert (found["precision"], found["recall"], found["counts"]["images"]) == (1.0, 1.0, 10)


def test_eval_of_a_student_and_its_comparison(
    d2g: Any, job: Path, pictures: Path, clip: Path, tmp_path: Path
) -> None:
    """FID, CLIP score, precision and recall of one-step images against pictures, all with one tiny CLIP."""
    words = [
        "--prompts",
        job / "prompts.txt",
        "--num",
        8,
        "--reference",
        pictures,
        "--metrics",
        "fid,pr,clip",
    ]
    words += ["--features", "clip", "--weights", clip, "--clip", clip]
    found = {}
    for stage in ("ode", "gan"):
        out = tmp_path / f"{stage}.json"
        found[stage] = d2g("eval", "run", "--student", job / stage, *words, "--out", out, "--json").json
        assert KEYS <= set(found[stage]) and found[stage] == json.loads(out.read_text())
        assert found[stage]["fid"] > 0 and -1 <= found[stage]["clip_score"] <= 1
        assert found[stage]["counts"] == {"images": 8, "reference": 10, "pr_images": 8, "pr_reference": 10}
    rows = d2g("eval", "compare", tmp_path / "ode.json", tmp_path / "gan.json", "--json").json["results"]
    assert {Path(row["name"]).stem: row["fid"] for row in rows} == {s: found[s]["fid"] for s in found}
    said = d2g("eval", "compare", tmp_path / "ode.json", tmp_path / "gan.json").out
    for stage in found:
        assert shown(found[stage]["fid"], found[stage]["ci"]["fid"])[0] in said, stage
    assert "CLIP score" in said and "{" not in said


def test_eval_of_a_teacher(d2g: Any, job: Path, teacher: Path, pictures: Path, clip: Path) -> None:
    words = ["--prompts", job / "prompts.txt", "--num", 4, "--steps", 2, "--metrics", "clip", "--clip", clip]
    found = d2g("eval", "run", "--teacher", teacher, *words, "--json").json
    assert found["clip_score"] is not None and found["fid"] is None and found["counts"] == {"images": 4}


def test_eval_stats_from_a_folder_and_a_curve_with_them(
    d2g: Any, job: Path, teacher: Path, pictures: Path, clip: Path, tmp_path: Path
) -> None:
    networks = ["--features", "clip", "--weights", clip, "--json"]
    file = tmp_path / "real.safetensors"
    made = d2g("eval", "stats", "--images", pictures, "--metrics", "fid,pr", "--out", file, *networks).json
    assert made["images"] == 10 and made["out"] == str(file)
    words = ["--teacher", teacher, "--prompts", job / "prompts.txt", "--num", 8, "--reference", file]
    words += ["--over", "steps=1,2", "--clip", clip, "--out", tmp_path / "curve", "--set", "resamples=0"]
    curve = d2g("eval", "curve", *words, *networks).json
    assert [point["steps"] for point in curve["points"]] == [1, 2]
    assert {"fid", "clip_score"} <= set(curve["points"][0]) and (tmp_path / "curve" / "curve.png").is_file()
    said = d2g("eval", "curve", *words, *networks[:-1]).out
    assert f"{curve['points'][1]['fid']:.4g}" in said and "CLIP score" in said and "{" not in said


def test_eval_protocols(d2g: Any) -> None:
    shown = d2g("eval", "protocols")
    assert shown.code == 0 and "coco2014-30k-d2gan" in shown.out and "40,504" in shown.out
    one = d2g("eval", "protocols", "scenes-5k", "--json").json
    assert one["images"] == 5_000 and len(one["sha256"]) == 64
    assert set(d2g("eval", "protocols", "--json").json) > {"folder", "cifar10-50k"}


def test_eval_for_people(d2g: Any, job: Path, clip: Path) -> None:
    words = ["--student", job / "gan", "--prompts", job / "prompts.txt", "--metrics", "clip", "--clip", clip]
    said = d2g("eval", "run", *words, "--latency", "--set", "latency_repeats=1")
    assert said.code == 0 and "CLIP score" in said.out and "6 images" in said.out, said.err
    assert "student, an image" in said.out and "teacher, an image" in said.out and "ms at batch 1" in said.out


def test_lpips_distance(d2g: Any, teacher: Path, pictures: Path) -> None:
    def distance(a: str, b: str) -> float:
        words = [pictures / a, pictures / b, "--teacher", teacher, "--json"]
        return float(d2g("lpips", "distance", *words).json["distance"])

    assert distance("0.png", "0.png") == 0.0 and distance("0.png", "1.png") > 0
