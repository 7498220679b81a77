"""The phases of a run: which step has pictures of which size, and what cannot be a schedule."""

from itertools import islice

import pytest
import torch

from data_tools.errors import UsageError
from pretrain.config.check import check
from pretrain.config.reading import load_config
from pretrain.config.tree import DataConfig, ModelConfig, Phase, RunConfig, Source
from pretrain.stream.transform import ImageSettings
from pretrain.tasks import ContrastiveConfig
from stream_corpora import characters, pixels, stream_of, write_corpus

PHASES = [Phase("2 steps", image_size=8), Phase("80 samples", patch_dropout=0.5)]
SETTINGS = {"seed": 3, "window": 4, "image": ImageSettings(16), "tokenize": characters}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("shards"), [23, 31, 16])  # 64 samples an epoch at 16 a step


def batches(corpus, first_step, steps, phases, global_batch=16, position=None, **settings):
    settings = {**SETTINGS, "global_batch": global_batch, "phases": phases, **settings}
    with stream_of(corpus, **settings) as stream:
        if position is not None:
            stream.go_on_from(position)
        return list(islice(stream.iterate(first_step), steps))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_step_has_the_pictures_of_its_phase(corpus, workers):
    got = batches(corpus, 0, 6, PHASES, workers=workers)
    assert [batch.phase for batch in got] == [0, 0, 1, 1, 1, 2]
    assert [pixels(batch).shape[-1] for batch in got] == [8, 8, 16, 16, 16, 16]
    small, whole = batches(corpus, 0, 6, (), image=ImageSettings(8)), batches(corpus, 0, 6, ())
    for step, batch in enumerate(got):
        assert torch.equal(pixels(batch), pixels((small if step < 2 else whole)[step]))
        assert batch.keys == whole[step].keys
    assert all(batch.phase == 0 for batch in whole)


def test_a_resumed_run_stands_where_it_stood(corpus):
    whole = batches(corpus, 0, 6, PHASES)
    for batch, again in zip(whole[1:], batches(corpus, 1, 5, PHASES), strict=True):
        assert (batch.phase, batch.keys) == (again.phase, again.keys)
        assert torch.equal(pixels(batch), pixels(again))


@pytest.mark.parametrize("ends", [("2 steps", "80 samples"), ("32 samples", "3 steps"), ("0.5 epochs", "1 epoch")])
def test_a_run_goes_on_behind_all_of_its_phases(corpus, ends):
    phases = [Phase(end, image_size=8) for end in ends]
    whole = batches(corpus, 0, 8, phases)
    with stream_of(corpus, **SETTINGS, global_batch=16, phases=phases) as stream:
        positions = [stream.position(step) for step in range(8)]
    for step, position in enumerate(positions):
        again = batches(corpus, step, 8 - step, phases, position=position)
        assert [batch.phase for batch in again] == [batch.phase for batch in whole[step:]]


def test_ends_in_samples_hold_at_another_global_batch(corpus):
    """32 samples were seen in two steps of 16; the phase that ends at 96 has two steps of 32 left."""
    with stream_of(corpus, **SETTINGS, global_batch=16, phases=PHASES) as stream:
        position = stream.position(2)
    phases = [Phase("96 samples", image_size=8)]
    got = batches(corpus, 2, 4, phases, global_batch=32, position=position)
    assert [batch.phase for batch in got] == [0, 0, 1, 1]


def test_the_stream_says_when_phases_end(corpus):
    with stream_of(corpus, **SETTINGS, global_batch=16, phases=PHASES) as stream:
        lines = [line for line in stream.describe() if line.startswith("phase:")]
    assert lines == [
        "phase:    images of 8 px, until step 2",
        "phase:    images of 16 px, 50% of the patches left out, until step 5",
    ]


@pytest.mark.parametrize("second", ["2 steps", "1 steps", "32 samples"])
def test_phases_end_one_after_the_other(corpus, second):
    with pytest.raises(UsageError, match=r"do not end one after the other; got 2 steps \(step 2\)"):
        stream_of(corpus, **SETTINGS, global_batch=16, phases=[PHASES[0], Phase(second, image_size=8)])


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (Phase("forever", image_size=8), r"model.phases.0.until"),
        (Phase("soon", image_size=8), r"model.phases.0.until is not a duration"),
        (Phase("1 steps", image_size=0), r"model.phases.0.image_size"),
        (Phase("1 steps", patch_dropout=1.0), r"model.phases.0.patch_dropout"),
        (Phase("1 steps"), r"an image_size or a patch_dropout"),
    ],
)
def test_a_phase_keeps_its_rules(phase, message):
    with pytest.raises(UsageError, match=message):
        check(ContrastiveConfig(run=RunConfig("x"), data=DataConfig([Source("x")]), model=ModelConfig(phases=[phase])))


def test_a_list_is_given_whole(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: {train: [{urls: x}]}\nrun: {dir: x}\n")
    config = load_config(ContrastiveConfig, path, ["model.phases=[{until: 2 steps, image_size: 8}]"])
    assert config.model.phases == PHASES[:1]
    with pytest.raises(UsageError, match="a list that the file lacks is given whole"):
        load_config(ContrastiveConfig, path, ["model.phases.0.until=2 steps"])
