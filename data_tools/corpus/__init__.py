"""A corpus: the shards that a path, pattern or URL leads to, and reading samples of them."""

from data_tools.corpus.corpus import Corpus, join_corpora, open_corpus
from data_tools.corpus.reader import Sample, ShardReader

__all__ = ["Corpus", "Sample", "ShardReader", "join_corpora", "open_corpus"]
