"""The import table of docs/architecture.md, read from the syntax trees: who may import whom, and the
doors.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = {"core", "pairgen", "latent_lpips", "distill", "eval", "miniature"}

# Our packages or modules that a package may import beside itself. A name allows everything below it.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "pairgen": {"core"},
    "latent_lpips": {"core"},
    "distill": {
        "core",
        "pairgen.store.hdf5",
        "pairgen.store.reader",
        "pairgen.store.dataset",
        "latent_lpips",
    },
    "eval": {"core", "pairgen.store.hdf5", "pairgen.store.reader", "pairgen.store.dataset", "latent_lpips"},
    "miniature": {"core", "pairgen", "latent_lpips", "distill", "eval"},
    "commands": EVERYTHING,
    "cli": {"commands", "core"},
}

# Third parties with one door each, by the longest matching prefix. torch.utils.data is no process group.
DOORS = {
    "h5py": {"pairgen/store/hdf5.py"},
    "fsspec": {"pairgen/store/remote.py"},
    "kornia": {"latent_lpips/augment.py"},
    "open_clip": {"eval/networks/clip.py"},
    "torchvision.models.inception": {"eval/networks/inception.py"},
    "diffusers": {
        "d2g/diffusion/pretrained.py",
        "d2g/diffusion/scheduler_files.py",
        "d2g/diffusion/diffusers_pipeline.py",
        "distill/export/one_step_pipeline.py",
    },
    "transformers": {"d2g/diffusion/pretrained.py", "eval/networks/transformers_vision.py"},
    "peft": {"d2g/diffusion/lora.py"},
    "tokenizers": {"d2g/diffusion/pretrained.py"},
    "huggingface_hub": {"d2g/diffusion/pipelines.py", "eval/networks/transformers_vision.py"},
    "torch.distributed": {
        "d2g/core/distributed/process_group.py",
        "d2g/core/distributed/engine.py",
        "d2g/core/distributed/sharded_checkpoint.py",
    },
    "torch._C._distributed_c10d": {"d2g/core/distributed/process_group.py"},
    "typer": {"cli.py", "commands/"},
    "rich": {"d2g_cli/common.py", "d2g_cli/watch.py"},
    "torch.utils.tensorboard": {"d2g/core/tracking/loggers.py"},
    "wandb": {"d2g/core/tracking/loggers.py"},
    "onnxruntime": {"distill/export/onnx_runtime.py"},
}

# What `--help` must not wait for.
HEAVY = (
    "torch",
    "numpy",
    "diffusers",
    "transformers",
    "kornia",
    "open_clip",
    "h5py",
    "pyarrow",
    "matplotlib",
)


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a tree imports, at any depth; `from a import b` counts as a.b, for b may be a
    module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the package; write it out"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import_time(tree: ast.Module) -> Iterator[str]:
    """Dotted names imported when the module is: everything outside function bodies."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)


def below(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in sorted(EVERYTHING | {"commands"})
    for path in (ROOT / package).rglob("*.py")
)
TREES = {name: ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in [*FILES, "cli.py"]}


def test_the_tree_has_the_packages_of_the_table() -> None:
    for package in EVERYTHING:
        assert any(name.startswith(f"{package}/") for name in FILES), f"{package} has no module"


@pytest.mark.parametrize("file", TREES)
def test_imports_point_one_way(file: str) -> None:
    package = file.removesuffix(".py").split("/")[0]
    known = EVERYTHING | {"commands", "cli", "tests", "benchmarks"}
    ours = {name for name in imports(TREES[file]) if below(name, known)}
    wrong = sorted(name for name in ours if not below(name, MAY_IMPORT[package] | {package}))
    assert not wrong, f"{file} imports {', '.join(wrong)}; {package} may import {sorted(MAY_IMPORT[package])}"


@pytest.mark.parametrize("door", DOORS)
def test_third_parties_come_in_by_their_door(door: str) -> None:
    users = {name for name, tree in TREES.items() if any(below(used, {door}) for used in imports(tree))}
    users = {name for name in users if not any(name.startswith(d) for d in DOORS[door] if d.endswith("/"))}
    assert users <= DOORS[door], f"{sorted(users - DOORS[door])} import {door}; its door is {DOORS[door]}"


def test_cli_imports_ours_inside_commands_only() -> None:
    for file in ["cli.py", *(name for name in FILES if name.startswith("commands/"))]:
        early = {name for name in at_import_time(TREES[file]) if below(name, EVERYTHING)}
        late = sorted(name for name in early if not below(name, {"d2g.core.config", "d2g.core.errors"}))
        assert not late, f"{file} imports {', '.join(late)} at its top; import inside the command"


def test_diffusers_and_friends_are_opened_late() -> None:
    """Importing diffusers takes seconds; only functions that need it may."""
    for file, tree in TREES.items():
        early = [
            n for n in at_import_time(tree) if below(n, {"diffusers", "transformers", "open_clip", "kornia"})
        ]
        assert not early, f"{file} imports {', '.join(early)} at its top"


def test_importing_cli_loads_nothing_heavy() -> None:
    code = f"import sys, cli; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_nobody_shadows_a_third_party() -> None:
    """`python eval/clip.py` would import itself where it means the third party."""
    taken = {
        "lpips",
        "clip",
        "kornia",
        "diffusers",
        "transformers",
        "torch",
        "h5py",
        "numpy",
        "rich",
        "typer",
    }
    allowed = {"teacher_training/clip.py"}  # run as a module only; the third party `clip` is not used here
    clashes = {name for name in FILES if Path(name).stem in taken} - allowed
    assert not clashes
