"""Import rules, checked on the syntax trees: imports point down, files form no cycles, and some libraries may
be imported in a few files only. docs/architecture.md explains the layers.
"""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("d2g", "d2g_cli", "pairgen", "latent_lpips", "distill", "eval", "teacher_training", "miniature")

# Packages from the lowest layer up. A file may import its own package and packages of lower layers, but no
# other package of its own layer. The longest matching name decides which package a module belongs to.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("d2g",),
    ("d2g.core",),
    ("d2g.core.distributed",),
    ("d2g.core.tracking",),
    ("d2g.data",),
    ("d2g.vision",),
    ("d2g.diffusion",),
    ("pairgen.store", "latent_lpips"),
    ("latent_lpips.training",),
    ("pairgen",),
    ("distill.config",),
    ("distill.models", "distill.losses"),
    ("distill.student_files",),
    ("distill.sampling",),
    ("distill.planning", "distill.monitoring"),
    ("distill.training",),
    ("distill.export",),
    ("distill",),
    ("eval.images", "eval.protocols", "eval.benchmarks"),
    ("eval.networks",),
    ("eval.metrics",),
    ("eval.measure",),
    ("eval",),
    ("eval.report", "eval.study"),
    ("eval.runner",),
    ("teacher_training",),
    ("teacher_training.full_run",),
    ("miniature",),
    ("d2g_cli",),
    ("cli",),
)
LAYER_OF = {package: number for number, packages in enumerate(LAYERS) for package in packages}

# Packages of a lower layer that a package may not import, and the exceptions.
FORBIDDEN: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "distill": (("pairgen", ("pairgen.store",)),),
    "eval": (("pairgen", ("pairgen.store",)), ("distill", ())),
    "eval.runner": (("distill", ("distill.sampling", "distill.student_files")),),
}

# Libraries and the only files or folders that may import them.
ENTRY_POINTS = {
    "h5py": {"pairgen/store/"},
    "fsspec": {"pairgen/store/remote.py"},
    "obstore": {"d2g/core/object_store.py"},
    "botocore": {"d2g/core/object_store.py"},
    "kornia": {"latent_lpips/"},
    "open_clip": {"eval/networks/clip.py"},
    "torchvision.models.inception": {"eval/networks/inception.py"},
    "diffusers": {"d2g/diffusion/", "distill/export/"},
    "transformers": {"d2g/diffusion/", "d2g/vision/transformers_vision.py"},
    "peft": {"d2g/diffusion/lora.py"},
    "tokenizers": {"d2g/diffusion/pretrained.py"},
    "huggingface_hub": {"d2g/core/hub.py", "distill/export/"},
    "torch.distributed": {"d2g/core/distributed/"},
    "torch._C._distributed_c10d": {"d2g/core/distributed/"},
    "typer": {"d2g_cli/"},
    "rich": {"d2g_cli/"},
    "torch.utils.tensorboard": {"d2g/core/tracking/loggers.py"},
    "wandb": {"d2g/core/tracking/loggers.py"},
    "onnxruntime": {"distill/export/to_onnx.py", "eval/networks/user_network.py"},
    "timm": {"d2g/vision/efficientnet.py"},
    "csv": {"d2g/data/text_files.py"},
    "datetime": {"d2g/core/distributed/process_group.py", "d2g/core/object_store.py"},
}

# Functions and the only files that may use them. A clock of the wall may be set back; text in a CSV may be a
# formula for a spreadsheet.
USES: dict[str, set[str]] = {
    "time.time": {"distill/monitoring/status.py", "eval/study/answers.py"},
    "time.time_ns": {"pairgen/store/remote.py"},
    # Pictures of users are opened in one place; JPEGs of our own are read back.
    "Image.open": {
        "d2g/data/pictures.py",
        "eval/measure/robustness.py",
        "latent_lpips/training/make_triplets.py",
    },
    "csv.writer": set(),
    "csv.DictWriter": set(),
}

# Libraries that `--help` does not import.
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


def read_trees() -> dict[str, ast.Module]:
    """Syntax trees of our files by dotted module name; the name of a package means its `__init__.py`."""
    trees = {}
    for path in sorted([ROOT / "cli.py", *(file for p in PACKAGES for file in (ROOT / p).rglob("*.py"))]):
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


TREES = read_trees()


def file_name(module: str) -> str:
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if (ROOT / path).is_dir() else f"{path}.py"


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a tree imports at any depth. `from a import b` counts as a.b: b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the package; write it out"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import_time(tree: ast.Module) -> Iterator[str]:
    """Dotted names imported together with the module: those outside functions and TYPE_CHECKING blocks."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        elif isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)


def below(name: str, prefixes: set[str] | tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def our_module(name: str) -> str | None:
    """Our module that defines an imported name, or None."""
    while name and name not in TREES:
        name = name.rpartition(".")[0]
    return name or None


def our_imports(module: str) -> set[str]:
    return {target for name in imports(TREES[module]) if (target := our_module(name))} - {module}


def package_of(module: str) -> str:
    while module not in LAYER_OF:
        module = module.rpartition(".")[0]
    return module


def is_public_api(module: str) -> bool:
    """Whether a module is the `__init__.py` of a top-level package, which re-exports names of its files."""
    return module in PACKAGES


def test_every_package_exists_and_is_typed() -> None:
    for package in PACKAGES:
        assert package in TREES, f"{package}/__init__.py is missing"
        assert (ROOT / package / "py.typed").is_file(), f"{package}/py.typed is missing"


@pytest.mark.parametrize("module", [name for name in TREES if not is_public_api(name)])
def test_imports_point_down(module: str) -> None:
    own = package_of(module)
    for target in our_imports(module) - set(PACKAGES):
        other = package_of(target)
        assert other == own or LAYER_OF[other] < LAYER_OF[own], (
            f"{module} imports {target}, which is not below it"
        )
        rules = FORBIDDEN.get(own) or FORBIDDEN.get(own.split(".")[0], ())
        for forbidden, allowed in rules:
            wrong = (
                below(target, {forbidden}) and not below(target, allowed) and not below(module, {forbidden})
            )
            assert not wrong, (
                f"{module} imports {target}; of {forbidden} it may import {allowed or 'nothing'}"
            )


def test_our_code_does_not_import_the_public_api() -> None:
    """Our code imports a name from the file that defines it, not from the `__init__.py` of a package."""
    for module in TREES:
        names = {target for name in imports(TREES[module]) if (target := our_module(name)) in PACKAGES}
        assert not names - {module}, (
            f"{module} imports {sorted(names)}; import the file that defines the name"
        )


def test_files_form_no_cycles() -> None:
    graph = {module: our_imports(module) for module in TREES if not is_public_api(module)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("library", ENTRY_POINTS)
def test_libraries_are_imported_only_where_allowed(library: str) -> None:
    allowed = ENTRY_POINTS[library]
    for module, tree in TREES.items():
        if any(below(name, {library}) for name in imports(tree)):
            file = file_name(module)
            assert any(file == a or (a.endswith("/") and file.startswith(a)) for a in allowed), (
                f"{file} imports {library}; only {sorted(allowed)} may"
            )


@pytest.mark.parametrize("function", USES)
def test_functions_are_used_only_where_allowed(function: str) -> None:
    for module, tree in TREES.items():
        uses = {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        if function in uses | set(imports(tree)):
            assert file_name(module) in USES[function], f"{file_name(module)} uses {function}"


def test_commands_import_our_packages_only_inside_functions() -> None:
    light = {
        "d2g.core.config",
        "d2g.core.errors",
        "d2g.core.logs",
        "d2g.core.machine_errors",
        "d2g.core.signals",
        "d2g.core.setting_docs",
        "d2g_cli",
    }
    for module in TREES:
        if below(module, {"d2g_cli", "cli"}):
            imported = {t for name in at_import_time(TREES[module]) if (t := our_module(name))}
            heavy = sorted(name for name in imported if not below(name, light))
            assert not heavy, f"{module} imports {', '.join(heavy)} at its top; import inside the command"


def test_heavy_libraries_are_imported_only_inside_functions() -> None:
    """Importing diffusers takes seconds, so only the functions that need it do."""
    heavy = {"diffusers", "transformers", "open_clip", "kornia"}
    for module, tree in TREES.items():
        early = [name for name in at_import_time(tree) if below(name, heavy)]
        assert not early, f"{module} imports {', '.join(early)} at its top"


@pytest.mark.parametrize("module", ["d2g_cli.main", *PACKAGES])
def test_importing_a_package_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.strip() == "[]", process.stdout + process.stderr


def test_no_package_has_the_name_of_a_library() -> None:
    """No top-level package of ours has the name of a library that we or our dependencies import."""
    assert not set(PACKAGES) & {"lpips", "clip", "kornia", "diffusers", "transformers", "torch", "h5py"}


def public_names(module: str) -> set[str]:
    """Public functions, classes and constants that a module defines at its top level."""
    names = set()
    for node in TREES[module].body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_") and len(name) > 1}  # T is a TypeVar


def test_a_public_name_stands_in_one_module() -> None:
    """So that a name that is searched for leads to one definition."""
    modules_of = defaultdict(list)
    for module in TREES:
        for name in () if is_public_api(module) else public_names(module):
            modules_of[name].append(module)
    repeated = {name: modules for name, modules in modules_of.items() if len(modules) > 1}
    assert set(repeated) <= {"main"}, repeated  # the start of a program
