"""What the losses cost, FLOPs counted and tiles bounded; what they say of simple batches; where their scale starts."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import tiny
from plain_losses import OF_PAIRS, of_pairs
from pretrain.objectives import OBJECTIVES, InfoNCEConfig, MarginConfig, SigmoidConfig, tiles
from pretrain.objectives.infonce import infonce
from pretrain.objectives.multi_positive import multi_positive
from pretrain.objectives.objective import build
from pretrain.towers.build import MAX_LOGIT_SCALE
from pretrain.towers.logits import set_logits, start_logits, warn_of_bias


def features(pairs, dim):
    g = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(pairs, dim, generator=g), dim=-1).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("name", OF_PAIRS)
def test_flops(name):
    """A sweep forward and a sweep backward of three products; with the hardest negatives alone no sweep backward."""
    pairs, dim = 512, 64
    image, text = features(pairs, dim)
    identity = torch.arange(2 * pairs).view(pairs, 2)
    with FlopCounterMode(display=False) as counter:
        of_pairs(OF_PAIRS[name], image, text, torch.tensor([14.0]), torch.zeros(1), identity).backward()
    assert counter.get_total_flops() == (2 if "hardest" in name else 8) * pairs**2 * dim


def test_a_batch_without_repeats_has_one_positive_each():
    image, text = features(64, 16)
    scale, identity = torch.tensor([20.0]), torch.arange(128).view(64, 2)
    assert multi_positive(image, text, scale, identity).item() == pytest.approx(infonce(image, text, scale).item())


def test_the_hardest_of_equal_negatives_is_the_first():
    image = torch.eye(4)[[0, 1, 1, 1]].requires_grad_()
    text = torch.eye(4)[[1, 1, 1, 1]].requires_grad_()
    of_pairs(MarginConfig(margin=0.5, negatives="hardest"), image, text, torch.ones(1)).backward()
    # Images 1 to 3 are as near to every text: 1 is the negative of three, and 2 that of the text of 1 itself.
    assert image.grad[:, 1].tolist() == pytest.approx([-1 / 8, 1 / 4, 0, -1 / 8])


@pytest.mark.parametrize("name", OF_PAIRS)
def test_one_pair_has_no_negatives(name):
    image, text = features(1, 8)
    rest = torch.tensor([10.0]), torch.zeros(1), torch.zeros(1, 2, dtype=torch.long)
    loss = of_pairs(OF_PAIRS[name], image, text, *rest)
    loss.backward()
    assert loss.isfinite()
    assert image.grad.isfinite().all()


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_a_number_shows_in_the_loss(name, side):
    pair = [value.detach() for value in features(130, 8)]
    pair[side][100] = math.nan
    rest = torch.tensor([10.0]), torch.zeros(1), torch.arange(260).view(130, 2)
    assert of_pairs(OF_PAIRS[name], *pair, *rest).isnan()


def test_the_bias_starts_where_one_answer_in_the_batch_is_yes():
    model = tiny.build(init_logit_bias=-10.0)
    start_logits(model, {"a": SigmoidConfig()}, 512)
    assert model.clip.logit_bias.item() == pytest.approx(-math.log(512))
    assert model.clip.logit_scale.exp().item() == pytest.approx(10)
    set_logits(model, {"a": SigmoidConfig(logit_bias=-10, temperature=0.05)})
    assert (model.clip.logit_bias.item(), model.clip.logit_scale.exp().item()) == pytest.approx((-10, 20))
    of_its_own = tiny.build(init_logit_bias=-10.0, init_logit_scale=math.log(30))
    start_logits(of_its_own, {"a": SigmoidConfig()}, 512)
    assert of_its_own.clip.logit_scale.exp().item() == pytest.approx(30)


def test_a_bias_that_does_not_suit_the_batch_is_doubted():
    assert warn_of_bias({"a": SigmoidConfig()}, 512) is None
    far = {"b": InfoNCEConfig(), "a": SigmoidConfig(logit_bias=-10)}
    assert warn_of_bias(far, 32768) is None
    assert "suits a global batch of 22,026, this one is 512" in warn_of_bias(far, 512)


@pytest.mark.parametrize(
    ("losses", "scale_learns", "bias_learns"),
    [
        ([InfoNCEConfig()], True, False),
        ([InfoNCEConfig(learn_temperature=False)], False, False),
        ([SigmoidConfig()], True, True),
        ([SigmoidConfig(learn_temperature=False)], False, True),
        ([MarginConfig()], False, False),
        ([MarginConfig(), InfoNCEConfig()], True, False),
        ([InfoNCEConfig(learn_temperature=False), SigmoidConfig(learn_temperature=False)], False, True),
    ],
)
def test_what_no_loss_uses_is_frozen(losses, scale_learns, bias_learns):
    model = tiny.build(init_logit_bias=-10.0)
    start_logits(model, {loss.type: loss for loss in losses}, 64)
    assert (model.clip.logit_scale.requires_grad, model.clip.logit_bias.requires_grad) == (scale_learns, bias_learns)


def test_the_highest_temperature_allowed_is_the_cap():
    model = tiny.build()
    start_logits(model, {"b": MarginConfig(), "a": InfoNCEConfig(temperature=0.01)}, 64)
    assert model.clip.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)


def test_tiles_cover_all_columns_once_and_stay_small():
    for rows, columns in ((1, 1), (3, 700), (4096, 4096), (2**20, 2**20)):
        slices = list(tiles.column_tiles(rows, columns))
        assert [s.start for s in slices[1:]] == [s.stop for s in slices[:-1]]
        assert (slices[0].start, slices[-1].stop) == (0, columns)
        assert all((s.stop - s.start) <= max(64, tiles.TILE_ELEMENTS // rows) for s in slices)


def test_identical_pairs_give_the_log_of_the_batch():
    """A collapsed model knows nothing: its loss is ln B."""
    same = F.normalize(torch.ones(32, 8), dim=-1)
    loss = infonce(same, same, torch.tensor([50.0]))
    assert abs(loss.item() - torch.log(torch.tensor(32.0)).item()) < 1e-5


def test_an_objective_that_mines_is_told_its_name(monkeypatch):
    """It is in the names of the fields that it gets."""

    class Mining:
        reads = frozenset()

        def __init__(self, settings, name):
            self.name = name

        def mine(self, rows, facts, draw):
            return {}

    monkeypatch.setitem(OBJECTIVES, "margin", SimpleNamespace(load=lambda: Mining))
    made = build({"itm": MarginConfig(weight=2.0), "infonce": InfoNCEConfig()})
    assert made["itm"].objective.name == "itm"
    assert [weighted.weight for weighted in made.values()] == [2.0, 1.0]
