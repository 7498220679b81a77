"""Predictions of a fine-tuned classifier for a folder, a table or shards of pictures."""
