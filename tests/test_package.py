"""The contents of the wheel, and its public API in an environment without the checkout."""

import doctest
import importlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"d2g", "d2g_cli", "pairgen", "latent_lpips", "distill", "eval", "teacher_training", "miniature"}
PUBLIC_API = {
    "latent_lpips": {"ELatentLPIPS", "LatentLPIPS"},
    "pairgen": {"PairDataset", "PairReader", "PairWriter", "generate_pairs"},
    "distill": {"Student", "load_student", "train"},
    "eval": {"evaluate", "frechet_distance", "precision_recall"},
    "d2g.diffusion": {"Teacher", "load_teacher"},
}
"""The names that the documentation promises. A package may export more, but none of these may be removed."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the project's own build backend from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    process = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter of a fresh environment with the wheel, installed without its dependencies. It sees the
    libraries of the running environment, but not the editable install of the checkout.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    process = subprocess.run([*install, "--no-index", str(wheel)], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    # A plain path in a .pth file: Python reads no .pth files of that folder, such as the editable install's.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, folder: Path, *args: str) -> str:
    process = subprocess.run([str(python), *args], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_the_wheel_contains_exactly_our_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name.split("/")[0]}
    assert top == PACKAGES
    files = set(names)
    for package in PACKAGES:
        assert f"{package}/py.typed" in files
        for file in (ROOT / package).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert file.relative_to(ROOT).as_posix() in files, f"{file} is not in the wheel"


@pytest.mark.slow
@pytest.mark.parametrize("package", PUBLIC_API)
def test_the_public_api_of_the_wheel(package: str, python: Path, tmp_path: Path) -> None:
    names = ", ".join(sorted(PUBLIC_API[package]))
    code = (
        f"import {package} as p; promised = set(p.__all__); from {package} import {names}; "
        "print(p.__file__, *sorted(promised))"
    )
    file, *promised = run(python, tmp_path, "-c", code).split()
    assert Path(file).is_relative_to(python.parents[1]), f"{file} is not in the installed wheel"
    assert PUBLIC_API[package] <= set(promised)


@pytest.mark.slow
def test_the_command_of_the_wheel_samples_an_image(python: Path, tmp_path: Path) -> None:
    """`d2g` and `python -m d2g_cli` run, and the student that ships in the wheel makes an image."""
    assert run(python.with_name("d2g"), tmp_path, "--version") == run(
        python, tmp_path, "-m", "d2g_cli", "--version"
    )
    run(python.with_name("d2g"), tmp_path, "sample", "--prompt", "a red cube", "--out", "images")
    assert list((tmp_path / "images").glob("*.png"))


@pytest.mark.parametrize("package", PUBLIC_API)
def test_every_public_name_has_a_docstring(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name).__doc__, f"{package}.{name} has no docstring"


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package, names in PUBLIC_API.items() for name in sorted(names)]
)
def test_examples_of_the_public_api_run(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    public = getattr(importlib.import_module(package), name)
    tests = [test for test in doctest.DocTestFinder(recurse=False).find(public, name) if test.examples]
    assert tests, f"{package}.{name} has no example in its docstring"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in tests:
        assert runner.run(test).failed == 0, f"the example of {package}.{name} fails; see the output above"
