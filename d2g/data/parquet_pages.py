"""The sizes of a parquet file's pages, from the headers of the pages themselves, before anything is unpacked.

The sums in the footer are claims that no reader checks. A page's header is a struct of Thrift's compact
protocol, whose fields 2 and 3 are the sizes of the page unpacked and packed (parquet.thrift, PageHeader).
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

WINDOW, LONGEST_HEADER = 1 << 12, 1 << 24
"""Bytes that are read of a page's header at first, and at most: as Arrow reads it."""
_BOOL_TRUE, _BOOL_FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


def page_sizes(file: BinaryIO, chunk: Any) -> Iterator[tuple[int, int]]:
    """Yield (bytes packed with header, bytes unpacked) of each page of a column chunk.

    `chunk`: pyarrow's ColumnChunkMetaData. Raises ValueError for a header that is damaged.
    """
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < start:
        start = chunk.dictionary_page_offset
    position, end = start, start + chunk.total_compressed_size
    while position < end:
        fields, length = _read_header(file, position)
        unpacked, packed = fields.get(2, 0), fields.get(3, 0)
        if packed < 0 or unpacked < 0:
            raise ValueError(f"a page of negative size at byte {position}")
        yield length + packed, unpacked
        position += length + packed


def _read_header(file: BinaryIO, position: int) -> tuple[dict[int, int], int]:
    """(the integer fields of the page's header at a position by number, its length in bytes)."""
    window = WINDOW
    while True:
        file.seek(position)
        data = file.read(window)
        try:
            return _struct(data, 0, 0)
        except IndexError as error:  # the header goes on behind the window
            if len(data) < window or window >= LONGEST_HEADER:
                raise ValueError(f"no page header at byte {position}") from error
            window *= 16


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, int], int]:
    """(integer fields of a struct by number, where it ends)."""
    if depth > 8:
        raise ValueError("a page header that is nested too deeply")
    fields: dict[int, int] = {}
    number = 0
    while (head := data[at]) != 0:
        # A field's number is a difference to the last one, or follows in full.
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        kind = head & 15
        if kind in (_I16, _I32, _I64):
            fields[number], at = _integer(data, at)
        elif kind not in (_BOOL_TRUE, _BOOL_FALSE):  # those have no bytes of their own
            at = _skip(data, at, kind, depth)
    return fields, at + 1


def _skip(data: bytes, at: int, kind: int, depth: int) -> int:
    """Where a value ends."""
    if kind in (_BOOL_TRUE, _BOOL_FALSE, _BYTE):
        return at + 1
    if kind in (_I16, _I32, _I64):
        return _integer(data, at)[1]
    if kind == _DOUBLE:
        return at + 8
    if kind == _BINARY:
        length, at = _varint(data, at)
        return at + length
    if kind in (_LIST, _SET):
        head, at = data[at], at + 1
        count = head >> 4
        if count == 15:
            count, at = _varint(data, at)
        for _ in range(count):
            at = _skip(data, at, head & 15, depth)
            data[at - 1]  # an IndexError ends a count that is too large
        return at
    if kind == _STRUCT:
        return _struct(data, at, depth + 1)[1]
    raise ValueError(f"a page header with a value of kind {kind}")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    """A signed integer in zigzag form, and where it ends."""
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a page header with an integer of more than 64 bits")
