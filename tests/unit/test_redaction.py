"""URLs are shown without credentials, whatever these hold and wherever the URL is printed."""

from __future__ import annotations

import time
from concurrent.futures import Future
from itertools import product

import pytest

from data_tools.errors import UserError, shown
from data_tools.redaction import redact, redact_source, redact_text
from data_tools.remote.urls import expand_braces
from pretrain.config.reading import dump_config
from pretrain.config.tree import DataConfig, Source
from pretrain.evaluate import RetrievalConfig
from pretrain.process.entry import reason_of
from pretrain.process.status import Status
from pretrain.stream import prefetch
from pretrain.tasks import ContrastiveConfig

USERS = ("QQ", "QQ@QQ.org", "QQ/QQ", "")
PASSWORDS = (
    *("QQ/QQ", "QQ?QQ", "QQ#QQ", "QQ@QQ", "QQ:QQ", "QQ QQ", "QQ'QQ", 'QQ"QQ', "QQ<QQ>", "QQ\\QQ", "Q\u00e4/QQ"),
    *(
        "QQ%2FQQ",
        "@/QQ",
        "/QQ",
        "QQ/",
        "QQ//QQ",
        "QQ://QQ",
        "QQ?Q@Q",
        "QQ/Q?Q@Q",
        "?QQ",
        "QQ/?#@",
        "Q{Q/QQ}",
        "Q, Q; Q",
    ),
    *("99/99", "99?99@QQ", "8080/QQ/QQ", "Q?Q#Q/QQ", "QQ\u3000QQ", "$Q&Q=Q+Q"),
)


@pytest.mark.parametrize("tail", ["", "?sig=QQ", "?sig=QQ@QQ#QQ", "#QQ"])
def test_no_part_of_a_password_is_shown(tail):
    for user, password in product(USERS, PASSWORDS):
        url = f"https://{user}:{password}@host/set/s-000.tar{tail}"
        texts = [
            redact(url),
            redact_source(url),
            redact_text(f"cannot open '{url}', sorry"),
            str(UserError("x", got=url)),
        ]
        for text in texts:
            assert "Q" not in text, (url, text)
            assert "9" not in text, (url, text)
            assert redact_text(text) == text  # messages are wrapped in messages
        assert texts[2].startswith("cannot open '")
        assert texts[2].endswith("', sorry")


def test_the_rest_of_a_url_stays():
    for url, hidden in (
        ("s3://bucket/a/b.tar", "s3://bucket/a/b.tar"),
        ("hf://datasets/o/r@main/b.tar", "hf://datasets/o/r@main/b.tar"),
        ("http://[::1]:80/a.tar", "http://[::1]:80/a.tar"),
        ("https://u:p@h:1/a.tar", "https://***@h:1/a.tar"),
        ("https://u:p/w@h:1/a.tar", "https://***@h:1/a.tar"),
        ("https://h/a.tar?sig=x&y=z", "https://h/a.tar?***"),
        ("https://h/a.tar?time=12:30&by=a@b", "https://h/a.tar?***"),
        ("https://u:p?@h/a.tar#t", "https://***@h/a.tar#***"),
        ("https://u@h", "https://***@h"),
    ):
        assert redact(url) == redact_source(url) == hidden
        assert redact_text(f"cannot open '{url}', sorry") == f"cannot open '{hidden}', sorry"
        assert redact_text(f"no such object: {url}; remedy: check") == f"no such object: {hidden}; remedy: check"
    for text in ("expected s3:// http:// gs:// hf://", "mail me@x.org: https://h:80, 'x'", "data/a@b: c.tar"):
        assert redact_text(text) == text


def test_secrets_of_the_environment_are_hidden(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "k3y/of+the=user")
    assert redact_text("signed with k3y/of+the=user") == "signed with ***"


def test_redaction_comes_before_the_cut_of_long_messages():
    url = f"https://user:{'pass/' * 100}@host/a.tar"
    assert shown(url) == "https://***@host/a.tar"
    assert "pass" not in str(UserError(f"cannot read {url}", got=url, expected=url, remedy=url))
    with pytest.raises(UserError, match="bad brace pattern") as caught:
        expand_braces("https://user:pa/s{s@host/{0..x")
    assert "pa/s" not in str(caught.value)


def test_crafted_text_takes_no_time():
    started = time.monotonic()
    for text in ("a" * 300_000, "a://a:" * 50_000, "@a://a:" * 50_000, "://" * 100_000, "a://b:c " * 30_000 + "@"):
        redact_text(text)
    assert time.monotonic() - started < 5


def test_dumped_config_and_status_hide_what_yaml_escapes(tmp_path):
    status = Status(tmp_path, True)
    status.own()
    for password in PASSWORDS:
        url = f"https://user:{password}@host/s-{{0..9}}.tar"
        evaluators = {"retrieval": RetrievalConfig(data=url)}
        text = dump_config(ContrastiveConfig(data=DataConfig(train=[Source(urls=url)]), evaluators=evaluators))
        assert "Q" not in text.replace("SEQ", ""), text
        assert text.count("https://***") == 2
        status.write("failed", f"cannot read '{url}', sorry")
        assert "Q" not in (tmp_path / "status.json").read_text()


def test_what_ends_a_rank_or_a_prefetch_is_told_without_credentials(capfd):
    error = RuntimeError("cannot open 'https://user:QQ/QQ@host/a.tar?sig=QQ'")
    assert reason_of(error) == "RuntimeError: cannot open 'https://***@host/a.tar?***'"
    failed = Future()
    failed.set_exception(error)
    prefetch._pause(failed)
    assert "QQ" not in capfd.readouterr().err
