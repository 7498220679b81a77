"""The bytes of a shard, known here only: tar, index, writer, manifest, and how files are committed."""

MAX_SHARDS = 10**6  # of one corpus, named by a pattern or by its manifest
