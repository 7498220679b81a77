"""Whether shards still are what their manifest or index says: one process of a node hashes each as its reading begins.

What no longer decodes is noticed by reading; what changed and still decodes, such as a flipped bit of a disk, is not.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from data_tools.format.index import hash_file
from data_tools.remote.cache import Cache
from data_tools.remote.locks import share
from pretrain.stream.workers import close_at_exit, start_process

_AHEAD = 32  # steps before their reading that shards are hashed: they are then in the page cache for the readers
_POLL = 0.2
_LISTED = 5


class ShardCheck:
    """Hashes shards from `first_step` on, in a process of the lowest priority that ends with `close()` or this one.

    A changed shard is told on stderr and in `journal`, and read on: it holds what training can take, and nothing is
    gained by ending a long run for one of many. Where changed shards hold more than `max_ratio` of the samples, the
    run ends, as it does with too many bad samples.

    Args:
        corpus: the shards; remote ones are checked when they are brought, and here where the cache had them before.
        shards_of_step: step -> the distinct shards that this node needs in it; picklable.
        journal: JSON-lines file of the changed shards.

    `fault`: why the journal could not be written, None while it could.
    """

    def __init__(
        self,
        corpus: Corpus,
        shards_of_step: Callable[[int], Iterable[int]],
        first_step: int,
        max_ratio: float,
        journal: str | Path,
    ):
        self._corpus, self._max_ratio, self._journal = corpus, max_ratio, Path(journal)
        self._changed: dict[int, str] = {}
        self.fault: OSError | None = None
        self._step = multiprocessing.get_context("forkserver").RawValue("q", first_step)
        self._found, sending = multiprocessing.Pipe(duplex=False)
        self.process = start_process(_check, corpus, shards_of_step, self._step, sending)
        sending.close()
        close_at_exit(self)

    def advance(self, step: int) -> None:
        """The batch of `step` was delivered. Tells what was found since; raises UserError where that is too much."""
        self._step.value = step + 1
        if self._found.closed:
            return
        try:
            while self._found.poll():
                self._tell(step, *self._found.recv())
        except EOFError:  # all are looked at, or will never be
            self._found.close()
            self.process.join()
            if self.process.exitcode:
                code = f"exit code {self.process.exitcode}"
                print(f"warning: the check of the shards has died, {code}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the process. Can be called again."""
        self.process.kill()
        self.process.join()

    def _tell(self, step: int, shard: int, digest: str) -> None:
        corpus = self._corpus
        expected = corpus.tar_hash(shard).hex()
        self._changed[shard] = corpus.paths[shard]
        row = {"step": step + 1, "shard": corpus.paths[shard], "xxh3_128": digest, "expected": expected}
        try:
            self._journal.parent.mkdir(parents=True, exist_ok=True)
            with self._journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            self.fault = error
        warning = UserError(
            f"content of shard {corpus.paths[shard]} changed",
            got=f"xxh3-128 {digest}",
            expected=f"{expected}, as in its manifest or index",
            remedy=f"look at its disk, copy the shard back; see {self._journal}",
        )
        samples = int(sum(corpus.counts[shard] for shard in self._changed))
        if samples > self._max_ratio * corpus.num_samples:
            names = ", ".join(list(self._changed.values())[:_LISTED])
            raise UserError(
                f"too many samples lie in shards that changed: {names}",
                got=f"{samples} of {corpus.num_samples} samples",
                expected=f"at most {self._max_ratio:.4g} of them",
                remedy=f"copy these shards back, or raise data.max_bad_ratio; see {self._journal}",
            )
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _check(corpus: Corpus, shards_of_step: Callable[[int], Iterable[int]], step, found: Connection) -> None:
    """The process: it ends when every shard was looked at."""
    os.nice(19)  # for processor and disk
    seen: set[int] = set()
    at = step.value
    while len(seen) < len(corpus.paths):
        if at > step.value + _AHEAD:
            time.sleep(_POLL)
            continue
        for shard in set(shards_of_step(at)) - seen:
            seen.add(shard)
            digest = _digest(corpus, shard)
            if digest is not None and digest != corpus.tar_hash(shard):
                found.send((shard, digest.hex()))
        at += 1


def _digest(corpus: Corpus, shard: int) -> bytes | None:
    """The hash of a shard as it is now; None where it is not there, or cut: the reader says so, or brings and checks
    it."""
    remote = corpus.remote(shard)
    if remote is None or corpus.cache is None:
        path = Path(corpus.paths[shard])
        try:
            return hash_file(path) if path.stat().st_size == corpus.tar_bytes[shard] else None
        except OSError:
            return None
    tar = Cache(corpus.cache).folder / f"{remote.key}.tar"
    lease = share(tar)
    if lease is None:
        return None
    try:
        return hash_file(tar)
    finally:
        os.close(lease)
