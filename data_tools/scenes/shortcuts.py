"""How far a shortcut gets: the best score of a matcher that sees part of a scene, from the descriptions alone.

A matcher that tells scenes apart by a signature can do no better than to pick at random among the scenes of equal
signature, so its expected recall at 1 is the number of different signatures over the number of scenes.
"""

from collections.abc import Callable, Hashable, Sequence

from data_tools.scenes.scene import ATTRIBUTES, Scene


def bag_of_attributes(scene: Scene) -> Hashable:
    """All that is said, but not of which group: the values of each attribute, and whether side by side or stacked."""
    return scene.relation, tuple(_values(scene, attribute) for attribute in ATTRIBUTES)


def colors(scene: Scene) -> Hashable:
    """The colours alone, without their groups."""
    return _values(scene, "color")


def shapes(scene: Scene) -> Hashable:
    """The shapes alone, without their groups."""
    return _values(scene, "shape")


SHORTCUTS: dict[str, Callable[[Scene], Hashable]] = {
    "bag_of_attributes": bag_of_attributes,
    "colors": colors,
    "shapes": shapes,
}


def recall_at_1(scenes: Sequence[Scene], signature: Callable[[Scene], Hashable]) -> float:
    """Expected recall at 1, both ways, of the matcher that knows `signature`."""
    return len({signature(scene) for scene in scenes}) / len(scenes)


def pair_accuracy(pairs: Sequence[tuple[Scene, Scene]], signature: Callable[[Scene], Hashable]) -> float:
    """Expected accuracy on minimal pairs: certain where the signatures differ, a coin's toss where they agree."""
    return sum(0.5 if signature(a) == signature(b) else 1.0 for a, b in pairs) / len(pairs)


def ceilings(test: Sequence[Scene], pairs: Sequence[tuple[Scene, Scene]]) -> dict:
    """The ceilings of all shortcuts, as written to `test/shortcuts.json`."""
    return {
        "test": {
            "scenes": len(test),
            "recall_at_1": {name: recall_at_1(test, signature) for name, signature in SHORTCUTS.items()},
        },
        "minimal_pairs": {
            "pairs": len(pairs),
            "accuracy": {name: pair_accuracy(pairs, signature) for name, signature in SHORTCUTS.items()},
        },
    }


def _values(scene: Scene, attribute: str) -> tuple:
    return tuple(sorted(getattr(group, attribute) for group in scene.groups))
