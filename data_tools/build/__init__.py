"""A folder of shards, made by tasks of which each writes one: accounted for, committed step by step, finished by a
second run."""
