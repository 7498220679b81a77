"""configs/README.md: every setting, up to date, and what the shipped files set is among them."""

import re

import yaml

from pretrain.config.check import names
from pretrain.config.tree import OptimConfig
from pretrain.tasks import ClassifyConfig, ContrastiveConfig
from pretrain.tasks.page import PAGE, comments_of, page


def test_the_page_is_what_the_tree_says():
    assert PAGE.read_text() == page(), "run `python -m pretrain.tasks.page`"


def test_every_setting_stands_there_once_with_what_it_does():
    rows = re.findall(r"^\| `([\w.]+)` \|([^\n]*)\|$", page(), flags=re.M)
    settings = [name for name, _ in rows]
    wanted = {name for kind in (ContrastiveConfig, ClassifyConfig) for name, *_ in names(kind)}
    maps = {"optim.parts", "objectives", "heads", "fields", "adapters", "evaluators"}
    assert set(settings) == wanted | maps | {"data.train", "model.phases"}
    assert len(settings) == len(set(settings))
    for name, rest in rows:
        default, allowed, effect = (cell.strip() for cell in re.split(r"(?<!\\)\|", rest))
        assert effect, name
        assert allowed or name == "classes" or name.endswith(".NAME.type"), name
        asked = ("task", "run.dir", "init", "data.train.0.urls", "model.phases.0.until")
        assert default or name in asked or name.endswith((".NAME.type", ".NAME.data"))


def test_a_comment_beside_or_above_a_field_is_its_text():
    comments = comments_of(OptimConfig)
    assert comments["lr"] == "peak learning rate"
    assert comments["name"].startswith("adamw | lion (one tensor")
    assert comments["name"].endswith("muon (train.zero_stage=0)")


def test_the_shipped_files_set_what_the_page_names(repo_root):
    text = page()
    for path in (repo_root / "configs").rglob("*.yaml"):
        for section, values in yaml.safe_load(path.read_text()).items():
            for key in values if isinstance(values, dict) else [None]:
                assert f"| `{section}.{key}` |" in text or f"| `{section}` |" in text, (path, section, key)
