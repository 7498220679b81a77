"""Zero-shot evaluation: retrieval, classification, minimal pairs; sharded over ranks, deterministic, strict results."""
