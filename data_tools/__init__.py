"""From raw corpora to indexed WebDataset shards. Imports no torch; the shard format lives in `data_tools.corpus`."""
