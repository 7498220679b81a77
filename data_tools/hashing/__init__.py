"""Hashes of pictures: of their bytes, and of what they look like."""
