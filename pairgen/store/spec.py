"""The layout of a pair folder: its spec, the names of its files, and atomic writes."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import torch

from d2g.core import atomic_files
from d2g.core.config import differing, digest, from_json, to_json
from d2g.core.errors import SettingError, UserError
from d2g.core.json_files import check_type, parse_json
from d2g.core.machine_errors import raise_machine_error
from d2g.core.regular_files import open_regular
from d2g.diffusion.families.base import EMBEDDED
from d2g.diffusion.latents import LatentSpace
from d2g.diffusion.pipelines import TeacherDigests
from d2g.diffusion.solvers import evaluations_per_sample

SCHEMA = 2
MAX_SHARDS = 1_000_000
"""Shards of one store; each is a file, and `verify` names those that are missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSpec:
    """Everything that determines a store's rows. Shards of stores whose facts are equal (`differing_facts`)
    are interchangeable.
    """

    schema: int = SCHEMA
    teacher: str
    """Folder or hub id of the teacher when the store was created; for information only."""
    teacher_sha256: str
    denoiser_sha256: str = ""
    """As `TeacherDigests`; empty in stores that were created before it was recorded."""
    conditioning: Literal["text", "label", "none"] = "text"
    teacher_facts: dict[str, Any] = field(default_factory=dict)
    """Other facts of the teacher's family that change latents: micro-conditioning, null condition, shift."""
    prompts_sha256: str
    num_pairs: int
    num_prompts: int
    per_prompt: int = 1
    solver: Literal["ddim", "heun", "euler"]
    steps: int
    spacing: Literal["leading", "trailing", "linspace"]
    final_alpha_one: bool
    guidance: float
    guidance_rescale: float = 0.0
    churn: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int
    dtype: Literal["float16", "float32"] = "float16"
    latent_shape: tuple[int, int, int]
    latent_space: LatentSpace
    noise: Literal["stored", "seeded"] = "stored"
    shard_size: int
    condition: str = ""
    """Folder of the store whose latents condition the rows (stage B of a cascade); for information only."""
    condition_sha256: str = ""
    """What that store's rows depend on: `rows_sha256` of its spec."""
    condition_teacher: str = ""
    """The denoiser's sha256 of the teacher of that store."""
    condition_shape: tuple[int, int, int] | None = None
    """Shape (C, h, w) of its latents, which each row holds beside its own."""
    compiled: bool = False
    """Whether the network was compiled, which changes rows by rounding only; for information only."""
    earlier_prompts: tuple[tuple[int, str], ...] = ()
    """(num_prompts, prompts_sha256) of the prompt lists before prompts were appended, oldest first."""

    def __post_init__(self) -> None:
        # Refuse values for which no row exists.
        for name in ("num_pairs", "num_prompts", "per_prompt", "steps", "shard_size"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_shards > MAX_SHARDS:
            expected = f"at least {-(-self.num_pairs // MAX_SHARDS)} for {self.num_pairs} pairs"
            raise SettingError(f"shard_size is {self.shard_size}, expected {expected}")
        if not 0 <= self.seed < 2**63:
            raise SettingError(f"seed is {self.seed}, expected 0 to 2^63 - 1")
        # The file format has these types only.
        if self.dtype not in ("float16", "float32"):
            raise SettingError(f"dtype is {self.dtype!r}, expected 'float16' or 'float32'")
        if self.noise not in ("stored", "seeded"):
            raise SettingError(f"noise is {self.noise!r}, expected 'stored' or 'seeded'")
        if min(self.latent_shape) < 1 or self.latent_shape[0] != self.latent_space.channels:
            channels = self.latent_space.channels
            raise SettingError(f"latent_shape is {self.latent_shape}, expected ({channels}, height, width)")

    def as_json(self) -> dict[str, Any]:
        """The spec as stored. Integers in float fields become floats: equal specs have equal digests.

        Fields of `_LEFT_OUT` are not stored while they are empty, as before there were such fields.
        """
        values = to_json(from_json(StoreSpec, to_json(self)))
        return {key: value for key, value in values.items() if value or key not in _LEFT_OUT}

    @property
    def sha256(self) -> str:
        return digest(self.as_json())

    @property
    def rows_sha256(self) -> str:
        """Digest of the facts that decide each row; it stays when the store grows."""
        growing = ("num_pairs", "num_prompts", "prompts_sha256")
        facts = {name: value for name, value in self.as_json().items() if name in _FACTS}
        facts |= {"denoiser": self.denoiser_sha256 or self.teacher_sha256}
        return digest({name: value for name, value in facts.items() if name not in growing})

    @property
    def row_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Stored tensors of a row and their shapes (C, h, w)."""
        shapes = {"latent": self.latent_shape}
        if self.noise == "stored":
            shapes["noise"] = self.latent_shape
        if self.condition_shape is not None:
            shapes["condition"] = self.condition_shape
        return shapes

    @property
    def teacher_digests(self) -> TeacherDigests:
        """What identifies the teacher; without a digest of the denoiser where none was recorded."""
        return TeacherDigests(self.teacher_sha256, self.denoiser_sha256)

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float16 if self.dtype == "float16" else torch.float32

    @property
    def num_shards(self) -> int:
        return -(-self.num_pairs // self.shard_size)

    @property
    def evaluations_per_pair(self) -> int:
        """Network evaluations of the teacher for a pair; classifier-free guidance takes two per evaluation of
        the solver, a guidance scale that is an input of the network takes one."""
        embedded = self.teacher_facts.get("guidance") == EMBEDDED
        return evaluations_per_sample(self.steps, self.solver, 1.0 if embedded else self.guidance)

    def rows(self, shard: int) -> range:
        """The pair indices of shard number `shard`."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_pairs))

    def prompt_of(self, index: int) -> int:
        """The position in the prompt list of pair `index`'s prompt."""
        return index // self.per_prompt % self.num_prompts


_CONDITION = ("condition", "condition_sha256", "condition_teacher", "condition_shape")
_LEFT_OUT = ("denoiser_sha256", "earlier_prompts", "churn", "compiled", *_CONDITION)
_TEACHER = ("teacher", "teacher_sha256", "denoiser_sha256")
_NOTES = (*_TEACHER, "condition", "compiled", "earlier_prompts")
_FACTS = tuple(name for name in StoreSpec.__dataclass_fields__ if name not in _NOTES)
"""Fields that two stores of one kind share, beside their teacher."""


def differing_facts(spec: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The facts in which two specs, as JSON, differ, as texts `name (a -> b)`.

    The teacher's folder and the history of the prompt list are no facts. Of a teacher, the denoiser decides
    where both specs have its digest, so that a store survives another autoencoder.
    """
    by_denoiser = spec.get("denoiser_sha256") and expected.get("denoiser_sha256")
    names = [*_FACTS, "denoiser_sha256" if by_denoiser else "teacher_sha256"]
    left, right = ({name: facts.get(name) for name in names} for facts in (spec, expected))
    return differing(left, right)


def differing_from_earlier(spec: StoreSpec, earlier: Mapping[str, Any]) -> list[str]:
    """The facts in which `earlier`, a spec as JSON, can be no spec that this store had before it grew.

    It may have fewer pairs, and one of the store's earlier prompt lists.
    """
    now = spec.as_json()
    grown = ["num_pairs"] if 0 < int(earlier.get("num_pairs", 0)) <= spec.num_pairs else []
    if (earlier.get("num_prompts"), earlier.get("prompts_sha256")) in spec.earlier_prompts:
        grown += ["num_prompts", "prompts_sha256"]
    return differing_facts(now, {**earlier, **{name: now[name] for name in grown}})


def is_teacher_of(spec: StoreSpec, teacher: TeacherDigests) -> bool:
    """Whether a store was made by the teacher with these digests, whatever its autoencoder."""
    return teacher.denoiser == spec.denoiser_sha256 or teacher.weights == spec.teacher_sha256


def shard_path(folder: Path, shard: int) -> Path:
    return Path(folder) / "shards" / f"pairs-{shard:05d}.h5"


def shards_present(folder: Path, spec: StoreSpec) -> list[int]:
    """Sorted numbers of the shards present. All are complete: finished shards are renamed into place."""
    return shard_numbers(spec, (path.name for path in (Path(folder) / "shards").glob("*.h5")))


def shard_numbers(spec: StoreSpec, names: Iterable[str]) -> list[int]:
    """Sorted numbers of the shards among file names."""
    matches = (re.fullmatch(r"pairs-(\d{5,})\.h5", name) for name in names)
    return sorted(int(m[1]) for m in matches if m and int(m[1]) < spec.num_shards)


def prompts_path(folder: Path) -> Path:
    """The store's own copy of its prompt list."""
    return Path(folder) / "prompts.jsonl"


def quarantine_path(folder: Path, shard: int) -> Path:
    """The record of the rows that a shard lacks because their latents were not finite."""
    return Path(folder) / "quarantine" / f"pairs-{shard:05d}.rows.json"


class QuarantinedRow(TypedDict):
    """A row of a quarantine record."""

    index: int
    prompt: str


class StoreFile(TypedDict):
    """The content of store.json."""

    schema: int
    sha256: NotRequired[str]
    spec: NotRequired[dict[str, Any]]


def encode_record(shard: int, rows: Sequence[dict[str, Any]]) -> bytes:
    """Encode a quarantine record of rows {"index", "prompt", "reason"}."""
    content = {"shard": f"pairs-{shard:05d}.h5", "sha256": digest(rows), "rows": rows}
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def read_record(folder: Path, shard: int) -> list[dict[str, Any]]:
    """The rows of a shard's quarantine record. Raises UserError for a damaged record."""
    path = quarantine_path(folder, shard)
    remedy = f"run `d2g pairs repair {folder}`"
    try:
        with open_regular(path) as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    return parse_record(data, shard, str(path), remedy)


def parse_record(data: bytes, shard: int, name: str, remedy: str) -> list[dict[str, Any]]:
    """The rows of a quarantine record. `name` and `remedy` are for messages. Raises UserError for damage."""
    try:
        rows: list[dict[str, Any]] = parse_json(data)["rows"]
        check_type(rows, list[QuarantinedRow], "rows")
        if data != encode_record(shard, rows):
            raise ValueError("its sha256 does not match its rows")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name} is damaged ({error}); {remedy}") from error
    return rows


def records_present(folder: Path) -> list[int]:
    """Numbers of the shards that have a quarantine record."""
    return sorted(record_numbers(path.name for path in (Path(folder) / "quarantine").glob("*.rows.json")))


def record_numbers(names: Iterable[str]) -> dict[int, str]:
    """Shard number -> the file of its quarantine record, among file names."""
    matches = (re.fullmatch(r"pairs-(\d{5,})\.rows\.json", name) for name in names)
    return {int(match[1]): match[0] for match in matches if match}


def quarantined_rows(folder: Path, spec: StoreSpec) -> dict[int, list[dict[str, Any]]]:
    """Shard number -> its quarantined rows {"index", "prompt", "reason"}, in order of index.

    Raises UserError for a damaged record. A shard's header lists the indices too.
    """
    return {shard: read_record(folder, shard) for shard in records_present(folder) if shard < spec.num_shards}


def pending(folder: Path, spec: StoreSpec) -> list[range]:
    """Pair indices of the shards that are not present yet, one range per shard, in order."""
    present = set(shards_present(folder, spec))
    return [spec.rows(shard) for shard in range(spec.num_shards) if shard not in present]


def create_store(folder: Path, spec: StoreSpec) -> StoreSpec:
    """Write DIR/store.json, or check that the existing one has the facts of `spec`; remove files of killed
    writers. Returns the spec in the file.

    Raises UserError if the folder has another spec (naming the keys that differ), holds something else, or
    cannot be written.
    """
    folder = local_folder(folder)
    refuse_other_folder(folder)
    with writing(folder, "nothing was written"):
        for name in ("shards", "partial", "claims"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        # A store keeps its spec; a new one is written atomically.
        if (folder / "store.json").exists():
            stored = read_spec(folder)
            require_same_spec(folder, stored, spec)
        else:
            stored = spec
            write_spec(folder, spec)
        # Complete shards need no partial files any more.
        remove_leftovers(folder, stored)
    return stored


_OTHER_FOLDERS = {
    "model_index.json": "a teacher",
    "student.json": "an exported student",
    "config.json": "a run or a model",
}


def refuse_other_folder(folder: Path) -> None:
    """Raise UserError for a folder without a pair store that holds something else, which would be taken for a
    store from then on."""
    if (folder / "store.json").exists():
        return
    for file, contents in _OTHER_FOLDERS.items():
        if (folder / file).is_file():
            raise UserError(f"{folder} holds {contents} ({file}), not a pair store; give another --out")


def remove_leftovers(folder: Path, spec: StoreSpec) -> None:
    """Remove what killed writers left of shards that are present: nobody writes those any more."""
    for shard in shards_present(folder, spec):
        for leftover in (folder / "partial").glob(f"{shard_path(folder, shard).stem}.*"):
            leftover.unlink(missing_ok=True)


def write_spec(folder: Path, spec: StoreSpec) -> None:
    """Write DIR/store.json. Raises OSError."""
    write_through_scratch(encode_spec(spec), folder / "store.json", folder / "partial")


def encode_spec(spec: StoreSpec) -> bytes:
    """The content of store.json."""
    content = {"schema": SCHEMA, "sha256": spec.sha256, "spec": spec.as_json()}
    return json.dumps(content, indent=2).encode() + b"\n"


def local_folder(folder: Path | str) -> Path:
    """`folder` as a Path. Raises UserError for a URL, also if a Path has merged its slashes."""
    if re.match("[a-z][a-z0-9+.:-]+:/", str(folder)):
        url = re.sub(":/+", "://", str(folder))
        raise UserError(f"{url} is a URL; this needs a folder of this machine: copy the store here first")
    return Path(folder)


def read_spec(folder: Path) -> StoreSpec:
    """Read DIR/store.json. Raises UserError if it is missing, damaged or of another schema version."""
    path = local_folder(folder) / "store.json"
    try:
        with open_regular(path) as file:
            return parse_spec(file.read(), str(path))
    except OSError as error:
        raise_machine_error(error)
        text = f"{folder} is not a pair store: cannot read {path} ({error.strerror})"
        raise UserError(f"{text}; create one with `d2g pairs generate`") from error


def parse_spec(content: bytes, name: str) -> StoreSpec:
    """Parse the bytes of a store.json; `name` is for messages. Raises UserError."""
    try:
        facts = parse_json(content)
        check_type(facts, StoreFile)
        if (schema := facts["schema"]) != SCHEMA:
            remedy = (
                "upgrade"
                if schema > SCHEMA
                else "read it with the version that wrote it, or generate it again"
            )
            raise UserError(f"{name}: pair schema {schema}, this version reads schema {SCHEMA}; {remedy}")
        # The digest detects a store.json that was edited by hand.
        spec = from_json(StoreSpec, facts["spec"])
        if spec.sha256 != facts["sha256"]:
            raise ValueError("its sha256 does not match its spec")
    except (ValueError, KeyError, TypeError, AttributeError, SettingError) as error:
        raise UserError(f"{name} is damaged ({error}); restore it from the run that wrote it") from error
    return spec


def require_same_spec(folder: Path | str, spec: StoreSpec, expected: StoreSpec) -> None:
    """Raise UserError naming the facts in which the spec of `folder` differs from `expected`."""
    if names := differing_facts(spec.as_json(), expected.as_json()):
        text = f"{folder} holds pairs of another spec; differing: {', '.join(names)}"
        raise UserError(f"{text}; choose another folder, or the settings of this one")


def require_same_or_earlier_spec(folder: Path | str, spec: StoreSpec, expected: StoreSpec) -> None:
    """`require_same_spec`, but `folder` may hold what the other store was before it grew."""
    if differing_from_earlier(expected, spec.as_json()):
        require_same_spec(folder, spec, expected)


@contextmanager
def writing(folder: Path, safe: str) -> Iterator[None]:
    """Turn an OSError of writing into a one-line UserError; `safe` tells the user what is not lost."""
    try:
        yield
    except OSError as error:
        if error.errno in atomic_files.DISK_FULL_ERRNOS:
            free = f"{atomic_files.free_mib(folder):.1f} MiB free on its disk"
            text = f"no room to write in {folder} ({error.strerror}; {free}); {safe}"
            raise UserError(f"{text}; make room and run the same command again") from error
        text = f"cannot write {error.filename or folder} ({error.strerror}); {safe}"
        raise UserError(f"{text}; fix that or choose another output folder") from error


def write_through_scratch(data: bytes | memoryview, path: Path, scratch: Path) -> None:
    """Write `data` to a temporary file in `scratch`, sync it, and rename it to `path`."""
    atomic_files.write_and_rename(data, path, temporary_name(path, scratch))


def temporary_name(path: Path, scratch: Path) -> Path:
    """The temporary file in `scratch` for `path`."""
    return scratch / f"{path.stem}.{atomic_files.process_tag()}.tmp"
