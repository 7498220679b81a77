"""Result records: strict, atomic, found again."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch

from data_tools.errors import UserError
from pretrain.evaluate.results import append_record, environment, model_digest, read_records, result_key, to_line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_lacks_are_refused_by_name(tmp_path, value):
    file = tmp_path / "results.jsonl"
    with pytest.raises(UserError, match=r"metrics\.list\[1\]\.top5"):
        append_record(file, {"metrics": {"top1": 0.5, "list": [{}, {"top5": value}]}})
    assert not file.exists()


def test_lines_are_strict_and_sorted():
    def refuse(name):
        raise AssertionError(name)

    line = to_line({"b": 1, "a": {"d": None, "c": 0.5}})
    assert line == b'{"a": {"c": 0.5, "d": null}, "b": 1}\n'
    json.loads(line, parse_constant=refuse)


def test_records_come_back_in_order(tmp_path):
    file = tmp_path / "deep" / "results.jsonl"
    assert read_records(file) == []
    for number in range(3):
        append_record(file, {"number": number, "text": "a\nb\u2028c"})
    assert [record["number"] for record in read_records(file)] == [0, 1, 2]


@pytest.mark.parametrize("cut", [1, 5, 14])
def test_a_line_cut_by_a_crash_is_ignored_and_mended(tmp_path, cut):
    file = tmp_path / "results.jsonl"
    append_record(file, {"number": 0})
    with open(file, "ab") as torn:
        torn.write(b'{"number": 100}'[:cut])
    assert read_records(file) == [{"number": 0}]
    append_record(file, {"number": 1})
    assert read_records(file) == [{"number": 0}, {"number": 1}]


def test_a_record_that_only_lacks_its_line_break_stays(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"number": 0}\n{"number": 1}')
    assert read_records(file) == [{"number": 0}, {"number": 1}]
    append_record(file, {"number": 2})
    assert [record["number"] for record in read_records(file)] == [0, 1, 2]


def test_another_kind_of_file_is_left_as_it_is(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("model,recall\na,0.5")
    with pytest.raises(UserError, match="is no file of results"):
        append_record(file, {"number": 0})
    assert file.read_text() == "model,recall\na,0.5"


@pytest.mark.parametrize("line", ['{"num', "[1]", "3", "[" * 100_000])
def test_a_damaged_whole_line_is_an_error(tmp_path, line):
    file = tmp_path / "results.jsonl"
    file.write_text('{"number": 0}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2"):
        read_records(file)


def _write_many(path, start):
    for number in range(start, start + 50):
        append_record(path, {"number": number, "filler": "x" * 3000})


def test_concurrent_writers_lose_nothing(tmp_path):
    file = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(file, 50 * k)) for k in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(record["number"] for record in read_records(file)) == list(range(200))


def test_the_model_digest_names_the_model_and_not_its_wrapping():
    state = {"b": torch.randn(3, 2), "a": torch.tensor(2.6)}
    digest = model_digest(state, {"embed_dim": 2}, {"size": 32})
    rewrapped = {"a": torch.tensor([2.6]), "b": state["b"].T.contiguous().T}
    assert model_digest(rewrapped, {"quick_gelu": False, "embed_dim": 2}, {"size": 32}) == digest
    changed = {"a": state["a"], "b": state["b"] + 1e-6}
    others = [
        model_digest(changed, {"embed_dim": 2}, {"size": 32}),
        model_digest(state, {"embed_dim": 2, "quick_gelu": True}, {"size": 32}),
        model_digest(state, {"embed_dim": 2}, {"size": 64}),
    ]
    assert digest not in others


def test_the_key_follows_everything_that_determines_the_numbers():
    key = result_key("retrieval", "m", "d", {"precision": "fp32"})
    assert key == result_key("retrieval", "m", "d", {"precision": "fp32"})
    others = [("pairs", "m", "d", "fp32"), ("retrieval", "n", "d", "fp32"), ("retrieval", "m", "e", "fp32")]
    others.append(("retrieval", "m", "d", "bf16"))
    assert key not in [result_key(task, model, data, {"precision": p}) for task, model, data, p in others]


def test_the_environment_names_the_packages():
    found = environment()
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found) == {"packages", "git_commit"}
    to_line(found)
