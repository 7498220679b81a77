"""Whether an evaluation looks at what was trained on: shards are known again by the hash of their content."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from data_tools.corpus import Corpus, open_corpus
from data_tools.errors import shown
from data_tools.remote.urls import is_remote
from pretrain.engine.committed import SETTINGS

_HASH = 16  # bytes of a shard's in Corpus.hashes


def remark(what: str, evaluated: Corpus, trained: Corpus | None) -> str | None:
    """One line where shards of `evaluated`, which a message calls `what`, are training shards; else None."""
    if trained is None:
        return None
    known = set(_hashes(trained))
    shared = sum(digest in known for digest in _hashes(evaluated))
    if not shared:
        return None
    count = len(evaluated.paths)
    return (
        f"warning: {shared} of {count} shards of {shown(what)} were trained on: its figures say nothing of new samples"
    )


def training_corpus(model: str | Path) -> Corpus | None:
    """What the run or checkpoint folder `model` was trained on, by its settings; None where they are not there, or the
    shards are not, or not on this machine."""
    try:
        sources = OmegaConf.select(OmegaConf.load(Path(model) / SETTINGS), "data.train") or []
        urls = [source["urls"] for source in sources]
        return None if not urls or any(map(is_remote, urls)) else open_corpus(urls)
    except Exception:  # a remark is worth no error: of the settings' YAML, or of shards that are gone or damaged
        return None


def _hashes(corpus: Corpus) -> list[bytes]:
    return [corpus.hashes[start : start + _HASH] for start in range(0, len(corpus.hashes), _HASH)]
