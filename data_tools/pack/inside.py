"""Which files an input may bring into shards: those below its root, others only with --follow-links."""

import os
from functools import lru_cache
from pathlib import Path

from data_tools.errors import shown

ERROR_CLASS = "outside_input"
PATH_MAX = 4096  # bytes of a path that Linux opens, with the null byte


class Boundary:
    """The root of an input. A table or an archive from elsewhere may name any file of this machine, a link may lead to
    one: what lies outside is refused, whether `../`, an absolute path or a link leads there."""

    def __init__(self, root: Path, follow_links: bool = False):
        self.root, self.follow_links = root, follow_links
        self._real_root = os.path.realpath(root)
        self._real_folder = lru_cache(maxsize=4096)(os.path.realpath)

    def fault(self, path: str) -> tuple[str, str] | None:
        """(error class, detail) of a file outside; None: it may be read. `path` starts at the root, or is absolute.

        Costs one lstat for a file that is no link.
        """
        if self.follow_links or not path:
            return None
        full = os.path.join(self.root, path)
        if len(full) >= PATH_MAX:  # no file has such a name; to resolve it would take long
            return None
        try:
            real = os.path.realpath(full) if os.path.islink(full) else self._beside_links(full)
        except ValueError:  # a null byte: no such file
            return None
        if real == self._real_root or real.startswith(self._real_root.rstrip(os.sep) + os.sep):
            return None
        return (
            ERROR_CLASS,
            f"{shown(path)} leads out of {shown(os.path.abspath(self.root))}; --follow-links takes such files",
        )

    def _beside_links(self, full: str) -> str:
        folder, name = os.path.split(full)
        return os.path.realpath(full) if name in ("", ".", "..") else os.path.join(self._real_folder(folder), name)
