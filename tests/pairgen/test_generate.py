"""pairgen.generate: rows depend on (spec, index) only, for any batch size, order and interruption."""

import json
import math
import shutil
import signal
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

import tiny
from d2g.core import seeds
from d2g.core.errors import Interrupted, SettingError, UserError
from jobs import Running, d2g, make_pairs
from pairgen import speed
from pairgen.config import PAIR_PRESETS, PairConfig
from pairgen.cost import GPU_COUNTS, plan_pairs
from pairgen.generate import Tally, generate_pairs, regenerate, resimulate
from pairgen.job import config_from_spec, open_job
from pairgen.merge import merge_stores
from pairgen.other_formats import export_store
from pairgen.speed import fastest_batch
from pairgen.store.reader import PairReader
from pairgen.store.spec import create_store, read_spec, shards_present
from pairgen.store.writer import PairWriter
from pairgen.verify import verify_store
from stores import SPEC
from stores import rows as rows_of_shard
from tiny_teachers import edit, save_pixels

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


@pytest.fixture(scope="module")
def pairs(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(teacher, tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def config(pairs: Path, teacher: Path) -> PairConfig:
    return tiny.pair_config(str(teacher), str(pairs.parent / "prompts.txt"))


def rows(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    reader = PairReader(folder)
    batch = reader.read(range(len(reader)))
    return batch.noise, batch.latents, batch.prompts


def assert_equal_stores(store: Path, expected: Path) -> None:
    (a, x, p), (b, y, q) = rows(store), rows(expected)
    assert torch.equal(a, b) and p == q
    torch.testing.assert_close(x, y, rtol=0, atol=1e-4)


def test_contents_of_a_store(pairs: Path, config: PairConfig) -> None:
    noise, latent, texts = rows(pairs)
    assert noise.shape == latent.shape == (12, 4, 4, 4) and texts == tiny.CAPTIONS * 2
    assert torch.equal(noise, seeds.noise(0, range(12), (4, 4, 4)))
    job = open_job(config)
    assert read_spec(pairs) == job.spec and shards_present(pairs, job.spec) == [0, 1, 2]
    _, direct, _ = job.rows(list(range(12)))
    torch.testing.assert_close(latent, direct, rtol=0, atol=1e-4)
    assert verify_store(pairs).ok


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_rows_do_not_depend_on_the_batch_size(
    pairs: Path, config: PairConfig, tmp_path: Path, batch_size: int
) -> None:
    summary = generate_pairs(replace(config, batch_size=batch_size), tmp_path / "pairs")
    assert (summary.pairs, summary.new_pairs, summary.shards) == (12, 12, 3)
    assert_equal_stores(tmp_path / "pairs", pairs)


def test_rows_do_not_depend_on_their_order(config: PairConfig) -> None:
    job = open_job(config)
    order = [11, 3, 7, 0]
    noise, latent, texts = job.rows(order)
    for row, index in enumerate(order):
        one_noise, one_latent, one_text = job.rows([index])
        assert torch.equal(noise[row : row + 1], one_noise) and [texts[row]] == one_text
        torch.testing.assert_close(latent[row : row + 1], one_latent, rtol=0, atol=1e-4)


def test_prompts_of_standard_input_are_read_once(
    config: PairConfig, warm_python: str, tmp_path: Path
) -> None:
    """The job is opened several times: to measure its speed, and to run."""

    def pipe(command: str, prompts: str, *more: str) -> str:
        words = ["-m", "d2g_cli", "pairs", command, "--teacher", config.teacher, "--prompts", "-", *more]
        done = subprocess.run(
            [warm_python, *words, "--steps", "2", "--json"], input=prompts, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    pipe("generate", "a red cube\na blue sphere\n", "--out", str(tmp_path / "pairs"))
    assert PairReader(tmp_path / "pairs").prompts() == ["a red cube", "a blue sphere"]
    assert json.loads(pipe("plan", "a green cone\n"))["pairs"] == 1


def test_prompts_that_get_no_pair_are_counted(
    config: PairConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for pairs, per_prompt in ((6, 1), (12, 2)):
        generate_pairs(replace(config, num_pairs=pairs, per_prompt=per_prompt), tmp_path / str(pairs))
    assert "first" not in caplog.text
    for _ in range(2):
        generate_pairs(replace(config, num_pairs=4, per_prompt=2), tmp_path / "few")
    assert caplog.text.count("4 pairs take the first 2 of 6 prompts") == 1


def test_several_noises_of_one_prompt(config: PairConfig, tmp_path: Path) -> None:
    generate_pairs(replace(config, num_pairs=0, per_prompt=2, steps=1), tmp_path / "pairs")
    noise, _, texts = rows(tmp_path / "pairs")
    assert texts == [text for text in tiny.CAPTIONS for _ in range(2)]
    assert len({tuple(row.flatten().tolist()) for row in noise}) == 12


@pytest.mark.slow
def test_two_torchrun_processes_make_the_same_store(
    pairs: Path, config: PairConfig, warm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHON_EXEC", warm_python)
    run = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--teacher", config.teacher, "--prompts", config.prompts, "--out", str(tmp_path / "pairs")]
    sets = ["num_pairs=12", "steps=4", "guidance=3", "shard_size=5", "batch_size=4", "dtype=float32"]
    job = [
        "-m",
        "d2g_cli",
        "pairs",
        "generate",
        *options,
        *(part for s in sets for part in ("--set", s)),
        "--json",
    ]
    done = subprocess.run([*run, *job], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if '"new_pairs": 12' in line]) == 1
    assert_equal_stores(tmp_path / "pairs", pairs)
    assert read_spec(tmp_path / "pairs") == read_spec(pairs)


# Interruptions.


def arguments(teacher: Path, prompts: str, out: Path, *sets: str) -> list[str]:
    chosen = ["num_pairs=36", "steps=8", "guidance=3", "shard_size=4", "batch_size=1", "dtype=float32", *sets]
    options = ["--teacher", str(teacher), "--prompts", prompts, "--out", str(out)]
    return ["pairs", "generate", *options, *(part for s in chosen for part in ("--set", s))]


def test_sigkill_leaves_complete_shards_and_the_same_command_continues(
    teacher: Path, prompts: str, tmp_path: Path
) -> None:
    out = tmp_path / "pairs"
    running = Running(arguments(teacher, prompts, out), tmp_path / "log")
    running.wait_for(lambda: len(list(out.glob("shards/*.h5"))) >= 2)
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    shard_bytes = {path: path.read_bytes() for path in sorted(out.glob("shards/*.h5"))}
    assert 2 <= len(shard_bytes) < 9 and not PairReader(out).complete and not verify_store(out).bad_shards
    resumed = d2g(arguments(teacher, prompts, out), tmp_path / "log")
    assert resumed.code == 0, resumed.stderr
    assert verify_store(out).ok and len(PairReader(out)) == 36
    assert all(path.read_bytes() == data for path, data in shard_bytes.items())
    d2g(arguments(teacher, prompts, tmp_path / "unbroken", "batch_size=32"), tmp_path / "log")
    assert_equal_stores(out, tmp_path / "unbroken")


def test_ctrl_c_keeps_every_finished_row(config: PairConfig, pairs: Path, tmp_path: Path) -> None:
    """Send SIGINT while the second shard is incomplete."""

    def interrupt(label: str, done: int, total: int) -> None:
        if done == 8:
            signal.raise_signal(signal.SIGINT)

    out = tmp_path / "pairs"
    with pytest.raises(
        Interrupted, match=r"stopped; 8 of 12 pairs are safe in .*pairs; run the same command again"
    ):
        generate_pairs(replace(config, batch_size=1), out, interrupt)
    assert shards_present(out, read_spec(out)) == [0] and list(out.glob("partial/*.h5"))
    resumed = generate_pairs(replace(config, batch_size=1), out)
    assert (resumed.pairs, resumed.new_pairs) == (12, 4)
    assert not list(out.glob("partial/*")) and verify_store(out).ok
    assert_equal_stores(out, pairs)
    assert generate_pairs(config, out).new_pairs == 0


def test_ctrl_c_while_quarantined_rows_are_made_again_counts_each_row_once(
    config: PairConfig, pairs: Path, tmp_path: Path
) -> None:
    out, counts = tmp_path / "pairs", list[int]()
    shutil.copytree(pairs, out)
    spec, (noise, latents, prompts) = read_spec(out), rows(out)
    index = list(spec.rows(1))
    (out / "shards" / "pairs-00001.h5").unlink()
    latents[5:7] = torch.nan
    with PairWriter(out, spec, 1) as writer:
        writer.append(noise[index], latents[index], [prompts[i] for i in index], index)
        writer.commit()

    def interrupt(label: str, done: int, total: int) -> None:
        counts.append(done)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match=r"stopped; 10 of 12 pairs are safe"):
        generate_pairs(replace(config, batch_size=1), out, interrupt, retry=True)
    assert counts == [11]
    assert generate_pairs(config, out, retry=True).pairs == 12 and verify_store(out).ok


def test_ctrl_c_encodes_no_more_prompts(config: PairConfig, tmp_path: Path) -> None:
    """With large text encoders, the rest of a shard takes longer than the grace period of a kill."""
    stopped, encoded = False, 0

    def interrupt(label: str, done: int, total: int) -> None:
        nonlocal stopped
        stopped = True
        signal.raise_signal(signal.SIGINT)

    def count(module: torch.nn.Module, args: object, output: object) -> None:
        nonlocal encoded
        encoded += stopped and type(module).__name__ == "CLIPTextModel"

    hook = register_module_forward_hook(count)
    with pytest.raises(Interrupted, match="stopped; 2 of 12 pairs are safe"):
        generate_pairs(replace(config, shard_size=12, batch_size=2), tmp_path / "pairs", interrupt)
    hook.remove()
    assert encoded == 0


def test_an_error_keeps_every_finished_row(config: PairConfig, tmp_path: Path) -> None:
    def fail(label: str, done: int, total: int) -> None:
        if done == 8:
            raise RuntimeError("the machine is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        generate_pairs(replace(config, batch_size=1), tmp_path / "pairs", fail)
    resumed = generate_pairs(replace(config, batch_size=1), tmp_path / "pairs")
    assert (resumed.pairs, resumed.new_pairs) == (12, 4)


# Refused inputs.


def test_the_last_bad_row_may_be_of_an_earlier_shard(tmp_path: Path) -> None:
    """Shares are checked from 256 rows on: here in the second shard, whose own rows are all finite."""
    spec = replace(SPEC, num_pairs=512, shard_size=255)
    create_store(tmp_path, spec)
    tally = Tally(max_bad=0.1)
    noise, latents, prompts, index = rows_of_shard(spec, list(spec.rows(0)))
    latents[7:60] = torch.nan
    with PairWriter(tmp_path, spec, 0) as writer:
        tally.append(writer, noise, latents, prompts, index)
    with PairWriter(tmp_path, spec, 1) as writer:
        with pytest.raises(FloatingPointError, match=r"^53 of 256 latents .* the last that of pair 59 \("):
            tally.append(writer, *rows_of_shard(spec, [255]))


def test_other_settings_are_refused_by_name(config: PairConfig, pairs: Path) -> None:
    before = {path: path.read_bytes() for path in pairs.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=r"another spec; differing: guidance \(3\.0 -> 4\.0\), steps \(4 -> 5\)"
    ):
        generate_pairs(replace(config, guidance=4.0, steps=5), pairs)
    with pytest.raises(UserError, match=r"num_prompts \(6 -> 1\), prompts_sha256"):
        (pairs.parent / "one.txt").write_text("only one\n")
        generate_pairs(replace(config, prompts=str(pairs.parent / "one.txt")), pairs)
    assert {path: path.read_bytes() for path in pairs.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("file", ["config.json", "model_index.json", "student.json"])
def test_a_folder_that_holds_something_else_gets_no_store(
    config: PairConfig, pairs: Path, tmp_path: Path, file: str
) -> None:
    """Otherwise the run or the teacher there would be refused as a pair store."""
    (tmp_path / file).write_text("{}")
    message = rf"holds .* \({file}\), not a pair store; give another --out"
    for write in (
        lambda: generate_pairs(config, tmp_path),
        lambda: merge_stores([pairs], tmp_path),
        lambda: export_store(pairs, tmp_path, "parquet"),
    ):
        with pytest.raises(UserError, match=message):
            write()
    assert [path.name for path in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("settings", [{"steps": 1001}, {"teacher": ""}, {"prompts": ""}])
def test_invalid_jobs_write_nothing(config: PairConfig, tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        generate_pairs(replace(config, **settings), tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"solver": "rk4"}, r"solver is 'rk4'; known: ddim, euler, heun, teacher"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale is 1\.5; expected 0 to 1"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"patience": 0.0}, "patience is 0"),
        ({"solver": "huen"}, r"did you mean 'heun'\?"),
        ({"spacing": "trailling"}, r"did you mean 'trailing'\?"),
        ({"final_alpha": "zero"}, "final_alpha is 'zero'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"noise": "none"}, "noise is 'none'"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"guidance": 0.5}, "guidance is 0.5"),
        ({"steps": 0}, "steps is 0"),
        ({"num_pairs": -1}, "num_pairs is -1"),
    ],
)
def test_invalid_settings_are_refused(setting: dict[str, object], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        PairConfig(**setting)  # type: ignore[arg-type]


def test_presets_match_the_supplement() -> None:
    settings = {
        name: (p.num_pairs, p.guidance, p.steps, p.solver)
        for name, p in PAIR_PRESETS.items()
        if "sd15" in name
    }
    assert settings == {
        "sd15-cfg3": (3_000_000, 3.0, 50, "teacher"),
        "sd15-cfg8": (12_000_000, 8.0, 50, "teacher"),
    }


# Noise and precision.


def test_seeded_noise_reads_like_stored_noise(config: PairConfig, tmp_path: Path) -> None:
    sizes = {}
    for noise in ("stored", "seeded"):
        generate_pairs(replace(config, noise=noise, dtype="float16"), tmp_path / noise)
        sizes[noise] = sum(path.stat().st_size for path in tmp_path.glob(f"{noise}/shards/*"))
    (a, x, p), (b, y, q) = rows(tmp_path / "stored"), rows(tmp_path / "seeded")
    assert torch.equal(a, b) and torch.equal(x, y) and p == q and sizes["seeded"] < sizes["stored"]


def test_fp16_noise_is_rounded_before_sampling(config: PairConfig, tmp_path: Path) -> None:
    job = replace(config, dtype="float16")
    generate_pairs(job, tmp_path / "pairs")
    noise, latent, texts = rows(tmp_path / "pairs")
    opened = open_job(job)
    teacher, spec = opened.teacher, opened.spec
    assert torch.equal(noise, noise.half().float())
    from_stored = teacher.sample(noise, texts, spec.steps, spec.guidance, "ddim")
    from_drawn = teacher.sample(
        seeds.noise(0, range(12), (4, 4, 4)), texts, spec.steps, spec.guidance, "ddim"
    )
    assert (latent - from_stored).abs().max() <= latent.abs().max() * 2.0**-10  # rounding of the stored dtype
    assert torch.equal(from_stored.half().float(), latent) or (
        (from_stored.half().float() != latent).float().mean() < 0.01
    )
    assert (from_drawn - from_stored).abs().max() > 1e-4


def test_resimulation_reproduces_the_stored_latents(pairs: Path, tmp_path: Path, teacher: Path) -> None:
    assert resimulate(pairs, 3) < 1e-4
    assert resimulate(pairs, 100, str(teacher)) < 1e-4
    tiny.save_teacher(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"has sha256 .* was made with .*--teacher"):
        resimulate(pairs, 3, str(tmp_path / "other"))


def test_resimulation_takes_small_batches(teacher: Path, tmp_path: Path) -> None:
    """Whatever the size of a shard: a GPU has no memory for 4,096 rows at once."""
    store = make_pairs(teacher, tmp_path, num_pairs=40, shard_size=40, steps=1)
    sizes: list[int] = []

    def count(module: object, args: object, output: object) -> None:
        if type(module).__name__ == "UNet2DConditionModel":
            sizes.append(len(output[0]))  # type: ignore[index]

    hook = register_module_forward_hook(count)
    try:
        assert resimulate(store, 40) < 1e-4
    finally:
        hook.remove()
    assert sum(sizes) == 2 * 40 and max(sizes) <= 2 * 8


def test_resimulation_without_the_prompt_list_says_what_is_missing(pairs: Path, tmp_path: Path) -> None:
    shutil.copytree(pairs, tmp_path / "pairs")
    (tmp_path / "pairs" / "prompts.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no prompts\.jsonl, .*; copy the store with all its files"):
        resimulate(tmp_path / "pairs", 3)


def test_resimulated_rows_that_are_not_finite_differ(pairs: Path, tmp_path: Path) -> None:
    """The stored rows are finite; at this guidance the teacher's are NaN."""
    spec = replace(read_spec(pairs), guidance=1e38)
    noise, latents, prompts = rows(pairs)
    create_store(tmp_path, spec)
    for shard in range(3):
        index = list(spec.rows(shard))
        with PairWriter(tmp_path, spec, shard) as writer:
            writer.append(noise[index], latents[index], [prompts[i] for i in index], index)
            writer.commit()
    shutil.copy(pairs / "prompts.jsonl", tmp_path)
    assert resimulate(tmp_path, 4) == math.inf
    verify = ["pairs", "verify", str(tmp_path), "--resimulate", "4"]
    ended = d2g(verify, tmp_path / "log")
    assert ended.code == 1 and "rows generated again are not finite" in ended.error


@pytest.mark.parametrize("final_alpha", ["one", "teacher"])
def test_resimulation_uses_final_alpha_of_the_spec(tmp_path: Path, final_alpha: str) -> None:
    tiny.save_teacher(tmp_path / "teacher", set_alpha_to_one=False)
    store = make_pairs(
        tmp_path / "teacher", tmp_path, final_alpha=final_alpha, spacing="trailing", solver="heun"
    )
    assert read_spec(store).final_alpha_one == (final_alpha == "one")
    assert resimulate(store, 4) < 1e-4


def test_plan_counts_match_generation(config: PairConfig, pairs: Path) -> None:
    plan = plan_pairs(replace(config, dtype="float16", num_pairs=2**20, precision="fp32", compile=False))
    assert plan["pairs"] == 2**20 and plan["shards"] == -(-(2**20) // 5)
    assert plan["gib"] == 64 * 2 * 2**20 / 2**30 and plan["gib_with_noise"] == 2 * plan["gib"]
    assert plan["evaluations_per_pair"] == 8 and plan["seconds_per_pair"] > 0
    assert plan["gpu_hours"] == pytest.approx(plan["seconds_per_pair"] * 2**20 / 3600)
    assert "CPU threads" in plan["measured_on"] or torch.cuda.is_available()


@pytest.mark.slow
def test_the_fastest_batch_is_measured(config: PairConfig, tmp_path: Path) -> None:
    job = open_job(config)
    size = fastest_batch(job)
    assert size in [2**n for n in range(11)] and size > 1, "a tiny network is all overhead at batch 1"
    summary = generate_pairs(replace(config, batch_size=0), tmp_path / "pairs")
    assert summary.batch_size in [2**n for n in range(11)] and summary.pairs == 12


def test_the_predicted_time_counts_both_evaluations_of_a_heun_step(pairs: Path) -> None:
    spec = read_spec(pairs)
    assert spec.guidance > 1 and speed.solver_evaluations(replace(spec, solver="ddim", steps=18)) == 18
    assert speed.solver_evaluations(replace(spec, solver="heun", steps=18)) == 35


def test_plan_costs(config: PairConfig) -> None:
    plan = plan_pairs(replace(config, noise="seeded"), price=2.0)
    assert plan["gib_here"] == plan["gib"] and list(plan["by_gpus"]) == [str(n) for n in GPU_COUNTS]
    assert plan["by_gpus"]["8"]["hours"] == pytest.approx(plan["gpu_hours"] / 8)
    assert plan["by_gpus"]["8"]["cost"] == pytest.approx(2 * plan["gpu_hours"])
    assert plan["pairs_per_sec"] == pytest.approx(1 / plan["seconds_per_pair"])


@pytest.mark.parametrize(
    "settings", [{"text_cache": 5}, {"channels_last": True}, {"per_prompt": 2, "num_pairs": 0}]
)
def test_speed_settings_do_not_change_rows(
    config: PairConfig, tmp_path: Path, settings: dict[str, object]
) -> None:
    plain = replace(config, per_prompt=settings.get("per_prompt", 1), num_pairs=settings.get("num_pairs", 12))  # type: ignore[arg-type]
    generate_pairs(plain, tmp_path / "plain")
    generate_pairs(replace(config, **settings), tmp_path / "pairs")  # type: ignore[arg-type]
    assert_equal_stores(tmp_path / "pairs", tmp_path / "plain")


def test_each_distinct_prompt_is_encoded_once(config: PairConfig) -> None:
    job = open_job(config)
    batch_sizes: list[int] = []
    handle = job.teacher.encoders[0].register_forward_hook(
        lambda module, args, kwargs, out: batch_sizes.append(len((args or tuple(kwargs.values()))[0])),
        with_kwargs=True,
    )
    job.encode([0, 6, 1, 7, 0])  # rows 0, 6 and 1, 7 share their prompts
    handle.remove()
    assert batch_sizes == [3], "two prompts and the empty prompt"


def test_a_store_can_be_regenerated_from_its_own_prompts(
    config: PairConfig, pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pairs"
    generate_pairs(config, out)
    (out / "shards" / "pairs-00001.h5").unlink()
    assert config_from_spec(read_spec(out)).prompts == "" and regenerate(out) == 5
    assert_equal_stores(out, pairs)


def test_pairs_of_latents_that_are_not_square_can_be_regenerated(tmp_path: Path) -> None:
    teacher, out = save_pixels(tmp_path / "teacher"), tmp_path / "pairs"
    edit(tmp_path / "teacher", "unet/config.json", sample_size=[8, 16])
    generate_pairs(PairConfig(teacher=teacher, steps=1, guidance=1.0, num_pairs=2), out)
    assert read_spec(out).latent_shape == (3, 8, 16)
    (out / "shards" / "pairs-00000.h5").unlink()
    assert regenerate(out) == 2 and verify_store(out).ok


def test_a_short_job_is_exact_and_not_compiled(config: PairConfig, tmp_path: Path) -> None:
    assert (config.precision, config.compile) == ("auto", "auto")
    generate_pairs(config, tmp_path)
    assert (read_spec(tmp_path).precision, read_spec(tmp_path).compiled) == ("fp32", False)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")
def test_precision_and_compilation_are_measured_once_for_a_store(
    config: PairConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None
) -> None:
    """With gains that every candidate has, the slowest arithmetic is chosen; the store keeps the choice."""
    for name, value in (("BF16_FROM", 0.0), ("COMPILE_FROM", 0.0), ("BF16_GAIN", 0.0), ("GAIN", 0.0)):
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = replace(config, batch_size=6)
    generate_pairs(replace(config, num_pairs=6), tmp_path)
    spec = read_spec(tmp_path)
    assert (spec.precision, spec.compiled) == ("bf16", True)
    # A job that grows the store, and one that would measure something else, follow it.
    for name in ("BF16_FROM", "COMPILE_FROM"):
        monkeypatch.setattr(speed, name, float("inf"))
    generate_pairs(replace(config, num_pairs=12), tmp_path)
    assert read_spec(tmp_path) == replace(spec, num_pairs=12)
    with pytest.raises(UserError, match=r"precision \(bf16 -> fp32\)|precision \('bf16' -> 'fp32'\)"):
        generate_pairs(replace(config, precision="fp32"), tmp_path)
    # Rows that are computed again have the store's precision, and differ by rounding.
    assert resimulate(tmp_path, 4) < 0.05


@pytest.mark.slow
def test_a_network_that_cannot_be_compiled_is_not(
    config: PairConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fresh_dynamo: None
) -> None:
    def no_compiler(graph: object, inputs: object) -> object:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(speed, "COMPILE_FROM", 0.0)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=no_compiler))
    chosen = speed.choose_speed(config, torch.device("cpu"))
    assert (chosen.precision, chosen.compile) == ("fp32", False)
    assert "not compiled: " in caplog.text and "no C++ compiler" in caplog.text
