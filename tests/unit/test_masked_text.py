"""Texts with hidden words: which ones, and what stands in their place; neither ranks nor micro-batches enter."""

import json
import math
import pickle
import struct

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from data_tools.corpus import Sample
from data_tools.errors import UsageError
from model_files import write_tokenizer
from pretrain.stream.draw import Draw
from pretrain.stream.eval_reader import EvalReader
from pretrain.stream.fields.field import micro_batches
from pretrain.stream.fields.masked_text import MaskedText
from pretrain.stream.fields.text import Text
from pretrain.stream.samples import Samples, padding_of
from pretrain.towers.cut import TextRule
from pretrain.towers.spec import Tokenizer, tokenizer_of
from pretrain.towers.vocabulary import Vocabulary, vocabulary_of
from stream_corpora import stream_of, write_corpus

TOKENIZER = tokenizer_of(tiny.SPEC)
START, END = 49406, 49407
RULE = TextRule(causal=True, buckets=2)
CAPTION = "a small red dog sits under the large green tree"  # ten tokens


def field(**settings):
    own = {name: settings.pop(name) for name in ("choose", "word_dropout", "rule", "optional") if name in settings}
    return MaskedText(Text(TOKENIZER, **own), vocabulary_of(TOKENIZER, None, RULE), **settings)


def rows(one, texts, epoch=0, seed=0, micro_batch=None):
    """The rows of one caption of each sample, ids 0, 1, ..., in training."""
    fields = {"masked_text": one}
    samples = Samples(fields, len(texts), padding_of(fields))
    for row, text in enumerate(texts):
        samples.put(row, Sample(str(row), row, {"txt": text.encode()}), fields, Draw(seed, epoch, row))
    return samples.finish(micro_batch)[0]["masked_text"]


def by_hand(tokens, id, share=0.15, mask=0.8, random=0.1):
    """(tokens, wanted) of one text, from the hash's definition."""
    tokens, wanted, words = list(tokens), [-100] * len(tokens), [w for w in range(START) if w != 187]
    for place in range(1, tokens.index(END)):
        bits = [xxhash.xxh3_64_intdigest(struct.pack("<5Q", 0, 0, id, 8, 2 * place + k)) for k in (0, 1)]
        if (bits[0] >> 32) / 2**32 < share:
            wanted[place], becomes = tokens[place], (bits[0] % 2**32) / 2**32
            tokens[place] = (
                187 if becomes < mask else words[bits[1] % len(words)] if becomes < mask + random else tokens[place]
            )
    return tokens, wanted


@pytest.mark.parametrize(
    "kind", [{}, {"share": 0.5}, {"share": 1.0, "mask": 0.0, "random": 1.0}, {"share": 0.4, "mask": 0.3}]
)
def test_words_are_hidden_by_the_hash_of_their_sample_and_place(kind):
    texts = [CAPTION] * 60
    found, true = rows(field(**kind), texts), TOKENIZER(texts).tolist()
    want = [by_hand(one, id, **kind) for id, one in enumerate(true)]
    assert found["tokens"].tolist() == [tokens for tokens, _ in want]
    assert found["wanted"].tolist() == [wanted for _, wanted in want]
    assert set(found) == {"tokens", "wanted"}


def test_of_the_words_15_percent_are_hidden_80_10_10():
    found, true = rows(field(), [CAPTION] * 4000), TOKENIZER([CAPTION])[0]
    hidden = found["wanted"] >= 0
    words = 4000 * 10
    sigma = math.sqrt(words * 0.15 * 0.85)
    assert abs(int(hidden.sum()) - 0.15 * words) < 4 * sigma
    assert torch.equal(found["wanted"][hidden], true.expand(4000, -1)[hidden])
    became = found["tokens"][hidden]
    masked, kept = became == 187, became == found["wanted"][hidden]
    for kind, share in ((masked, 0.8), (kept, 0.1), (~masked & ~kept, 0.1)):
        sigma = math.sqrt(len(became) * share * (1 - share))
        assert abs(int(kind.sum()) - share * len(became)) < 4 * sigma
    assert became[~masked & ~kept].unique().numel() > 400  # any word of the vocabulary
    assert torch.equal(found["tokens"][~hidden], true.expand(4000, -1)[~hidden])
    per_place = hidden[:, 1:11].float().mean(dim=0)
    assert (per_place - 0.15).abs().max() < 4 * math.sqrt(0.15 * 0.85 / 4000)  # wherever the word stands


def test_start_end_and_padding_are_never_hidden():
    texts = ["<end_of_text>", "dog", CAPTION, CAPTION * 4, "<end_of_text> dog", "!"]
    found, true = rows(field(share=1.0), texts * 20), TOKENIZER(texts * 20)
    hidden = found["wanted"] >= 0
    assert not (hidden & ((true == START) | (true == END))).any()
    assert hidden.sum(dim=1)[:6].tolist() == [0, 1, 10, 14, 0, 1]  # what stands behind an end is none of the text
    assert torch.equal(RULE.lengths(found["tokens"]), RULE.lengths(true))


def test_a_masked_text_is_the_caption_that_the_text_shows(tmp_path):
    """The same of several captions, without the same words."""
    corpus = write_corpus(tmp_path, [40])
    one = field(word_dropout=0.5, share=0.5)
    fields = {"text": one.text, "masked_text": one}
    batches = {}
    for epoch in (0, 1):
        with stream_of(corpus, fields=lambda *_: fields, seed=3, global_batch=40, window=8) as stream:
            batch = batches[epoch] = next(stream.iterate(epoch))
        text, masked = batch.inputs["text"], batch.inputs["masked_text"]
        whole = torch.where(masked["wanted"] >= 0, masked["wanted"], masked["tokens"])
        assert torch.equal(whole, text["tokens"])
        assert (masked["wanted"] >= 0).any()
    order = [torch.tensor(batches[epoch].ids.argsort().copy()) for epoch in (0, 1)]
    first, second = (batches[epoch].inputs["masked_text"]["wanted"][order[epoch]] for epoch in (0, 1))
    assert not torch.equal(first, second)


def test_neither_ranks_nor_micro_batches_nor_workers_change_what_is_hidden(tmp_path):
    corpus = write_corpus(tmp_path, [16], {n: {"txt": CAPTION.encode(), "json": None} for n in range(16)})
    fields = {"text": Text(TOKENIZER, rule=RULE), "masked_text": field(rule=RULE, share=0.5)}

    def batch(**settings):
        with stream_of(
            corpus, fields=lambda *_: pickle.loads(pickle.dumps(fields)), seed=3, global_batch=16, window=8, **settings
        ) as stream:
            return next(stream.iterate(0))

    whole = batch(micro_batch=16)
    for workers, world_size, micro_batch in ((0, 1, 4), (0, 2, 4), (1, 4, 2)):
        ranks = [
            batch(rank=rank, world_size=world_size, micro_batch=micro_batch, workers=workers)
            for rank in range(world_size)
        ]
        for name in ("tokens", "wanted"):
            joined = torch.cat([rank.inputs["masked_text"][name] for rank in ranks])
            assert torch.equal(joined, whole.inputs["masked_text"][name])
        for rank in ranks:
            for part in micro_batches(rank.inputs, micro_batch):
                masked = part["masked_text"]
                cut = RULE(masked["tokens"])
                assert set(masked) == {"tokens", "wanted", *cut}
                assert all(torch.equal(masked[name], row) for name, row in cut.items())
                assert all(part["text"][name].shape == row.shape for name, row in cut.items())


def test_an_evaluation_hides_the_same_words_of_every_caption_each_time(tmp_path):
    reader = EvalReader(write_corpus(tmp_path, [8], {3: {"jpg": None}}), {"masked_text": field(share=0.5)}, 4)
    first, again = (torch.cat([batch.inputs["masked_text"]["wanted"] for batch in reader]) for _ in range(2))
    assert torch.equal(first, again)
    assert len(first) == 24  # three captions each
    assert any(not torch.equal(a >= 0, b >= 0) for a, b in zip(first[0::3], first[1::3], strict=True))


def test_a_text_that_is_not_there_has_no_word_to_guess():
    one = field(optional=True, share=1.0)
    fields = {"masked_text": one}
    samples = Samples(fields, 2, padding_of(fields))
    samples.put(0, Sample("a", 1, {"jpg": b""}), fields, Draw(0, 0, 1))
    samples.put(1, Sample("b", 2, {"txt": b"dog"}), fields, Draw(0, 0, 2))
    found = samples.finish(2)[0]["masked_text"]
    assert found["present"].tolist() == [False, True]
    assert (found["wanted"] >= 0).sum(dim=1).tolist() == [0, 1]


# ---- the token that stands for a hidden word ------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20))
def test_no_text_has_the_token_that_stands_for_a_hidden_word(text):
    mask = vocabulary_of(TOKENIZER).mask
    assert mask < END
    assert mask not in TOKENIZER.library.encode(text)
    assert TOKENIZER.library.byte_decoder[TOKENIZER.library.decoder[mask]] == 0xFF  # which is in no UTF-8


def test_a_tokenizer_of_transformers_brings_its_own(tmp_path):
    write_tokenizer(tmp_path)
    bert = Tokenizer(f'{{"hf_tokenizer_name": "{tmp_path}"}}', 8)
    vocabulary = vocabulary_of(bert, None, TextRule(pad=0))
    assert vocabulary == Vocabulary(9, (0, 1, 2, 3, 4), 4)
    tokens = bert(["a red dog", "red zebra", "a red dog cat cat a red dog"])
    words = [
        [False, True, True, True, False, False, False, False],
        [False, True, *[False] * 6],
        [False, *[True] * 6, False],
    ]
    assert vocabulary.is_word(tokens).tolist() == words  # [UNK] is no word: nobody can guess it
    found = rows(MaskedText(Text(bert), vocabulary, share=1.0, mask=0.5, random=0.5), ["a red dog"] * 50)
    assert set(found["tokens"][:, 1:4].unique().tolist()) == {4, 5, 6, 7, 8}
    assert found["wanted"][0].tolist() == [-100, 5, 7, 6, -100, -100, -100, -100]


def unigram(folder, *words):
    """A sentencepiece-like tokenizer without a mask token, as T5's."""
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    model = {"type": "Unigram", "unk_id": 2, "vocab": [[word, -1.0] for word in (*names.values(), *words)]}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind | names))
    return Tokenizer(f'{{"hf_tokenizer_name": "{folder}"}}', 8)


@pytest.mark.parametrize(("words", "mask"), [(("a", "<extra_id_0>"), 4), (("a", "b", "<0xFF>"), 5), (("a",), None)])
def test_a_tokenizer_without_one_has_another_that_no_text_holds_or_is_told(tmp_path, words, mask):
    tokenizer = unigram(tmp_path, *words)
    if mask is not None:
        assert vocabulary_of(tokenizer).mask == mask
    else:
        with pytest.raises(UsageError, match="set mask_token to an id that no text holds"):
            vocabulary_of(tokenizer)
    assert vocabulary_of(tokenizer, 3).mask == 3


@pytest.mark.parametrize("mask", [START, END, 49408])
def test_a_token_that_means_something_else_is_refused(mask):
    with pytest.raises(UsageError, match="mask_token"):
        vocabulary_of(TOKENIZER, mask, RULE)
    assert vocabulary_of(TOKENIZER, 5, RULE).mask == 5


def test_so_is_one_that_the_tower_takes_for_padding(tmp_path):
    tokenizer = unigram(tmp_path, "a", "b")
    with pytest.raises(UsageError, match="where a text begins or ends"):
        vocabulary_of(tokenizer, 4, TextRule(causal=True, eos=4))
    assert vocabulary_of(tokenizer, 4, TextRule(causal=True, eos=1)).mask == 4
