"""d2g.data.tables: the size that a parquet file would have in memory is checked before it is read."""

import io
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2g.core.errors import UserError
from d2g.data.parquet_pages import page_sizes
from d2g.data.prompt_files import prompt_cells
from distill.training.real_images import RealImages
from eval.images.folders import load_all, read_images
from latent_lpips.training.labeled_images import open_labeled

CAPTIONS = [f"a photo of {number} {'very ' * (number % 7)}red cubes" for number in range(3000)]
CODECS = ["none", "snappy", "gzip", "zstd", "brotli", "lz4"]


def table(**options: Any) -> bytes:
    stream = io.BytesIO()
    columns = {"text": CAPTIONS, "n": list(range(3000)), "image": [{"path": None, "bytes": b"x" * 50}] * 3000}
    pq.write_table(pa.table(columns), stream, row_group_size=1000, data_page_size=4096, **options)
    return stream.getvalue()


def chunks(data: bytes) -> list[Any]:
    """The metadata of the column chunks."""
    meta = pq.ParquetFile(io.BytesIO(data)).metadata
    groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
    return [group.column(number) for group in groups for number in range(meta.num_columns)]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("codec", CODECS)
def test_page_sizes_agree_with_the_footer(codec: str, dictionary: bool, version: str) -> None:
    data = table(compression=codec, use_dictionary=dictionary, data_page_version=version)
    for chunk in chunks(data):
        sizes = list(page_sizes(io.BytesIO(data), chunk))
        assert sum(packed for packed, _ in sizes) == chunk.total_compressed_size
        # The footer counts the headers, too, which have 10 to 300 bytes each.
        headers = chunk.total_uncompressed_size - sum(unpacked for _, unpacked in sizes)
        assert 10 * len(sizes) <= headers <= 300 * len(sizes)
        if codec == "none":
            assert all(10 <= packed - unpacked <= 300 for packed, unpacked in sizes)


def test_damaged_page_headers_are_errors_without_a_traceback(tmp_path: Path) -> None:
    data, file = table(compression="zstd"), tmp_path / "a.parquet"
    for position in range(4, 204):
        for byte in (0, 0x7F, 0xFF):
            file.write_bytes(data[:position] + bytes([byte]) + data[position + 1 :])
            try:
                list(prompt_cells(file))
            except UserError as error:
                assert str(error).startswith(str(file)) and "\n" not in str(error)


@contextmanager
def limit_memory(size: int) -> Iterator[None]:
    """Let this process allocate at most `size` bytes more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 17 KiB whose columns have 512 MiB."""
    file = tmp_path_factory.mktemp("bomb") / "bomb.parquet"
    text = "a" * (64 << 20)
    image = pa.array([{"bytes": text.encode()}] * 8, pa.struct([("bytes", pa.binary())]))
    columns = pa.table({"text": [text] * 8, "image": image, "label": [0] * 8})
    pq.write_table(columns, file, compression="zstd", use_dictionary=False, write_statistics=False)
    assert file.stat().st_size < 200_000
    return file


@pytest.mark.parametrize("reader", ["prompts", "images", "gan.real", "lpips"])
def test_decompression_bombs_are_refused_before_they_are_read(bomb: Path, reader: str) -> None:
    read = {
        "prompts": lambda: next(prompt_cells(bomb)),
        "images": lambda: load_all(read_images(bomb)),
        "gan.real": lambda: RealImages(str(bomb), (8, 8)),
        "lpips": lambda: open_labeled(str(bomb), None),
    }[reader]
    with limit_memory(64 << 20), pytest.raises(UserError, match=r"would grow from .* MiB to \d\.\d GiB when"):
        read()


def test_a_footer_that_hides_the_size_does_not_help(bomb: Path, tmp_path: Path) -> None:
    """Change the sums in the footer: the pages themselves count."""
    data = bomb.read_bytes()
    size = pq.ParquetFile(bomb).metadata.row_group(0).column(0).total_uncompressed_size
    # A zigzag varint of the same length, with a small value.
    encoded, small = varint(2 * size), varint(2 * size)[:-1].replace(varint(2 * size)[:-1], b"\x80" * 4)
    assert len(encoded) == 5 and data.count(encoded) >= 1
    file = tmp_path / "hidden.parquet"
    file.write_bytes(data.replace(encoded, small + b"\x01"))
    assert pq.ParquetFile(file).metadata.row_group(0).column(0).total_uncompressed_size < size
    with limit_memory(64 << 20), pytest.raises(UserError, match=r"would grow from"):
        next(prompt_cells(file))


def varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


@pytest.mark.parametrize("logical", ["string", "dictionary"])
def test_a_long_text_that_is_repeated_is_in_memory_once(logical: str, tmp_path: Path) -> None:
    texts: Any = pa.DictionaryArray.from_arrays(pa.array([0] * 16_000, pa.int32()), ["a" * (1 << 16)])
    file = tmp_path / "repeated.parquet"
    if logical == "string":
        texts = texts.slice(0, 2000).cast(pa.string())
    pq.write_table(pa.table({"text": texts}), file)
    with limit_memory(64 << 20):
        assert sum(len(cell) for cell in prompt_cells(file)) == len(texts) << 16


def test_ordinary_repetition_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a photo"] * 200_000}), file, compression="zstd", use_dictionary=False)
    assert sum(1 for _ in prompt_cells(file)) == 200_000
