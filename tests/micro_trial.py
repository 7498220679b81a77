"""A training small enough for tests of the benchmark: noise, words, and towers of a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.__main__ import main as data_tools
from launch.benchmark.trainers import Trial

_TOWERS = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


def micro_trial(folder: Path) -> Trial:
    """Sixteen pairs in two shards and the towers' JSON, in `folder`; three steps of eight pairs, fp32."""
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(16):
        image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        image.save(images / f"{number:02d}.jpg")
        (images / f"{number:02d}.txt").write_text("thing " * (1 + number % 5) + str(number))
    pack = ["pack", str(images), str(folder / "shards"), "--samples-per-shard", "8", "--workers", "1"]
    assert data_tools(pack) == 0
    model = folder / "micro.json"
    model.write_text(json.dumps(_TOWERS))
    shards = tuple(str(path) for path in sorted((folder / "shards").glob("*.tar")))
    return Trial(str(folder / "shards"), shards, str(model), 8, 3, warmup=1, workers=0)
