"""Writing a shard: the same samples give the same bytes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import xxhash

from data_tools.errors import UserError
from data_tools.format.commit import atomic_write
from data_tools.format.index import Index, IndexBuilder, index_path, write_index
from data_tools.format.tar import BLOCK, RECORD, member_header, padding, split_name


class _HashedFile:
    """Counts and hashes what goes into a file."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._state = xxhash.xxh3_128()
        self.size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._state.update(data)
        self.size += len(data)

    def digest(self) -> bytes:
        return self._state.digest()


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Index:
    """Commit `path` (a tar) and its index, from (key, members by extension) in strictly rising order of key.

    Headers come from `tarfile` and not from webdataset's TarWriter: importing webdataset imports torch (seconds), and
    its writer drops the `format` it is given, so that a long name would bring in PAX headers.
    """
    builder = IndexBuilder()
    with atomic_write(path) as raw:
        file = _HashedFile(raw)
        previous = ""
        for key, members in samples:
            if key <= previous:
                raise ValueError(f"keys must rise: {key!r} after {previous!r}")
            previous = key
            _write_sample(file, builder, key, members)
        end = file.size
        file.write(bytes(2 * BLOCK))
        file.write(bytes(-file.size % RECORD))
        index = builder.finish(end, file.size, file.digest())
    write_index(index, index_path(path))
    return index


def _write_sample(file: _HashedFile, builder: IndexBuilder, key: str, members: Mapping[str, bytes]) -> None:
    start, table = file.size, []
    for extension in sorted(members):
        data, name = members[extension], f"{key}.{extension}"
        if split_name(name) != (key, extension):
            raise ValueError(f"not a WebDataset name: {name!r} (no dot in the key, lower-case extension)")
        try:
            header = member_header(name, len(data))
        except ValueError as error:
            raise UserError(f"key too long for a tar: {key!r}", got=error, expected="100 bytes or less") from None
        file.write(header)
        table.append((extension, file.size - start, len(data)))
        file.write(data)
        file.write(bytes(padding(len(data))))
    builder.add(key, start, table)
