"""Columns: what was computed of every sample, once, in a file beside its shard. The shards stay as they are."""
