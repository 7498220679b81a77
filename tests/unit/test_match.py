"""Mining hard negatives: which rows may be drawn, how often each is, and what the judgements of them cost."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from pretrain.objectives import MatchConfig, tiles
from pretrain.objectives.match import Match, negatives
from pretrain.objectives.tied import gumbel, halves, hashes, keys


def features(pairs, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(pairs, dim, generator=g), dim=-1) for _ in range(2)]


def facts_of(pairs, identity=None, present=None):
    identity = torch.arange(2 * pairs).view(pairs, 2) if identity is None else identity
    facts = {field: {"identity": identity[:, side]} for side, field in enumerate(("image", "text"))}
    if present is not None:
        facts["text"]["present"] = present
    return facts


def draws(pairs, seed=0):
    return lambda n: torch.rand(pairs, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mine(settings, image, text, facts, seed=0):
    found = Match(settings, "match").mine({"image": image, "text": text}, facts, draws(len(image), seed))
    return found["text"], found["image"]


def test_the_hash_is_splitmix64():
    first_of_seed_0 = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # as its authors' code prints them
    found = hashes(torch.tensor([0]), torch.tensor([1, 2, 3]))
    assert [bits % 2**64 for bits in found[0].tolist()] == first_of_seed_0
    assert [half.tolist() for half in halves(found[0, :1])] == [[0xE220A839], [0x7B1DCDAF]]


def test_keys_are_ordered_by_value_then_by_bits():
    values = torch.tensor([-math.inf, -2.0, -1.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 3.0, math.inf, math.nan])
    ordered = keys(values, torch.zeros(len(values), dtype=torch.int64)).tolist()
    assert ordered == sorted(ordered)
    assert len(set(ordered)) == len(ordered) - 1  # zero is zero
    low, high = keys(torch.tensor([0.5, 0.5]), torch.tensor([0, 2**32 - 1])).tolist()
    assert low < high < keys(torch.tensor([0.50001]), torch.tensor([0])).item()


def test_noise_is_gumbel_from_end_to_end():
    bits = torch.linspace(0, 2**32 - 1, 100_001, dtype=torch.float64).long()
    noise = gumbel(bits).double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.57722, abs=1e-3)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=1e-2)


@pytest.mark.parametrize("negatives_of", ["sampled", "hardest"])
def test_a_negative_shares_nothing_and_is_there(negatives_of):
    pairs = 24
    image, text = features(pairs)
    identity = torch.stack([torch.arange(pairs) % 16, torch.arange(pairs)], dim=1)
    identity[5:9, 1] = 3
    present = torch.arange(pairs) % 5 != 2
    text[~present] = math.nan
    for seed in range(50):
        found = mine(MatchConfig(negatives=negatives_of), image, text, facts_of(pairs, identity, present), seed)
        for rows in found:
            assert present[rows[present]].all()
            assert (identity[rows[present]] != identity[present]).all()
            assert rows[~present].tolist() == torch.arange(pairs)[~present].tolist()  # nothing is asked of these


def test_the_hardest_is_the_most_similar_that_is_allowed():
    pairs = 40
    image, text = features(pairs)
    identity = torch.stack([torch.arange(pairs) // 2, torch.arange(pairs)], dim=1)
    cosine = image @ text.T
    cosine[(identity[:, None] == identity[None]).any(dim=2)] = -2
    found = mine(MatchConfig(negatives="hardest"), image, text, facts_of(pairs, identity))
    assert found[0].equal(cosine.argmax(dim=1))
    assert found[1].equal(cosine.argmax(dim=0))


def counted(settings, image, text, trials):
    """How often each text was drawn for each image, and each image for each text, float64 `[2, n, n]`."""
    pairs = len(image)
    counts, facts = torch.zeros(2, pairs, pairs, dtype=torch.float64), facts_of(pairs)
    for seed in range(trials):
        for side, found in enumerate(mine(settings, image, text, facts, seed)):
            counts[side, torch.arange(pairs), found] += 1
    return counts


def chi_square(counts, wanted):
    """Of one direction, over the pairs that are not a row's own."""
    assert counts.diagonal().sum() == 0
    off = ~torch.eye(len(counts), dtype=torch.bool)
    return ((counts - wanted)[off] ** 2 / wanted[off]).sum().item()


def test_draws_are_in_proportion_to_the_softmax():
    trials = 2000
    image, text = features(6)
    counts = counted(MatchConfig(mining_temperature=0.5), image, text, trials)
    cosine = image @ text.T
    for own, similarity in zip(counts, (cosine, cosine.T), strict=True):
        wanted = trials * (similarity / 0.5).fill_diagonal_(-torch.inf).softmax(dim=1)
        assert chi_square(own, wanted) < 51.2  # 24 degrees of freedom: one in a thousand is above


def test_among_equals_the_hash_decides():
    """Features that have collapsed to one point: every other pair is as likely to be the hardest."""
    image = F.normalize(torch.ones(5, 4), dim=-1)
    for own in counted(MatchConfig(negatives="hardest"), image, image, 1000):
        assert chi_square(own, torch.full((5, 5), 250.0)) < 37.7  # 15 degrees of freedom


def test_tiles_change_nothing_and_similarities_are_computed_once(monkeypatch):
    pairs, dim = 192, 16
    image, text = features(pairs, dim)
    facts = facts_of(pairs)
    with FlopCounterMode(display=False) as counter:
        whole = mine(MatchConfig(), image, text, facts)
    assert counter.get_total_flops() == 2 * pairs**2 * dim
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 64 * pairs)
    assert all(a.equal(b) for a, b in zip(whole, mine(MatchConfig(), image, text, facts), strict=True))


def judged(logits, facts, mined):
    """(loss, count) of logits `[3, n]`: of the pairs, with mined texts, with mined images; `mined` has their rows."""
    inputs = {field: dict(rows) for field, rows in facts.items()}
    inputs |= {f"{f}#itm": {"identity": inputs[f]["identity"][rows]} for f, rows in mined.items()}
    local = dict(zip(("image+text", "image+text#itm", "image#itm+text"), logits, strict=True))
    objective = Match(MatchConfig(), "itm")
    return objective.loss({"local": {"fusion": local}}, inputs).item(), int(objective.count(inputs))


def test_three_judgements_a_pair():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    others = torch.tensor([1, 0, 3, 2])
    loss, count = judged(logits, facts_of(4), {"text": others, "image": others})
    wanted = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64).expand(3, 4)
    assert loss == pytest.approx(F.binary_cross_entropy(logits.sigmoid(), wanted, reduction="sum").item())
    assert count == 12


def test_what_is_absent_or_has_no_negative_is_not_judged():
    logits = torch.tensor([[1.0, 2.0, math.nan], [3.0, 4.0, math.nan], [5.0, 6.0, math.nan]])
    present = torch.tensor([True, True, False])
    itself = torch.tensor([0, 0, 2])  # the first pair got itself: there was nothing else
    loss, count = judged(logits, facts_of(3, present=present), {"text": itself, "image": itself})
    yes, no = (torch.tensor([1.0, 2.0]), torch.tensor([4.0, 6.0]))
    assert loss == pytest.approx((F.softplus(-yes).sum() + F.softplus(no).sum()).item())
    assert count == 6


def test_a_batch_of_one_image_has_no_negatives():
    image, text = features(4)
    identity = torch.stack([torch.zeros(4, dtype=torch.long), torch.arange(4)], dim=1)
    for rows in mine(MatchConfig(), image, text, facts_of(4, identity)):
        assert rows.tolist() == [0, 1, 2, 3]


def test_the_mined_rows_are_what_was_asked_for():
    image, text = features(6)
    rows = negatives(
        image, text, torch.arange(12).view(6, 2), None, torch.arange(6), lambda cosine, bits: keys(-cosine, bits)
    )
    assert rows[0].equal((image @ text.T).fill_diagonal_(2).argmin(dim=1))
