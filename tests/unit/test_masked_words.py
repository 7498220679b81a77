"""The head and the objective of masked words: transformers' loss, of the hidden words alone."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from pretrain.objectives import MLMConfig
from pretrain.objectives.mlm import MLM
from pretrain.towers.heads import WordsConfig
from pretrain.towers.heads.words import Words
from text_towers import SIZES


def bert(words=50):
    torch.manual_seed(0)
    model = (
        BertForMaskedLM(BertConfig(vocab_size=words, pad_token_id=0, initializer_range=0.3, **SIZES)).double().eval()
    )
    torch.nn.init.normal_(model.cls.predictions.bias)
    return model


def head_of(theirs, tied):
    """Ours with the weights of theirs."""
    embedding = theirs.bert.embeddings.word_embeddings
    model = SimpleNamespace(
        encoder_of={"masked_text": "text"}, width=lambda _: SIZES["hidden_size"], token_embedding=lambda _: embedding
    )
    head = Words(WordsConfig(tied=tied), model).double()
    old = theirs.cls.predictions
    with torch.no_grad():
        head.dense.load_state_dict(old.transform.dense.state_dict())
        head.norm.load_state_dict(old.transform.LayerNorm.state_dict())
        head.bias.copy_(old.bias)
        if not tied:
            head.weight.copy_(old.decoder.weight)
    return head


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_and_its_gradients_are_those_of_transformers(tied):
    theirs = bert()
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 50, (6, 12), generator=g)
    tokens[2, 7:], tokens[4, 3:] = 0, 0
    wanted = torch.where((torch.rand(6, 12, generator=g) < 0.3) & (tokens > 0), tokens, -100)
    wanted[3] = -100
    shown = torch.where(wanted >= 0, 4, tokens)
    rows = {"masked_text": {"tokens": shown, "wanted": torch.nn.functional.pad(wanted, (0, 5), value=-100)}}
    theirs(input_ids=shown, attention_mask=(tokens != 0).long(), labels=wanted).loss.backward()
    names = "dense.weight", "dense.bias", "norm.weight", "norm.bias", "bias"
    old = theirs.cls.predictions
    want = [p.grad.clone() for p in (*old.transform.parameters(), old.bias)]
    embedding = theirs.bert.embeddings.word_embeddings.weight.grad.clone()
    head = head_of(theirs, tied)
    theirs.zero_grad()
    states = theirs.bert(input_ids=shown, attention_mask=(tokens != 0).long()).last_hidden_state
    objective, outputs = MLM(MLMConfig()), {"local": {"tokens": {"masked_text": {"values": states}}}}
    outputs["local"]["words"] = head(outputs, rows)
    assert outputs["local"]["words"].shape == (int((wanted >= 0).sum()),) == (objective.count(rows),)
    (objective.loss(outputs, rows) / objective.count(rows)).backward()
    got = dict(head.named_parameters())
    assert set(got) == {*names, *([] if tied else ["weight"])}  # the tower's embedding is none of the head's
    for name, grad in zip(names, want, strict=True):
        assert torch.allclose(got[name].grad, grad, rtol=1e-9, atol=1e-12), name
    own = theirs.bert.embeddings.word_embeddings.weight.grad + (0 if tied else got["weight"].grad)
    assert torch.allclose(own[1:], embedding[1:], rtol=1e-9, atol=1e-12)  # but padding's, which torch gives none


def test_no_hidden_word_is_a_loss_of_zero_that_reaches_every_parameter():
    theirs = bert()
    head, states = head_of(theirs, tied=False), torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    rows = {"masked_text": {"wanted": torch.full((2, 5), -100)}}
    losses = head({"local": {"tokens": {"masked_text": {"values": states}}}}, rows)
    losses.sum().backward()
    assert losses.shape == (0,)
    assert all(p.grad is not None and not p.grad.any() for p in (*head.parameters(), states))
