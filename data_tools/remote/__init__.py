"""Remote shards: reading objects by URL, and the cache of whole shards that the processes of a node share.

File systems (fsspec) are imported when first used, and no object here holds one: everything pickles, and a process that
only forks others never starts fsspec's event loop.
"""
