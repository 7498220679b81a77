"""Captions of a scene: paraphrases that each say all there is to say, in 40 BPE tokens or fewer."""

import random

from data_tools.scenes.scene import ABOVE, LEFT, Group, Scene, pick

CAPTIONS_PER_SCENE = 4

_COUNTS = {1: ("a", "one", "a single"), 2: ("two", "a pair of", "2"), 3: ("three", "a trio of", "3")}
_SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_TEXTURES = {
    "solid": ("solid", "filled", "plain"),
    "striped": ("striped", "stripy"),
    "hollow": ("hollow", "outlined", "unfilled"),
}
_SHAPES = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "heart": ("heart",),
}
_COLORS = {"purple": ("purple", "violet")}
_ALONE = ("{a}", "{a}", "there {is_a} {a}", "a picture of {a}", "an image showing {a}", "we see {a}")
_BESIDE = (
    "{a} to the left of {b}",
    "{a} left of {b}",
    "{b} to the right of {a}",
    "{b} right of {a}",
    "{a} on the left and {b} on the right",
    "on the left {a}, on the right {b}",
    "to the left of {b} there {is_a} {a}",
)
_STACKED = (
    "{a} above {b}",
    "{a} over {b}",
    "{b} below {a}",
    "{b} underneath {a}",
    "{a} at the top and {b} at the bottom",
    "at the top {a}, at the bottom {b}",
    "below {a} there {is_b} {b}",
)
_TEMPLATES = {"": _ALONE, LEFT: _BESIDE, ABOVE: _STACKED}


def captions(scene: Scene, rng: random.Random, count: int = CAPTIONS_PER_SCENE) -> list[str]:
    """`count` different captions of a scene."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_caption(scene, rng)] = None
    return list(found)


def _caption(scene: Scene, rng: random.Random) -> str:
    words = {}
    for name, group in zip("ab", scene.groups, strict=False):
        words[name] = _phrase(group, rng)
        words[f"is_{name}"] = "is" if group.count == 1 else "are"
    return pick(rng, _TEMPLATES[scene.relation]).format(**words)


def _phrase(group: Group, rng: random.Random) -> str:
    count = pick(rng, _COUNTS[group.count])
    size, texture = pick(rng, _SIZES[group.size]), pick(rng, _TEXTURES[group.texture])
    color = pick(rng, _COLORS.get(group.color, (group.color,)))
    return " ".join([count, size, texture, color, _plural(pick(rng, _SHAPES[group.shape]), group.count)])


def _plural(noun: str, count: int) -> str:
    if count == 1:
        return noun
    return noun + ("es" if noun.endswith(("s", "x")) else "s")
