"""Shards made of shards: samples chosen, cut anew or taken out, as they are and never decoded."""
