"""What stored bytes mean: which are images, how they become pixels, what is a caption, and what is bad about a sample.

One rule each, for packing, verifying, previews, training and evaluation.
"""

MAX_PIXELS = 89_478_485  # of a picture that is decoded; Pillow takes more for a decompression bomb, too
DEFAULT_CAPTIONS = "json:captions;txt"  # where captions are looked for, the first place that has any
