"""Text of any script in pictures: the glyphs of a font that has them, lines no wider than asked, boxes never unsaid."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from data_tools.__main__ import main
from data_tools.format.writer import write_shard
from data_tools.media.lettering import Lettering, _has
from packing import ROOT, encoded, jpeg, picture

CHINESE = "\u4e00\u53ea\u72d7\u5728\u6d77\u6ee9\u4e0a\u5954\u8dd1"  # a dog runs on the beach
RUSSIAN = "\u0421\u043e\u0431\u0430\u043a\u0430 \u0431\u0435\u0436\u0438\u0442"
NOWHERE = "\U00012345\U00012346"  # cuneiform


def drawn(text: str, letters: Lettering) -> np.ndarray:
    page = Image.new("L", (300, 30), 255)
    letters.draw(ImageDraw.Draw(page), (4, 4), text)
    return np.asarray(page)


@pytest.fixture(scope="module")
def noto():
    return os.path.join(os.path.dirname(find_spec("noto_cjk_sans_otc").origin), "NotoSansCJK-Regular.ttc")


def test_chinese_has_the_glyphs_of_its_font(noto, monkeypatch):
    """Drawn by Pillow alone in the face for simplified Chinese: the same pixels."""
    monkeypatch.setattr("data_tools.media.lettering._of_the_system", lambda characters: ())
    monkeypatch.setattr("data_tools.media.lettering._candidates", lambda text: _package(text))
    letters = Lettering(14)
    page = Image.new("L", (300, 30), 255)
    ImageDraw.Draw(page).text((4, 18), CHINESE, "black", ImageFont.truetype(noto, 14, 2), anchor="ls")
    assert np.array_equal(drawn(CHINESE, letters), np.asarray(page))
    assert letters.complaint() is None


def _package(text: str):
    from data_tools.media.lettering import _of_the_package

    return _of_the_package(text)


@pytest.mark.parametrize("text", [CHINESE, RUSSIAN])
def test_no_two_characters_are_the_same_box(text):
    """Where a font was found; else it is said. Boxes would all be alike."""
    letters = Lettering(14)
    shapes = {drawn(character, letters).tobytes() for character in set(text) - {" "}}
    if letters.complaint() is None:
        assert len(shapes) == len(set(text) - {" "})
    else:
        assert len(shapes) < len(set(text))


def test_what_no_font_has_is_named():
    letters = Lettering(14)
    letters.wrap(f"a {NOWHERE} b", 100, 2)
    drawn(NOWHERE, letters)
    assert letters.missing == set(NOWHERE)
    assert "U+12345" in letters.complaint()
    assert "remedy" in letters.complaint()


def test_plain_text_needs_no_other_font(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert Lettering(12).wrap("a dog, running: 100 %", 300, 1) == ["a dog, running: 100 %"]


def test_the_coverage_of_a_font_is_its_own():
    font = ImageFont.load_default(14)
    assert _has(font, "a")
    assert not _has(font, CHINESE[0])
    assert not _has(font, NOWHERE[0])


@pytest.mark.parametrize("text", ["one two three four five six seven " * 3, CHINESE * 8, "x" * 200, "a" * 30 + CHINESE])
def test_lines_keep_their_width_and_number(text):
    letters = Lettering(12)
    for lines in (1, 3, 50):
        found = letters.wrap(text, 120, lines)
        assert len(found) <= lines
        assert all(letters.width(line) <= 120 for line in found)
        whole = "".join(found).replace(" ", "") == text.replace(" ", "")
        assert whole if lines == 50 else lines > 1 or not whole
        assert whole or found[-1].endswith(" ...")
    assert letters.wrap(" \n ", 120, 3) == []


def test_control_characters_are_not_drawn():
    assert Lettering(12).wrap("a\x1b[31mb\u202ec\td\ud800e", 300, 1) == ["a [31mb c d e"]


def test_a_machine_without_fontconfig_draws_and_says_so(tmp_path):
    write_shard(tmp_path / "a.tar", [("a", {"jpg": jpeg(), "txt": NOWHERE.encode()})])
    command = [sys.executable, "-m", "data_tools", "preview", str(tmp_path / "a.tar"), str(tmp_path / "p.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PATH": str(tmp_path)}, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "U+12345" in done.stderr
    assert done.stderr.count("\n") == 1


# ---- the preview ----------------------------------------------------------------------------------------------------


def test_the_page_has_title_keys_counts_classes_and_faults(tmp_path, capsys):
    folder = tmp_path / "photos"
    for label in ("daisy", "<rose>"):
        (folder / label).mkdir(parents=True)
        for number in range(3):
            (folder / label / f"{number}.jpg").write_bytes(jpeg(number))
            (folder / label / f"{number}.json").write_text('{"captions": ["one", "two"]}')
    assert main(["pack", str(folder), str(tmp_path / "shards"), "--labels", "folder", "--workers", "1"]) == 0
    for name in ("p.png", "p.html"):
        assert main(["preview", str(tmp_path / "shards"), str(tmp_path / name), "--count", "5"]) == 0
    page = (tmp_path / "p.html").read_text()
    assert f"<h1>{tmp_path / 'shards'}</h1>" in page
    assert "5 of 6 samples (seed 0) of 1 shard; 10 captions; 2 classes, here " in page
    assert "<b>&lt;rose&gt;</b>" in page
    assert "<b>daisy</b>" in page
    assert page.count("<li>one</li><li>two</li>") == 5
    assert page.count("<small>") == 5
    assert Image.open(tmp_path / "p.png").size[0] > 5 * 224


def test_bad_samples_stand_on_the_page_with_the_reason(tmp_path, capsys):
    from PIL.PngImagePlugin import PngInfo

    bomb = PngInfo()
    bomb.add_itxt("Comment", "x" * (2 << 20), zip=True)
    samples = {
        "bomb": {"png": encoded(picture(), "PNG", pnginfo=bomb), "txt": b"a"},
        "cut": {"jpg": jpeg()[:-200], "txt": b"b"},
        "good": {"jpg": jpeg(), "txt": b"c"},
        "none": {"txt": b"d"},
        "surrogate": {"jpg": jpeg(), "json": b'{"captions": "\\ud800"}'},
        "utf16": {"jpg": jpeg(), "txt": b"\xff\xfea\0"},
    }
    write_shard(tmp_path / "a.tar", sorted(samples.items()))
    for name in ("p.png", "p.html"):
        assert main(["preview", str(tmp_path / "a.tar"), str(tmp_path / name)]) == 0
    page = (tmp_path / "p.html").read_text()
    assert "4 that training would replace" in page
    for text in (
        "undecodable: ValueError",
        "undecodable: OSError",
        "no_image",
        "bad_text",
        "<li>c</li>",
    ):
        assert text in page


def test_pictures_stand_upright_on_the_page(tmp_path, capsys):
    import base64
    import re

    write_shard(tmp_path / "a.tar", [("a", {"jpg": jpeg(1, orientation=6), "txt": b"a"})])
    assert main(["preview", str(tmp_path / "a.tar"), str(tmp_path / "p.html")]) == 0
    data = re.search(r"base64,([^\"]+)", (tmp_path / "p.html").read_text())[1]
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.width < image.height  # 40 x 30 as it is stored


def test_the_picture_of_retrieval_names_what_it_cannot_draw(tmp_path, capsys):
    import torch

    from data_tools.corpus import open_corpus
    from pretrain.evaluate.features import CorpusFeatures
    from pretrain.evaluate.picture import write_retrieval_picture

    texts = [NOWHERE, RUSSIAN, "a dog"]
    write_shard(tmp_path / "a.tar", [(f"{n}", {"jpg": jpeg(n), "txt": text.encode()}) for n, text in enumerate(texts)])
    features = CorpusFeatures(torch.eye(3), torch.eye(3), torch.arange(3))
    write_retrieval_picture(tmp_path / "p.png", features, open_corpus(tmp_path / "a.tar"), queries=3)
    said = capsys.readouterr().err
    assert "U+12345" in said
    assert "U+0421" not in said
