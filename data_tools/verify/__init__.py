"""Checking shards: everything that can be wrong with a tar, its index, its parquet and the manifest."""
