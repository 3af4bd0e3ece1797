"""d2g.diffusion.pipelines: contents of a folder or hub id, loaded files, and their fingerprint."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_teachers
from d2g.core.errors import UserError
from d2g.core.seeds import noise
from d2g.diffusion.families.registry import FAMILIES
from d2g.diffusion.pipelines import PIPELINES, choose_weights, component_files, open_pipeline, weights_sha256
from d2g.diffusion.pretrained import load_model
from d2g.diffusion.teacher import load_teacher

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdxl") / "teacher"
    tiny_teachers.save_sdxl(out)
    return out


@pytest.fixture
def copy(teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(teacher, tmp_path / "copy"))


def test_the_table_matches_the_classes_of_diffusers() -> None:
    import diffusers
    import transformers
    from diffusers.pipelines.deprecated import wuerstchen

    modules = (diffusers, transformers, wuerstchen)
    for kind, components in PIPELINES.items():
        assert hasattr(diffusers, kind)
        for names in components.values():
            assert all(any(hasattr(module, name) for module in modules) for name in names)
    assert all(set(family.optional) <= set(family.components) for family in FAMILIES.values())


def test_unsupported_pipelines_are_refused_with_the_supported_ones(copy: Path) -> None:
    tiny_teachers.edit(copy, "model_index.json", _class_name="AudioLDM2Pipeline")
    with pytest.raises(
        UserError, match=r"says AudioLDM2Pipeline, which is not supported; supported: .*Stab"
    ) as caught:
        open_pipeline(str(copy))
    assert all(kind in str(caught.value) for kind in PIPELINES) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '"SD"'])
def test_a_damaged_model_index_is_reported(copy: Path, content: str) -> None:
    (copy / "model_index.json").write_text(content)
    with pytest.raises(
        UserError, match=r"model_index\.json cannot be read .*; expected JSON with _class_name"
    ):
        open_pipeline(str(copy))


def test_only_t5_may_be_left_out(sdxl: Path, tmp_path: Path) -> None:
    sd3 = Path(tiny_teachers.save_sd3(tmp_path / "sd3"))
    assert "text_encoder_3" in open_pipeline(str(sd3)).components
    tiny_teachers.edit(sd3, "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    assert not {"text_encoder_3", "tokenizer_3"} & set(open_pipeline(str(sd3)).components)
    folder = Path(shutil.copytree(sdxl, tmp_path / "sdxl"))
    tiny_teachers.edit(folder, "model_index.json", text_encoder=[None, None])
    with pytest.raises(UserError, match="no text_encoder; expected the components unet, vae, text_encoder"):
        load_teacher(str(folder))


PLAIN, HALF = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        ([PLAIN, HALF, "diffusion_pytorch_model.non_ema.safetensors", "config.json"], None, [PLAIN]),
        ([HALF, "config.json", "diffusion_pytorch_model.bin"], "fp16", [HALF]),
        (["model.safetensors", "model.onnx", "pytorch_model.bin"], None, ["model.safetensors"]),
        ([*SHARDS, "model.safetensors.index.json"], None, SHARDS),
        (
            ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
            "fp16",
            ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
        ),
        (["model.bf16.safetensors", "model.fp16.safetensors"], "bf16", ["model.bf16.safetensors"]),
    ],
)
def test_full_precision_files_are_preferred(names: list[str], variant: str | None, chosen: list[str]) -> None:
    assert choose_weights(names) == (variant, chosen)


def test_pickled_weights_are_refused_with_a_remedy(copy: Path) -> None:
    unet = copy / "unet"
    (unet / PLAIN).rename(unet / "diffusion_pytorch_model.bin")
    says = r"unet cannot be loaded: no safetensors weights among its files \(config.json, diffusion_.*bin\)"
    with pytest.raises(UserError, match=says) as caught:
        load_model(str(copy), "unet")
    assert "safe_serialization=True" in str(caught.value)


def same_latents(a: Path, b: Path) -> bool:
    z = noise(0, [0], (4, 4, 4))
    result = (load_teacher(str(f)).sample(z, ["a red cube"], 2, 3.0, "ddim") for f in (a, b))
    return torch.equal(next(result), next(result))


def test_the_fingerprint_of_sharded_weights_covers_every_shard(teacher: Path, copy: Path) -> None:
    for component in ("unet", "text_encoder"):
        module = load_model(str(copy), component)
        for file in (copy / component).glob("*.safetensors"):
            file.unlink()
        module.save_pretrained(copy / component, max_shard_size="20KB", safe_serialization=True)
        assert len(list((copy / component).glob("*-of-*.safetensors"))) > 1
    assert same_latents(copy, teacher)
    before = weights_sha256(str(copy))
    for shard in sorted(copy.glob("*/*-of-*.safetensors")):
        data = shard.read_bytes()
        shard.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        assert weights_sha256(str(copy)) != before, shard
        shard.write_bytes(data)
    assert weights_sha256(str(copy)) == before
    sorted((copy / "unet").glob("*-of-*.safetensors"))[0].unlink()
    with pytest.raises(UserError, match="unet cannot be loaded"):
        load_model(str(copy), "unet")


def test_a_repository_with_half_precision_weights_only(teacher: Path, copy: Path) -> None:
    for component in ("unet", "text_encoder", "vae"):
        module = load_model(str(copy), component, torch.float16)
        for file in (copy / component).glob("*.safetensors"):
            file.unlink()
        module.save_pretrained(copy / component, variant="fp16", safe_serialization=True)
    weights = load_model(str(copy), "unet").conv_in.weight
    assert weights.dtype == torch.float32
    assert torch.equal(weights, load_model(str(teacher), "unet").conv_in.weight.half().float())
    assert [path.name for path in component_files(copy / "unet")] == ["config.json", HALF]
    assert not same_latents(copy, teacher)


def test_the_fingerprint_covers_only_loaded_files(sdxl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl, tmp_path / "copy"))
    same = weights_sha256(str(folder))
    assert same == weights_sha256(str(sdxl))
    shutil.copy(folder / "unet" / PLAIN, folder / "unet" / HALF)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    assert weights_sha256(str(folder)) == same
    digests = {same}
    for component in open_pipeline(str(folder)).components:
        path = component_files(folder / component)[-1]
        path.write_bytes(path.read_bytes() + b" ")
        digests.add(weights_sha256(str(folder)))
    tiny_teachers.edit(folder, "model_index.json", force_zeros_for_empty_prompt=False)
    digests.add(weights_sha256(str(folder)))
    assert len(digests) == 1 + len(PIPELINES["StableDiffusionXLPipeline"]) + 1


# The hub: its real client against a local server.


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that its client uses: repository metadata, file tree and files."""

    folder: Path
    requested_files: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        commit, path = "a" * 40, self.path.split("?")[0]
        files = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*") if p.is_file()}
        if "/resolve/" in path:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            if name not in files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, body)
            data = files[name].read_bytes()
            self.requested_files.append(name)
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self._send(200, data, {"ETag": etag, "X-Repo-Commit": commit}, body)
        if "/tree/" in path:
            rows = [
                {"type": "file", "path": name, "size": p.stat().st_size, "oid": "b" * 40}
                for name, p in files.items()
            ]
            return self._send(200, json.dumps(rows).encode(), {}, body)
        facts = {"id": "org/name", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        return self._send(200, json.dumps(facts).encode(), {}, body)

    def _send(self, code: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(code)
        for key, value in {
            "Content-Type": "application/json",
            **headers,
            "Content-Length": str(len(data)),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(copy: Path) -> Iterator[tuple[str, list[str]]]:
    """(address, requested file names) of a repository that also has files nobody needs."""
    for name in (
        "v1-5-pruned.safetensors",
        "README.md",
        "example.png",
        "unet/diffusion_pytorch_model.bin",
        "unet/model.onnx",
    ):
        (copy / name).write_bytes(b"gigabytes")
    shutil.copy(copy / "unet" / PLAIN, copy / "unet" / HALF)
    (copy / "text_encoder" / "model.safetensors").rename(copy / "text_encoder" / "model.fp16.safetensors")
    requested_files: list[str] = []
    handler = type("Handler", (Hub,), {"folder": copy, "requested_files": requested_files})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requested_files
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_id_downloads_only_needed_files_and_then_works_offline(
    hub: tuple[str, list[str]], copy: Path, tmp_path: Path
) -> None:
    address, requested_files = hub
    code = (
        "from d2g.diffusion.pipelines import *; print(resolve('org/name')); print(weights_sha256('org/name'))"
    )

    def run(**environment: str) -> list[str]:
        variables = {
            **os.environ,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        }
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    folder, sha256 = run(HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    expected = {"model_index.json", "unet/config.json", f"unet/{PLAIN}", "text_encoder/config.json"}
    expected |= {"text_encoder/model.fp16.safetensors", "vae/config.json", f"vae/{PLAIN}"}
    expected |= {f"tokenizer/{p.name}" for p in (copy / "tokenizer").iterdir()}
    expected |= {"scheduler/scheduler_config.json", "README.md"}
    assert set(requested_files) == expected
    assert {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()} == expected
    assert sha256 == weights_sha256(str(copy))
    requested_files.clear()
    assert run(HF_HUB_OFFLINE="1") == [folder, sha256] and not requested_files
