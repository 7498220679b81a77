"""Awkward captions and pictures: which client computes what the trainer does, and what the model card says of it."""

from __future__ import annotations

import re

import numpy as np
import open_clip
import pytest
from PIL import ExifTags, Image
from transformers import CLIPTokenizer

import classifier_run
import tiny
from data_tools.errors import UserError
from data_tools.media import decode
from data_tools.media.decode import decode_rgb
from packing import encoded
from pretrain.export import probes
from pretrain.export.writer import export_model


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "out"
    export_model(tiny.build(), folder)
    return folder


@pytest.fixture(scope="module")
def card(export):
    return (export / "README.md").read_text()


def test_the_card_names_the_inputs_on_which_clients_differ(card):
    found = {
        (c, kind): float(cosine) for c, kind, cosine in re.findall(r"^\| (\w+), ([^|]+) \| ([\d.-]+) \|$", card, re.M)
    }
    of = {name: {kind for client, kind in found if client == name} for name in ("open_clip", "transformers")}
    texts = {"HTML entities", "typographic quotes", "ligatures", "full- and half-width forms", "invisible characters"}
    assert texts <= of["transformers"]
    assert not texts & of["open_clip"]
    for client in of:
        assert {"16-bit grey", "EXIF orientation", "alpha"} <= of[client]
        assert found[client, "16-bit grey"] < 0.98
    assert not {"colour", "grey", "CMYK", "plain captions", "other scripts"} & (of["open_clip"] | of["transformers"])


def noise(mode: str = "RGBA") -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (21, 34, 4), dtype=np.uint8)).convert(mode)


def awkward() -> dict[str, bytes]:
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 5
    grey = np.random.default_rng(4).integers(0, 65536, (21, 34)).astype(np.uint16)
    return {
        "alpha": encoded(noise(), "WEBP", lossless=True, exact=True),
        "grey with alpha": encoded(noise("LA"), "PNG"),
        "palette": encoded(noise("RGB").quantize(99), "GIF", transparency=4),
        "turned": encoded(noise("RGB"), "PNG", exif=turned),
        "16-bit grey": encoded(Image.fromarray(grey), "PNG"),
        "16-bit grey, turned": encoded(Image.fromarray(grey), "PNG", exif=turned),
    }


@pytest.mark.parametrize("kind", awkward())
def test_the_cards_lines_make_a_picture_what_training_sees(card, tmp_path, kind):
    (lines,) = [code for code in re.findall(r"```python\n(.*?)```", card, re.S) if "exif_transpose" in code]
    (tmp_path / "picture").write_bytes(awkward()[kind])
    names = {"path": tmp_path / "picture"}
    exec(lines, names)
    assert np.array_equal(np.asarray(names["image"]), decode_rgb(awkward()[kind]))


def test_the_cards_lines_make_a_caption_what_training_sees(card, export):
    (line,) = [code for code in re.findall(r"```python\n(.*?)```", card, re.S) if "fix_text" in code]
    theirs, mine = CLIPTokenizer.from_pretrained(export), open_clip.SimpleTokenizer(context_length=16)
    for raw in (
        "\uff36\uff29\uff30 \u201cclub\u201d",
        "r&eacute;sum&eacute; &amp;lt;",
        "\ufb03n \ufb06op",
        "a\u00c3\u00b1o\x07",
    ):
        names = {"text": raw}
        exec(line, names)
        ids = theirs(names["text"], truncation=True).input_ids
        assert ids == mine([raw])[0].tolist()[: len(ids)]
        assert ids != theirs(raw, truncation=True).input_ids


def test_a_classifiers_clients_differ_on_pictures_alone(tmp_path):
    export_model(classifier_run.build(), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    found = set(re.findall(r"^\| (\w+, [^|]+) \| [\d.-]+ \|$", card, re.M))
    assert found == {"timm, EXIF orientation", "timm, 16-bit grey", "transformers, 16-bit grey"}
    assert "fix_text" not in card


def test_what_is_not_known_to_differ_must_not(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "_TEXTS_DIFFER", {})
    with pytest.raises(UserError, match="computes other features than the model; got transformers, HTML entities"):
        export_model(tiny.build(), tmp_path / "out")
    monkeypatch.undo()
    white = Image.new("RGBA", (1, 1), "white")

    def on_white(image):
        image = image.convert("RGBA")
        return Image.alpha_composite(white.resize(image.size), image).convert("RGB")

    monkeypatch.setattr(decode, "to_rgb", on_white)
    with pytest.raises(UserError, match="got open_clip, pictures: palette with transparency"):
        export_model(tiny.build(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
