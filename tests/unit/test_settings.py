"""Settings: YAML and overrides in, a frozen checked tree or one clear message out."""

import dataclasses

import pytest

from data_tools.errors import UsageError
from pretrain.config.batch import local_batch
from pretrain.config.durations import duration_steps, parse_duration, parse_seconds
from pretrain.config.reading import dump_config, load_config, load_task
from pretrain.config.recorded import changes
from pretrain.config.tree import PartConfig
from pretrain.evaluate import ClassificationConfig, RetrievalConfig
from pretrain.objectives import InfoNCEConfig, MarginConfig, MultiPositiveConfig, SigmoidConfig
from pretrain.tasks import TASKS, ClassifyConfig, ContrastiveConfig

BASE = "run: {dir: runs/a}\ndata: {train: [{urls: shards}]}\n"
_EVALUATED = "evaluators: {retrieval: {data: a}, classification: {data: b}}\n"


@pytest.fixture
def load(tmp_path):
    def read(text=BASE, *overrides, kind=ContrastiveConfig):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return load_config(kind, path, overrides)

    return read


def test_overrides_win_and_keep_their_types(load):
    config = load(
        BASE, "optim.lr=1e-3", "data.train.0.urls='s{000..009}.tar'", "optim.grad_clip=null", "optim.betas=[0.9,0.95]"
    )
    assert config.optim.lr == 1e-3
    assert config.data.train[0].urls == "s{000..009}.tar"
    assert config.optim.grad_clip is None
    assert config.optim.betas == (0.9, 0.95)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.lr = 1


def test_a_dump_reads_back_as_the_same_tree(load):
    config = load(BASE, "train.micro_batch=8", "eval.every=2 epochs")
    assert load(dump_config(config)) == config
    tuned = load(BASE + "init: runs/a\n", "mode=linear", kind=ClassifyConfig)
    assert load(dump_config(tuned), kind=ClassifyConfig) == tuned


@pytest.mark.parametrize(
    ("text", "override", "parts"),
    [
        (BASE, "optim.lrr=1", ("'optim.lrr'", "did you mean 'optim.lr'")),
        (BASE, "data.train.0.captoins=txt", ("'captoins'", "did you mean 'data.train.0.captions'")),
        (BASE, "model.phases=[{until: 1 epoch, image_siz: 64}]", ("did you mean 'model.phases.0.image_size'",)),
        (BASE, "trian.global_batch=2", ("'trian'", "did you mean 'train'")),
        (BASE, "data.train.0.url=x", ("'url'", "data.train.0.urls")),
        (BASE, "train.global_batch=abc", ("train.global_batch", "'abc'")),
        (BASE, "train.global_batch", ("section.key=value",)),
        (BASE, "train.precision=bf61", ("train.precision", "fp32, bf16", "did you mean 'bf16'")),
        (BASE, "train.zero_stage=4", ("train.zero_stage", "0, 1, 2, 3")),
        (BASE, "train={compile: true, zero_stage: 3}", ("train.zero_stage", "0, 1 or 2 beside train.compile")),
        (BASE, "optim.name=muon", ("train.zero_stage", "0 at optim.name=muon", "adamw and lion")),
        (BASE, "train.duration=3 epochz", ("train.duration", "epochs, steps, samples", "or forever")),
        (BASE, "data.crop_scale=[0.5,0.2]", ("data.crop_scale", "low <= high")),
        (BASE, "checkpoint.every=0 steps", ("checkpoint.every", "> 0", "null switches it off")),
        (BASE, "train.duration=0 epochs", ("train.duration", "> 0")),
        (BASE, "optim.betas=[0.9,1.5]", ("optim.betas", "0 <= value < 1")),
        (BASE, "log.images=-1", ("log.images", "0 <= value")),
        (BASE, "data.flip=2", ("data.flip", "<= 1", "0.5")),
        (BASE, "data.color_jitter=-0.1", ("data.color_jitter", "0 <= value")),
        (BASE, "data.word_dropout=1", ("data.word_dropout", "value < 1")),
        (BASE, "data.train=[{urls: a, weight: 1}, {urls: b}]", ("data.train.1.weight", "for every source or for none")),
        (BASE, "data.train=[{urls: a, weight: 0}]", ("data.train.0.weight", "1e-06 <= value", "take the source out")),
        (BASE, "data.train=[{urls: a, weight: 1, repeat: 2}]", ("data.train.0.repeat", "1 beside a weight")),
        (BASE, "data.train.0.repeat=-1", ("data.train.0.repeat", "1e-06 <= value")),
        (BASE, "data.train.0.choose=last", ("data.train.0.choose", "random, first")),
        (BASE, "train.duration=forever", ("optim.schedule", "constant")),
        (BASE, "optim.warmup=forever", ("optim.warmup", "epochs, steps, samples")),
        (BASE, "optim.cooldown=10 steps", ("optim.cooldown", "unless optim.schedule is constant")),
        (BASE, "optim.cooldown=a bit", ("optim.cooldown", "epochs, steps, samples")),
        (BASE, "checkpoint.keep=1", ("checkpoint.keep", "2 <= value", "spare")),
        (BASE, "checkpoint.keep_every=often", ("checkpoint.keep_every", "epochs, steps, samples")),
        (BASE, "checkpoint.keep_best=validation_loss", ("checkpoint.keep_best", "=-validation_loss")),
        (BASE, "checkpoint.keep_best=text_to_image_recall@10", ("checkpoint.keep_best", "set evaluators.TYPE.data")),
        (
            BASE + _EVALUATED,
            "checkpoint.keep_best=text_to_image_recal@1",
            ("'text_to_image_recall@1'?",),
        ),
        (
            BASE + _EVALUATED + "objectives: {mlm: {}}\n",
            "checkpoint.keep_best=-validation_loss",
            ("checkpoint.keep_best", "a metric of evaluators"),
        ),
        (BASE + _EVALUATED, "checkpoint.keep_best=ema_top1", ("checkpoint.keep_best", "a metric of evaluators")),
        (BASE + _EVALUATED, "evaluators.flowers.data=x", ("evaluators.flowers", "retrieval, classification, pairs")),
        (BASE, "evaluators={retrieval: {}}", ("'evaluators.retrieval.data'", "is not set")),
        (BASE + _EVALUATED, "evaluators.retrieval.dat=x", ("did you mean 'evaluators.retrieval.data'",)),
        (BASE + _EVALUATED, "evaluators.retrieval.templates=x", ("templates is a setting of classification",)),
        (
            BASE + "optim: {ema: 0.9}\n",
            "evaluators={ema: {type: pairs, data: x}, pairs: {data: x}}",
            ("evaluators", "two are called ema_image_to_text_accuracy", "{type: TYPE}"),
        ),
        (BASE, "optim.layer_decay=0", ("optim.layer_decay", "0 < value <= 1")),
        (BASE, "model.locked=[image]", ("model.locked", "none without model.init")),
        (BASE, "model={init: w.pt, locked: [text, image]}", ("model.locked", "leaves a part to learn")),
        (BASE, "model={init: w.pt, locked: [txt]}", ("model.locked", "parts of the model: image, text", "'text'?")),
        (BASE, "optim.parts.imag.lr=1e-3", ("optim.parts", "['imag']", "did you mean 'image'")),
        (BASE, "optim.parts.text.lr=0", ("optim.parts.text.lr", "1e-12 <= value", "model.locked stops a part")),
        (BASE, "optim.parts.text.lrr=1", ("'optim.parts.text.lrr'", "did you mean 'optim.parts.text.lr'")),
        (BASE, "train.grad_checkpointing=[both]", ("train.grad_checkpointing", "parts of the model: image, text")),
        (BASE, "train.grad_checkpointing=[text,text]", ("train.grad_checkpointing", "each name once")),
        (BASE, "train.grad_checkpointing=image", ("train.grad_checkpointing", "a list", "=[image]")),
        (BASE, "profile.steps=9-3", ("profile.steps", "FIRST-LAST")),
        (BASE, "optim.ema=1", ("optim.ema", "0 < value < 1, or null")),
        (BASE, "optim.grad_clip=0", ("optim.grad_clip", "null")),
        (BASE, "objectives.siglip.weight=1", ("objectives.siglip", "infonce, multi_positive, sigmoid", "'siglip'")),
        (BASE, "objectives={own: {type: sigmod}}", ("objectives.own", "got 'sigmod'", "did you mean 'sigmoid'")),
        (BASE, "objectives={own: {}}", ("objectives.own", "a name of your own needs objectives.own.type")),
        (BASE, "objectives={infonce: {type: 3}}", ("objectives.infonce", "got 3", "infonce, multi_positive")),
        (BASE, "objectives=3", ("objectives",)),
        (BASE, "objectives={infonce: 3}", ("objectives",)),
        (BASE, "objectives={}", ("objectives", "at least one", "objectives=infonce")),
        (
            BASE,
            "objectives={infonce: {temperature: 0.1}, margin: {}, sigmoid: {temperature: 0.2}}",
            ("objectives.sigmoid.temperature", "0.2", "0.1, as objectives.infonce has it"),
        ),
        (
            BASE,
            "objectives={infonce: {}, sigmoid: {learn_temperature: false}}",
            ("objectives.sigmoid.learn_temperature", "False", "True, as objectives.infonce has it"),
        ),
        (BASE, "objectives.infonce.weight=0", ("objectives.infonce.weight", "0 < value")),
        (BASE, "objectives.infonce.fields=[text,text]", ("objectives.infonce.fields", "two different fields")),
        (BASE, "objectives.infonce.fields=[txt,image]", ("objectives.infonce.fields", "did you mean 'text'")),
        (BASE, "objectives.infonce.temperature=0.001", ("infonce.temperature", "0.01 <= value <= 1, or null")),
        (BASE, "objectives.infonce.label_smoothing=1", ("objectives.infonce.label_smoothing", "< 1")),
        (BASE, "objectives.infonce.logit_bias=-10", ("infonce.logit_bias'", "logit_bias is a setting of sigmoid")),
        (BASE, "objectives.sigmoid.label_smoothing=0.1", ("label_smoothing is a setting of infonce, multi_positive",)),
        (BASE, "objectives.infonce.negatives=hardest", ("negatives is a setting of margin",)),
        (BASE, "objectives.margin.learn_temperature=false", ("a setting of infonce, multi_positive, sigmoid",)),
        (BASE, "objectives.sigmoid.logit_bias=5", ("objectives.sigmoid.logit_bias", "-100 <= value <= 0")),
        (BASE, "objectives.infonce.weigth=5", ("infonce.weigth'", "did you mean 'objectives.infonce.weight'")),
        (BASE, "task=classify", ("is of another task", "got 'classify'", "expected contrastive")),
        (
            BASE + "model: {locked: [image], init: w.pt}\n",
            "optim.parts.image.lr=1e-4",
            ("optim.parts", "parts that learn, and image is locked"),
        ),
        (BASE, "profile.steps=1-1000", ("profile.steps", "100 steps at most")),
        (BASE, "objectives.margin.negatives=all", ("objectives.margin.negatives", "sum, hardest")),
        (BASE, "guard.max_skipped=-1", ("guard.max_skipped", "0 <= value")),
        (BASE, "guard.spike=0", ("guard.spike", "null")),
        (BASE, "guard.hang_timeout=soon", ("guard.hang_timeout", "seconds, minutes, hours")),
        (BASE, "guard.hang_timeout=2 hours", ("guard.hang_timeout", "at most 25 minutes")),
        ("data: {train: [{urls: a}]}", "seed=1", ("'run.dir'", "run.dir=VALUE")),
        ("run: {dir: a}", "seed=1", ("data.train", "data.train=FOLDER")),
        ("a: [", "seed=1", ("not valid YAML",)),
    ],
)
def test_a_fault_is_one_line_with_a_remedy(load, text, override, parts):
    with pytest.raises(UsageError) as caught:
        load(text, override)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optim.ema=0.9", "did you mean 'optim."),
        ("data.word_dropout=0.1", "a setting of task classify"),
        ("data.train.0.captions=txt", "'captions'"),
        ("data.train.0.choose=first", "'choose'"),
        ("model.name=x", "'model'"),
        ("objectives.infonce.weight=2", "'objectives'"),
    ],
)
def test_fine_tuning_has_no_setting_that_it_would_not_heed(load, word, said):
    with pytest.raises(UsageError, match=r"unknown config key.*a setting of task classify") as caught:
        load(BASE + "init: runs/a\n", word, kind=ClassifyConfig)
    assert said in str(caught.value)


def test_the_settings_say_which_task_they_are_of(tmp_path):
    (tmp_path / "a.yaml").write_text(BASE)
    (tmp_path / "b.yaml").write_text(BASE + "task: classify\ninit: runs/a\n")
    read = [load_task(TASKS, tmp_path / name, [], "contrastive") for name in ("a.yaml", "b.yaml")]
    assert [type(config) for config in read] == [ContrastiveConfig, ClassifyConfig]
    assert [config.task for config in read] == ["contrastive", "classify"]
    assert load_task(TASKS, tmp_path / "a.yaml", ["init=x"], "classify").task == "classify"
    assert load_task(TASKS, tmp_path / "b.yaml", ["mode=linear"], "contrastive").mode == "linear"
    with pytest.raises(UsageError, match=r"task.*got 'clasify'; expected contrastive or classify; .*mean 'classify'"):
        load_task(TASKS, tmp_path / "a.yaml", ["task=clasify"], "contrastive")


def test_evaluators_have_settings_and_metrics_of_their_own_under_a_name(load):
    text = BASE + "optim: {ema: 0.9}\nevaluators: {retrieval: {data: a}, zero_shot: {type: classification, data: b}}\n"
    config = load(text, "checkpoint.keep_best=ema_zero_shot_top1")
    zero_shot = ClassificationConfig(data="b")
    assert config.evaluators == {"retrieval": RetrievalConfig(data="a"), "zero_shot": zero_shot}
    assert load(dump_config(config)) == config
    assert load(text, "evaluators.retrieval.loss_batch=64").evaluators["retrieval"].loss_batch == 64
    assert load(text, "evaluators={}").evaluators == {}
    for best in ("-validation_loss", "zero_shot_top1", "text_to_image_recall@10", "-ema_text_to_image_median_rank"):
        load(text, f"checkpoint.keep_best={best}")


def test_an_objective_has_its_own_settings_under_a_name(load):
    assert load().objectives == {"infonce": InfoNCEConfig()}
    smoothed = load(BASE, "objectives.infonce.label_smoothing=0.1")
    assert smoothed.objectives == {"infonce": InfoNCEConfig(label_smoothing=0.1)}
    other = BASE + "objectives:\n  pairs: {type: sigmoid, weight: 0.5}\n"
    pairs = {"pairs": SigmoidConfig(weight=0.5, logit_bias=-5)}
    assert load(other, "objectives.pairs.logit_bias=-5").objectives == pairs
    assert load(other, "objectives={margin: {}}").objectives == {"margin": MarginConfig()}
    assert load(BASE + "objectives: {multi_positive: }\n").objectives == {"multi_positive": MultiPositiveConfig()}
    named = load(other, "objectives=sigmoid", "objectives.sigmoid.weight=2")
    assert named.objectives == {"sigmoid": SigmoidConfig(weight=2)}
    assert load(BASE + "objectives: [margin]\n").objectives == {"margin": MarginConfig()}
    both = load(BASE + "objectives: [infonce, margin]\n", "objectives.margin.weight=0.5")
    assert both.objectives == {"infonce": InfoNCEConfig(), "margin": MarginConfig(weight=0.5)}
    for config in (smoothed, load(other), both):
        assert load(dump_config(config)) == config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.grad_checkpointing=[image,text]"], "train.grad_checkpointing.*parts of the model: image$"),
        (["optim.parts.text.lr=1"], "optim.parts.*'text'.*parts of the model: image, head"),
        (["mode=linear", "optim.parts.image.lr=1"], "optim.parts.*head alone at mode=linear"),
        (["evaluators.retrieval.data=x"], "evaluators.retrieval has no such type.*expected classification"),
        (["evaluators.classification.data=x", "checkpoint.keep_best=recall"], "keep_best.*a metric of.*top1, top5"),
    ],
)
def test_fine_tuning_has_parts_of_its_own(load, words, said):
    with pytest.raises(UsageError, match=said):
        load(BASE + "init: runs/a\n", *words, kind=ClassifyConfig)
    tuned = load(BASE + "init: runs/a\n", "optim.parts.head.lr=1e-2", kind=ClassifyConfig)
    assert tuned.optim.parts == {"head": PartConfig(lr=1e-2)}


def test_maps_and_lists_of_parts_are_given_whole_or_by_name(load):
    given = BASE + "optim: {parts: {image: {lr: 1e-4}}}\ntrain: {grad_checkpointing: [text]}\n"
    config = load(given, "optim.parts.image.weight_decay=0.1", "train.grad_checkpointing=[image,text]")
    assert config.optim.parts == {"image": PartConfig(lr=1e-4, weight_decay=0.1)}
    assert config.train.grad_checkpointing == ["image", "text"]
    assert load(given, "optim.parts={text: {lr: 1e-4}}").optim.parts == {"text": PartConfig(lr=1e-4)}
    assert load(dump_config(config)) == config


def test_a_dump_holds_no_credentials(load):
    text = dump_config(
        load(BASE, "data.train.0.urls=https://me:pass-word@h/s-{0..9}.tar?sig=se-cret", "data.cache_gib=0.5")
    )
    assert "pass-word" not in text
    assert "se-cret" not in text
    assert load(text).data.train[0].urls == "https://***@h/s-{0..9}.tar?***"
    with pytest.raises(UsageError, match=r"data\.cache_gib breaks its rule; got 0.0; expected 0 < value"):
        load(BASE, "data.cache_gib=0")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none\.yaml is missing"):
        load_config(ContrastiveConfig, tmp_path / "none.yaml")


def test_shipped_configs_are_valid(repo_root):
    for path in sorted((repo_root / "configs").glob("*.yaml")):
        load_config(ContrastiveConfig, path)
    for path in sorted((repo_root / "configs" / "finetune").glob("*.yaml")):
        load_config(ClassifyConfig, path)


def test_durations_round_up_to_whole_steps():
    assert duration_steps("2 epochs", "x", steps_per_epoch=7, global_batch=32) == 14
    assert duration_steps("0.5 epochs", "x", steps_per_epoch=7, global_batch=32) == 4
    assert duration_steps("100 samples", "x", steps_per_epoch=7, global_batch=32) == 4
    assert duration_steps("96 samples", "x", steps_per_epoch=7, global_batch=32) == 3
    assert duration_steps("1e6 samples", "x", steps_per_epoch=7, global_batch=1000) == 1000
    assert duration_steps("0.1 epochs", "x", steps_per_epoch=30, global_batch=32) == 3  # in floats 3.0000000000000004
    for batch in (210, 300, 1999):
        assert duration_steps(f"{7 * batch} samples", "x", steps_per_epoch=7, global_batch=batch) == 7


def test_one_is_singular():
    assert parse_duration("1 epoch", "x") == parse_duration("1 epochs", "x")
    assert parse_seconds("1 hour", "x") == parse_seconds("60 minutes", "x") == 3600


def test_the_ranks_share(load):
    config = load(BASE, "train.global_batch=48", "train.micro_batch=8")
    assert local_batch(config, 2) == 24
    with pytest.raises(UsageError, match=r"48 is not divisible.*5 ranks.*4 or 6 ranks"):
        local_batch(config, 5)
    with pytest.raises(UsageError, match=r"micro_batch.*8 for 12 pairs"):
        local_batch(config, 4)


def test_changes_are_told_by_setting_wherever_it_stands():
    before = "# commit a\nseed: 0\nrun: {dir: r}\nloss: {name: infonce}\ndata:\n  train:\n  - {urls: a, weight: null}\n"
    after = "# commit b\nrun: {dir: r}\ndata:\n  train:\n  - {urls: b, weight: null}\n"
    after += "objectives: {infonce: {weight: 1.0}}\n"
    assert changes(before, before) == changes(before, before.replace("seed: 0\n", "") + "seed: 0\n") == []
    assert changes(before, after + "seed: 0\n") == [
        "- # commit a",
        "- loss.name: infonce",
        "- data.train.0.urls: a",
        "+ data.train.0.urls: b",
        "+ # commit b",
        "+ objectives.infonce.weight: 1.0",
    ]
    assert changes('a: "\\e[31m' + "x" * 1000 + '"', "a: 1")[0].isprintable()
    assert changes("a: [", after) == changes("- 1", after) == ["the settings of that checkpoint cannot be read"]
