"""Copies and near-copies of pictures, found by their hashes alone."""
