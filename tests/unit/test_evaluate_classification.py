"""Zero-shot classification against a dense reference; templates and class files."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from data_tools.errors import UserError
from evaluate_fakes import FakeBench, FakeTowers, fake_tokenize
from pretrain.evaluate import ClassificationConfig, RetrievalConfig, classification
from pretrain.evaluate.classification import ClassCounts, Classification, class_embeddings
from pretrain.evaluate.retrieval import Retrieval
from pretrain.evaluate.templates import load_classes, load_templates

CLASSES = ("cat", "dog", "red bus", "tree", "house", "street", "sea")
TEMPLATES = ("a photo of a {c}.", "{c}", "the {c} in a {c}")


@pytest.fixture
def zero_shot(tmp_path):
    """Evaluates towers on images 0, 1, ... whose labels go round the classes, with the templates above."""
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    settings = ClassificationConfig(data="x", templates=str(tmp_path / "templates.txt"))
    return lambda towers, images, labels, names=CLASSES: Classification(
        settings, FakeBench(images, 8, None, labels, names)
    )(towers)


def _scored(head: torch.Tensor, names=(), **labels):
    """A classifier's evaluation on 60 images, whose scores are a function of the image, and those scores."""

    def scores(images):
        return images[:, :, 0, 0].float() % 5 @ head

    bench = FakeBench(60, 8, labels=labels["labels"], names=names, classes=CLASSES)
    forward = lambda inputs, want: {"local": {"classes": scores(inputs["image"]["pixels"])}}  # noqa: E731
    return Classification(ClassificationConfig(data="x"), bench)(forward), scores


def _dense_embeddings(towers: FakeTowers) -> torch.Tensor:
    rows = []
    for name in CLASSES:
        prompts = fake_tokenize([template.replace("{c}", name) for template in TEMPLATES])
        rows.append(F.normalize(F.normalize(towers.text[prompts[:, 0]], dim=1).mean(dim=0), dim=0))
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [2, 256])
def test_embeddings_are_renormalised_means_of_normalised_prompts(monkeypatch, chunk):
    monkeypatch.setattr(classification, "PROMPT_CHUNK", chunk)
    towers = FakeTowers()
    towers.text *= torch.linspace(0.5, 2, len(towers.text))[:, None]  # lengths must not weigh
    found = class_embeddings(FakeBench(), towers, CLASSES, TEMPLATES)
    torch.testing.assert_close(found, _dense_embeddings(towers), atol=1e-6, rtol=0)


def test_accuracies_equal_a_dense_reference(zero_shot):
    towers = FakeTowers()
    outcome = zero_shot(towers, 60, 7)
    scores = towers.image[:60].double() @ _dense_embeddings(towers).double().T
    labels = torch.arange(60) % 7
    order = scores.argsort(dim=1, descending=True)
    right = order == labels[:, None]
    per_class = [right[labels == c, 0].double().mean().item() for c in range(7)]
    assert outcome.metrics == pytest.approx(
        {
            "top1": right[:, 0].double().mean().item(),
            "top5": right[:, :5].any(dim=1).double().mean().item(),
            "mean_per_class": sum(per_class) / 7,
        }
    )
    assert [row["accuracy"] for row in outcome.breakdown] == pytest.approx(per_class)
    assert [row["n"] for row in outcome.breakdown] == [9, 9, 9, 9, 8, 8, 8]
    assert outcome.counts == {"images": 60, "classes": 7, "templates": 3}
    assert outcome.chance == pytest.approx({"top1": 1 / 7, "top5": 5 / 7, "mean_per_class": 1 / 7})
    assert 0 < outcome.metrics["top1"] < outcome.metrics["top5"] < 1


def test_a_classifier_reports_its_own_cross_entropy():
    """As training computes it, on every image once; chance is that of equal scores."""
    head = torch.linspace(-2, 2, 3 * 7).reshape(3, 7)
    outcome, scores = _scored(head, labels=7)
    images = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)
    want = F.cross_entropy(scores(images).double(), torch.arange(60) % 7).item()
    assert outcome.metrics["validation_loss"] == pytest.approx(want, abs=1e-9)
    assert outcome.chance["validation_loss"] == pytest.approx(math.log(7))
    outcome, _ = _scored(head, CLASSES[::-1], labels=7)  # the corpus has the names the other way round
    want = F.cross_entropy(scores(images).double(), 6 - torch.arange(60) % 7).item()
    assert outcome.metrics["validation_loss"] == pytest.approx(want, abs=1e-9)
    with pytest.raises(UserError, match="label that is no class"):
        _scored(head, labels=8)


def test_top5_is_left_out_up_to_five_classes(zero_shot):
    outcome = zero_shot(FakeTowers(), 20, 5, CLASSES[:5])
    assert set(outcome.metrics) == set(outcome.chance) == {"top1", "mean_per_class"}


def test_a_collapsed_model_gets_one_over_the_classes(zero_shot):
    towers = FakeTowers()
    towers.image[:], towers.text[:] = towers.image[0], towers.text[0]
    metrics = zero_shot(towers, 20, 7).metrics
    assert metrics == pytest.approx({"top1": 1 / 7, "top5": 5 / 7, "mean_per_class": 1 / 7})


def test_classes_without_images_have_no_accuracy_and_do_not_enter_the_mean():
    counts = ClassCounts.zeros(3, torch.device("cpu"))
    counts.add_scores(torch.eye(3)[:2], torch.tensor([0, 0]))
    assert counts.metrics() == {"top1": 0.5, "mean_per_class": 0.5}
    assert [row["accuracy"] for row in counts.per_class("abc")] == [0.5, None, None]


def test_wrong_labels_and_broken_features_are_refused():
    counts = ClassCounts.zeros(2, torch.device("cpu"))
    counts.add_scores(torch.eye(2), torch.tensor([0, 2]))
    with pytest.raises(UserError, match="1 images have a label that is no class"):
        counts.merge(1)
    counts = ClassCounts.zeros(2, torch.device("cpu"))
    counts.add_scores(torch.full((1, 2), float("nan")), torch.tensor([0]))
    with pytest.raises(UserError, match="not finite"):
        counts.merge(1)


def test_labels_and_class_names_are_needed_when_it_is_built():
    for labels, names, message in ((None, CLASSES, "has no labels"), (7, ("cat",), "needs class names")):
        with pytest.raises(UserError, match=message):
            Classification(ClassificationConfig(data="x"), FakeBench(9, 4, None, labels, names))


def test_a_fine_tuned_classifier_has_no_prompts_and_no_captions():
    bench = FakeBench(9, 4, labels=7, classes=CLASSES)
    with pytest.raises(UserError, match=r"no prompts.*got openai"):
        Classification(ClassificationConfig(data="x", templates="openai"), bench)
    with pytest.raises(UserError, match="cannot be asked for retrieval; expected classification"):
        Retrieval(RetrievalConfig(data="x"), bench)


def test_named_templates_are_open_clips():
    assert load_templates("photo") == ("a photo of a {c}.",)
    assert len(load_templates("simple")) == 7
    assert len(load_templates("openai")) == 80
    assert "a bad photo of a {c}." in load_templates("openai")


def test_template_and_class_files(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("a {c}\n\n  the {c}, a {c}  \n")
    assert load_templates(str(file)) == ("a {c}", "the {c}, a {c}")
    file.write_text("a {c}\na photo\n")
    with pytest.raises(UserError, match="line 2"):
        load_templates(str(file))
    file.write_text("\n")
    with pytest.raises(UserError, match="empty"):
        load_templates(str(file))
    with pytest.raises(UserError, match="empty"):
        load_classes(file)
    with pytest.raises(UserError, match="photo, simple, openai or a file"):
        load_templates("fancy")
    file.write_text("cat\nred bus\n")
    assert load_classes(file) == ("cat", "red bus")


def test_every_line_of_a_class_file_is_one_class(tmp_path):
    """A mark in front, other line ends and characters that `str.splitlines` cuts at would shift the labels."""
    file = tmp_path / "list.txt"
    names = ("caf\u00e9", "a\u2028b", "c\x85d", "e\x0cf")
    for end in ("\n", "\r\n", "\r"):
        file.write_bytes((end.join(names) + end * 3).encode("utf-8-sig"))
        assert load_classes(file) == names
    for text, line in (("cat\n\ndog\n", 2), ("\ncat\n", 1), ("cat\ndog\n  \ncow\n", 3)):
        file.write_text(text)
        with pytest.raises(UserError, match=rf"list.txt, line {line}: no class name; got a blank line"):
            load_classes(file)
