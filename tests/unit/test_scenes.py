"""The generated corpus: deterministic, split as promised, captions that fit and tell all, shortcuts' ceilings."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_tools.__main__ import main
from data_tools.scenes import captions as grammar
from data_tools.scenes.captions import captions
from data_tools.scenes.corpus import KINDS, Amounts, minimal_pairs, test_scenes, train_scenes
from data_tools.scenes.render import SIDE, render
from data_tools.scenes.scene import (
    ABOVE,
    ATTRIBUTES,
    COLORS,
    COUNTS,
    HELD_OUT,
    LEFT,
    SHAPES,
    SIZES,
    TEXTURES,
    Group,
    Scene,
    random_scene,
    swap,
)
from data_tools.scenes.shortcuts import bag_of_attributes, ceilings, colors, pair_accuracy, recall_at_1, shapes
from packing import contents

test_scenes.__test__ = False
AMOUNTS = Amounts(train=3000, test=500, pairs=120, class_train=2, class_test=2, seed=5)
RED_CIRCLE = Group(1, "large", "solid", "red", "circle")
BLUE_STARS = Group(3, "small", "striped", "blue", "star")


def pairs_in(scenes) -> set:
    return {(group.color, group.shape) for scene in scenes for group in scene.groups}


def test_held_out_pairs_are_never_trained_on_and_always_tested():
    train, test = train_scenes(AMOUNTS), test_scenes(AMOUNTS)
    assert not pairs_in(train) & HELD_OUT
    assert pairs_in(train) == {(c, s) for c in COLORS for s in SHAPES} - HELD_OUT
    assert all(scene.held_out for scene in test)
    assert pairs_in(test) >= HELD_OUT
    for half in [half for pair in minimal_pairs(AMOUNTS) for half in pair[1:]]:
        assert half.held_out
    assert {color for color, _ in HELD_OUT} == set(COLORS)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)


def test_test_scenes_have_500_different_meanings():
    test = test_scenes(AMOUNTS)
    assert len(test) == len(set(test)) == 500
    assert {len(scene.groups) for scene in test} == {1, 2}
    mirrored = [Scene(scene.relation, scene.groups[::-1]) for scene in test if scene.relation]
    assert all(a != b for a, b in zip([s for s in test if s.relation], mirrored, strict=True))


def test_minimal_pairs_differ_in_one_respect_and_agree_in_their_bags():
    pairs = minimal_pairs(AMOUNTS)
    assert Counter(kind for kind, *_ in pairs) == dict.fromkeys(KINDS, 20)
    for kind, scene, other in pairs:
        assert scene != other
        assert bag_of_attributes(scene) == bag_of_attributes(other)
        if kind == "relation":
            assert other.groups == scene.groups[::-1]
        else:
            assert other.groups not in (scene.groups, scene.groups[::-1])
            changed = [a for a in ATTRIBUTES if getattr(scene.groups[0], a) != getattr(other.groups[0], a)]
            assert changed == [kind]


def test_swap_refuses_what_changes_nothing():
    scene = Scene(LEFT, (RED_CIRCLE, BLUE_STARS))
    assert swap(scene, "color").groups[0] == Group(1, "large", "solid", "blue", "circle")
    same = Scene(LEFT, (RED_CIRCLE, Group(3, "small", "striped", "red", "star")))
    assert swap(same, "color") is None
    only_color = Scene(LEFT, (RED_CIRCLE, Group(1, "large", "solid", "blue", "circle")))
    assert swap(only_color, "color") is None  # it would be a change of places


# What the sentences mean, read independently of how they are made: which letter stands first (left, above).
READINGS = {
    LEFT: [
        (r"(\w) (?:to the )?left of (\w)", 1),
        (r"(\w) (?:to the )?right of (\w)", 2),
        (r"(\w) on the left and (\w) on the right", 1),
        (r"on the left (\w), on the right (\w)", 1),
        (r"to the left of (\w) there is (\w)", 2),
    ],
    ABOVE: [
        (r"(\w) (?:above|over) (\w)", 1),
        (r"(\w) (?:below|underneath) (\w)", 2),
        (r"(\w) at the top and (\w) at the bottom", 1),
        (r"at the top (\w), at the bottom (\w)", 1),
        (r"below (\w) there is (\w)", 1),
    ],
}


@pytest.mark.parametrize("relation", [LEFT, ABOVE])
def test_every_sentence_says_which_group_stands_where(relation):
    for template in grammar._TEMPLATES[relation]:
        sentence = template.format(a="A", b="B", is_a="is", is_b="is")
        found = [re.fullmatch(reading, sentence) and re.fullmatch(reading, sentence)[place]
                 for reading, place in READINGS[relation]]  # fmt: skip
        assert [first for first in found if first] == ["A"], sentence


PLURALS = {
    **{"circle": "circles", "disc": "discs", "square": "squares", "box": "boxes", "triangle": "triangles"},
    **{"star": "stars", "cross": "crosses", "plus sign": "plus signs", "heart": "hearts"},
}


def test_every_phrase_tells_all_five_attributes():
    colors_of = {color: grammar._COLORS.get(color, (color,)) for color in COLORS}
    vocabularies = (grammar._COUNTS, grammar._SIZES, grammar._TEXTURES, colors_of, grammar._SHAPES)
    values = {name: value for words in vocabularies for value, names in words.items() for name in names}
    assert len(values) == sum(len(names) for words in vocabularies for names in words.values())
    words = [[name for names in words.values() for name in names] for words in vocabularies]
    patterns = [
        "|".join(sorted(names, key=len, reverse=True)) for names in (*words[:4], [*words[4], *PLURALS.values()])
    ]
    pattern = " ".join(f"({options})" for options in patterns)
    singular, rng = {plural: name for name, plural in PLURALS.items()}, random.Random(0)
    for group in itertools.product(COUNTS, SIZES, TEXTURES, COLORS, SHAPES):
        phrase = grammar._phrase(Group(*group), rng)
        match = re.fullmatch(pattern, phrase)
        assert match, phrase
        assert (match[5] in singular) == (group[0] > 1), phrase
        told = [*match.groups()[:4], singular.get(match[5], match[5])]
        assert tuple(values[word] for word in told) == group


def test_captions_are_different_and_fit_the_context():
    open_clip = pytest.importorskip("open_clip")
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    rng = random.Random(1)
    texts = []
    for number in range(400):
        found = captions(random_scene(rng, held_out=bool(number % 2)), rng)
        assert len(set(found)) == 4
        texts += found
    lengths = (tokenizer(texts) != 0).sum(1)
    assert int(lengths.max()) <= 40


def test_shortcuts_count_what_they_cannot_tell_apart():
    scene = Scene(LEFT, (RED_CIRCLE, BLUE_STARS))
    swapped, mirrored, stacked = swap(scene, "color"), swap(scene, "relation"), Scene(ABOVE, scene.groups)
    scenes = [scene, swapped, mirrored, stacked, Scene("", (RED_CIRCLE,))]
    assert recall_at_1(scenes, bag_of_attributes) == 3 / 5
    assert recall_at_1(scenes, colors) == recall_at_1(scenes, shapes) == 2 / 5
    assert recall_at_1(scenes, lambda scene: scene) == 1.0
    assert pair_accuracy([(scene, swapped), (scene, stacked)], bag_of_attributes) == 0.75
    limits = ceilings(test_scenes(AMOUNTS), [pair[1:] for pair in minimal_pairs(AMOUNTS)])
    assert limits["minimal_pairs"]["accuracy"] == {"bag_of_attributes": 0.5, "colors": 0.5, "shapes": 0.5}
    assert limits["test"]["recall_at_1"]["bag_of_attributes"] > 0.9
    assert limits["test"]["recall_at_1"]["colors"] < 0.2


def test_recall_of_a_shortcut_is_its_expectation():
    """Against playing the matcher: it picks at random among the scenes it cannot tell apart."""
    scenes, rng = test_scenes(AMOUNTS), np.random.default_rng(0)
    signatures = [colors(scene) for scene in scenes]
    hits = [np.mean([rng.choice([j for j, s in enumerate(signatures) if s == signature]) == i
                     for i, signature in enumerate(signatures)]) for _ in range(20)]  # fmt: skip
    assert abs(np.mean(hits) - recall_at_1(scenes, colors)) < 0.02


def ink(image: Image.Image) -> np.ndarray:
    """Where the picture differs from its background."""
    pixels = np.asarray(image, int)
    return np.abs(pixels - pixels[0, 0]).max(-1) > 60


@pytest.mark.parametrize("seed", range(8))
def test_groups_stand_where_the_relation_says(seed):
    groups = (Group(3, "large", "solid", "red", "square"), Group(2, "small", "solid", "blue", "heart"))
    for relation, axis in ((LEFT, 1), (ABOVE, 0)):
        pixels = np.asarray(render(Scene(relation, groups), random.Random(seed)), int)
        red, blue = pixels[..., 0] - pixels[..., 2], pixels[..., 2] - pixels[..., 0]
        assert np.argwhere(red > 100)[:, axis].max() < SIDE / 2 <= np.argwhere(blue > 100)[:, axis].min() + 1
    small = ink(render(Scene("", (Group(1, "small", "solid", "red", "square"),)), random.Random(seed))).sum()
    large = ink(render(Scene("", (Group(1, "large", "solid", "red", "square"),)), random.Random(seed))).sum()
    hollow = ink(render(Scene("", (Group(1, "large", "hollow", "red", "square"),)), random.Random(seed))).sum()
    three = ink(render(Scene("", (Group(3, "small", "solid", "red", "square"),)), random.Random(seed))).sum()
    assert small * 1.6 < large
    assert hollow < 0.75 * large
    assert 2.5 * small < three < 3.5 * small


def test_corpus_is_the_same_whatever_the_workers(tmp_path, capsys):
    options = ["--train", "260", "--test", "20", "--pairs", "6", "--class-train", "2", "--class-test", "1"]
    assert main(["scenes", str(tmp_path / "one"), *options, "--workers", "1"]) == 0
    assert main(["scenes", str(tmp_path / "two"), *options, "--workers", "2"]) == 0
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    assert main(["scenes", str(tmp_path / "other"), *options, "--seed", "1"]) == 0
    other = contents(tmp_path / "other")
    assert other.keys() == one.keys()
    assert sum(one[name] != other[name] for name in one) > 0.95 * len(one)
    rows = [json.loads(line) for line in one["minimal_pairs/captions.jsonl"].splitlines()]
    assert [(row["pair"], row["member"]) for row in rows] == [(k, m) for k in range(6) for m in (0, 1)]
    assert [row["kind"] for row in rows[::2]] == list(KINDS)
    for folder, count in (("train", 260), ("test", 20), ("minimal_pairs", 12)):
        rows = [json.loads(line) for line in one[f"{folder}/captions.jsonl"].splitlines()]
        assert len(rows) == count
        assert {f"{folder}/{row['image']}" for row in rows} == {n for n in one if n.startswith(f"{folder}/images/")}
    names = Counter(tuple(name.split("/")[1:3]) for name in one if name.startswith("classes/"))
    classes = [f"{texture} {color}" for texture in TEXTURES for color in COLORS]
    assert names == {**{("train", c): 2 for c in classes}, **{("test", c): 1 for c in classes}}
    assert json.loads(one["test/shortcuts.json"])["minimal_pairs"]["pairs"] == 6
    capsys.readouterr()


def test_corpus_is_resumed_kept_and_never_mixed(tmp_path, capsys):
    options = [
        "--train",
        "4",
        "--test",
        "2",
        "--pairs",
        "1",
        "--class-train",
        "1",
        "--class-test",
        "1",
        "--workers",
        "1",
    ]
    folder = tmp_path / "corpus"
    assert main(["scenes", str(folder), *options]) == 0
    before = contents(folder)
    image = folder / "train/images/train-000001.jpg"
    stamp = image.stat().st_mtime_ns
    assert main(["scenes", str(folder), *options]) == 0
    assert image.stat().st_mtime_ns == stamp
    record = folder / "scenes.json"
    record.write_text(record.read_text().replace("true", "false"))  # as an interrupted run leaves it
    image.write_bytes(b"half")
    assert main(["scenes", str(folder), *options]) == 0
    assert contents(folder) == before
    assert main(["scenes", str(folder), *options, "--seed", "9"]) == 1
    assert "is in use" in capsys.readouterr().err
    assert contents(folder) == before
    assert main(["scenes", str(folder), "--train", "0"]) == 2
