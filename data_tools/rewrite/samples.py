"""A stored sample on its way into another shard: its members as they are, and its rows in the account."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import xxhash

from data_tools.build.accounts import PACKED, SCHEMA, SKIPPED, read_account, to_json
from data_tools.corpus import Sample
from data_tools.errors import UserError
from data_tools.media.bad import BadSampleError
from data_tools.media.captions import parse_json
from data_tools.media.members import Fields

_EMPTY = dict.fromkeys(SCHEMA.names)


def other_key(tar_hash: bytes, row: int) -> str:
    """A key for a sample that cannot keep its own: it follows from where the sample stood."""
    return xxhash.xxh3_128_hexdigest(tar_hash + row.to_bytes(8, "little"))


def account_of(sample: Sample, key: str, tar: str, fields: Fields) -> list[dict]:
    """Rows for a sample: those of its pack, where one lies beside its shard, else one that says what its members do."""
    rows = _packed(Path(tar)).get(sample.key)
    if rows is not None:
        return [{**row, "key": key} for row in rows]
    return [
        {**_EMPTY, **_told(sample, fields), "id": sample.key, "key": key, "source": f"{Path(tar).name}:{sample.key}"}
    ]


def lost(tar: str, row: int, reason: str) -> dict:
    """The row of a sample that its damaged tar no longer holds."""
    source = f"{Path(tar).name}:{row}"
    told = {"id": source, "key": "", "source": source, "status": SKIPPED, "error_class": "lost", "error": reason}
    return {**_EMPTY, **told, "captions": [], "metadata": to_json({})}


def _told(sample: Sample, fields: Fields) -> dict:
    told: dict = {"status": PACKED, "captions": _captions(sample, fields), "metadata": to_json(_metadata(sample))}
    try:
        image = fields.image_bytes(sample)
    except BadSampleError:  # a shard of texts alone
        return told
    return told | {"bytes": len(image), "sha256": hashlib.sha256(image).hexdigest()}


def _captions(sample: Sample, fields: Fields) -> list[str]:
    try:
        return fields.all_captions(sample)
    except BadSampleError:  # what is bad about a sample is for verify to say
        return []


def _metadata(sample: Sample) -> dict:
    try:
        found = parse_json(sample.members["json"]) if "json" in sample.members else {}
    except BadSampleError:
        return {}
    return found if isinstance(found, dict) else {}


@lru_cache(maxsize=2)
def _packed(tar: Path) -> dict[str, list[dict]]:
    """The packed rows of a shard's account by key; none where there is no account."""
    path = tar.with_suffix(".parquet")
    try:
        table = read_account(path, SCHEMA.names)
    except UserError:
        return {}
    rows: dict[str, list[dict]] = {}
    for row in table.to_pylist():
        if row["status"] == PACKED:
            rows.setdefault(row["key"], []).append(row)
    return rows
