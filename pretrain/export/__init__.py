"""One folder that open_clip and transformers load unchanged, checked by loading it."""
