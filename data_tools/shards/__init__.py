"""The on-disk shard format, known here only: WebDataset tars, a binary index beside each, one manifest."""

from data_tools.shards.corpus import Corpus, join_corpora, open_corpus
from data_tools.shards.reader import Sample, ShardReader

__all__ = ["Corpus", "Sample", "ShardReader", "join_corpora", "open_corpus"]
