"""Scenes: one or two groups of equal shapes and how they stand to each other; drawn at random, and swapped."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

COUNTS = (1, 2, 3)
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "hollow")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
ATTRIBUTES = ("count", "size", "texture", "color", "shape")
# Where the first group stands, seen from the second; the opposite is the same scene told the other way round.
LEFT, ABOVE = "left of", "above"

# Every colour once and every shape: each is seen in training, these pairs are not.
HELD_OUT = frozenset(
    {
        ("red", "square"),
        ("orange", "star"),
        ("yellow", "heart"),
        ("green", "circle"),
        ("blue", "triangle"),
        ("purple", "cross"),
        ("pink", "square"),
        ("brown", "circle"),
    }
)
_SINGLE_SHARE = 0.15

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Group:
    """Some equal shapes."""

    count: int
    size: str
    texture: str
    color: str
    shape: str

    @property
    def held_out(self) -> bool:
        """Whether this pair of colour and shape is kept from training."""
        return (self.color, self.shape) in HELD_OUT


@dataclass(frozen=True, order=True)
class Scene:
    """`groups[0]` stands `relation` (left of, above) `groups[1]`; a single group has the relation "".

    Two scenes are equal exactly when the same descriptions are true of both.
    """

    relation: str
    groups: tuple[Group, ...]

    @property
    def held_out(self) -> bool:
        """Whether a colour-shape pair of the scene is kept from training."""
        return any(group.held_out for group in self.groups)

    def to_dict(self) -> dict:
        """The scene as JSON values, as it stands in the caption table."""
        return {"relation": self.relation, "groups": [vars(group) for group in self.groups]}


def pick(rng: random.Random, choices: Sequence[T]) -> T:
    """From `random()` alone, whose stream Python keeps for a seed over its versions."""
    return choices[int(rng.random() * len(choices))]


def random_group(rng: random.Random) -> Group:
    """Every attribute at random, each value as likely as the next."""
    return Group(pick(rng, COUNTS), pick(rng, SIZES), pick(rng, TEXTURES), pick(rng, COLORS), pick(rng, SHAPES))


def random_scene(rng: random.Random, held_out: bool) -> Scene:
    """A scene with (test) or without (training) a held-out pair."""
    while True:
        single = rng.random() < _SINGLE_SHARE
        groups = (random_group(rng),) if single else (random_group(rng), random_group(rng))
        scene = Scene("" if single else pick(rng, (LEFT, ABOVE)), groups)
        if scene.held_out == held_out and len(set(groups)) == len(groups):
            return scene


def swap(scene: Scene, what: str) -> Scene | None:
    """The other half of a minimal pair: one attribute swapped between the groups, or (`relation`) the groups' places.

    Both halves have the same bag of attributes. None when a swap would change nothing, or the places alone.
    """
    first, second = scene.groups
    if what == "relation":
        return Scene(scene.relation, (second, first))
    a, b = getattr(first, what), getattr(second, what)
    if a == b:
        return None
    other = Scene(scene.relation, (replace(first, **{what: b}), replace(second, **{what: a})))
    # Where all else agrees, the swap is a change of places, and belongs to the relation.
    return None if other.groups == (second, first) else other
