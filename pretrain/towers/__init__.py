"""The two towers: built by open_clip, fed with text that is not padded, started from scratch or from weights."""
