"""What the cache is told: where it lies and how large it may grow, and which shard is meant."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_tools.remote.retry import Limits

DEFAULT_GIB = 64.0  # of disk
_GIB = 1 << 30


@dataclass(frozen=True)
class CacheSettings:
    """Below which folder shards are kept, how many bytes of them, and how patient reading is."""

    folder: str
    limit: int
    limits: Limits = field(default_factory=Limits)


class Shard(NamedTuple):
    """A remote tar: its URL, length and xxh3-128."""

    url: str
    size: int
    hash: bytes

    @property
    def key(self) -> str:
        """The name of its files in the cache."""
        return f"{self.hash.hex()}-{self.size:x}"


def default_settings(folder: str | None = None, gib: float = DEFAULT_GIB) -> CacheSettings:
    """The cache below `folder`, or below the user's cache folder."""
    if folder is None:
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return CacheSettings(str(Path(folder).absolute()), int(gib * _GIB))
