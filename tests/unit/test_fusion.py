"""The fusion head on made-up tokens: what masks hide has no say, and pairings are judged as they are alone."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data_tools.errors import UserError
from pretrain.towers.heads import FusionConfig
from pretrain.towers.heads.fusion import Fusion

MODEL = SimpleNamespace(width=lambda encoder: {"image": 24, "text": 16}[encoder])


def head(layers=2, width=None, heads=None):
    torch.manual_seed(0)
    return Fusion(FusionConfig(layers=layers, width=width, heads=heads), MODEL)


def tokens(n, length, width, seed, lengths=None):
    values = torch.randn(n, length, width, generator=torch.Generator().manual_seed(seed))
    lengths = torch.full((n,), length) if lengths is None else torch.tensor(lengths)
    return {"values": values, "mask": torch.arange(length)[None] < lengths[:, None]}


def judged(fusion, inputs=None, **fields):
    """What it gives of the tokens of `fields`, without a graph; `text_itm` is `text#itm`."""
    with torch.no_grad():
        return fusion(given(**fields), inputs or {})


def given(**fields):
    return {"local": {"tokens": {field.replace("_", "#"): own for field, own in fields.items()}}}


IMAGE = tokens(3, 5, 24, 1)
TEXT = tokens(3, 7, 16, 2, lengths=[7, 3, 1])


def test_one_logit_for_every_pair():
    logits = head()(given(image=IMAGE, text=TEXT), {})
    assert list(logits) == ["image+text"]
    assert logits["image+text"].shape == (3,)
    assert logits["image+text"].dtype == torch.float32


def test_what_is_masked_has_no_say():
    fusion = head()
    plain = judged(fusion, image=IMAGE, text=TEXT)["image+text"]
    padded = {"values": F.pad(TEXT["values"], (0, 0, 0, 4)), "mask": F.pad(TEXT["mask"], (0, 4))}
    padded["values"] = padded["values"].masked_fill(~padded["mask"][..., None], 1e4)
    cropped = {"values": IMAGE["values"].clone(), "mask": IMAGE["mask"].clone()}
    assert judged(fusion, image=IMAGE, text=padded)["image+text"] == pytest.approx(plain, abs=1e-6)
    cropped["mask"][:, 3:] = False
    short = {name: value[:, :3] for name, value in IMAGE.items()}
    hidden, left_out = (judged(fusion, image=image, text=TEXT)["image+text"] for image in (cropped, short))
    assert hidden == pytest.approx(left_out, abs=1e-6)
    assert (hidden - plain).abs().min() > 1e-5  # but what is there has one


def test_mined_pairings_are_judged_as_alone():
    fusion = head()
    other_text, other_image = tokens(3, 16, 16, 3, lengths=[2, 9, 4]), tokens(3, 5, 24, 4)
    found = judged(fusion, image=IMAGE, text=TEXT, text_itm=other_text, image_itm=other_image)
    alone = {
        "image+text": (IMAGE, TEXT),
        "image+text#itm": (IMAGE, other_text),
        "image#itm+text": (other_image, TEXT),
    }
    assert set(found) == set(alone)
    for pairing, (image, text) in alone.items():
        assert found[pairing] == pytest.approx(judged(fusion, image=image, text=text)["image+text"], abs=1e-6)


def test_rows_are_paired_as_asked():
    fusion = head()
    rows = {"image": torch.tensor([2, 0, 0, 1]), "text": torch.tensor([1, 1, 2, 0])}
    found = judged(fusion, {"pairs": rows}, image=IMAGE, text=TEXT)["image+text"]
    for logit, i, t in zip(found, rows["image"], rows["text"], strict=True):
        image, text = ({name: value[row][None] for name, value in own.items()} for own, row in ((IMAGE, i), (TEXT, t)))
        alone = judged(fusion, image=image, text=text)["image+text"]
        assert logit.item() == pytest.approx(alone.item(), abs=1e-6)


def test_every_parameter_learns_and_an_absent_text_is_a_number():
    fusion = head(width=32, heads=4)
    nothing = {"values": TEXT["values"], "mask": torch.zeros_like(TEXT["mask"])}
    fusion(given(image=IMAGE, text=nothing), {})["image+text"].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fusion.parameters())
    fusion.zero_grad()
    fusion(given(image=IMAGE, text=TEXT), {})["image+text"].square().sum().backward()
    unused = {name for name, p in fusion.named_parameters() if not p.grad.abs().any()}
    assert unused == set()


def test_heads_share_the_width():
    assert head(width=96).layers[0].own.heads == 1
    assert head(width=192).layers[0].own.heads == 3
    assert head(width=200).layers[0].own.heads == 2
    with pytest.raises(UserError, match=r"heads\.fusion\.heads"):
        head(width=32, heads=5)
