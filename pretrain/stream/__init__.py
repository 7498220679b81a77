"""The training stream: order -> read -> decode, augment, tokenise -> batch.

It is told its rank and the world size, and calls no collective.
"""
