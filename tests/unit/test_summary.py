"""The table at the end of the quickstart: newest records, ceilings of the shortcuts, one line for what is missing."""

from __future__ import annotations

import json

from pretrain.evaluate.summary import main


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_newest_record_of_each_task_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    retrieval = {"text_to_image_recall@1": 0.1, "image_to_text_recall@1": 0.3}
    newer = retrieval | {"text_to_image_recall@1": 0.625}
    rows = [{"task": "retrieval", "metrics": metrics, "chance": {}} for metrics in (retrieval, newer)]
    rows.append({"task": "classification", "metrics": {"top1": 0.5}, "chance": {"top1": 0.25}})
    _write(tmp_path / "results.jsonl", rows)
    run = tmp_path / "finetuned"
    run.mkdir()
    _write(run / "metrics.jsonl", [{"kind": "eval", "top1": 0.4}, {"kind": "eval", "top1": 0.875}, {"kind": "train"}])
    (tmp_path / "shortcuts.json").write_text(json.dumps({"test": {"recall_at_1": {"colors": 0.1, "bag": 0.9}}}))
    words = ["--results", str(tmp_path / "results.jsonl"), "--finetuned", str(run), "--made", "export=some/where"]
    assert main([*words, "--shortcuts", str(tmp_path / "shortcuts.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split(",")[0].strip(" \u2502"): line for line in lines if "%" in line}
    assert len(shown) == 3
    assert "62.5 %" in next(line for line in lines if "text to image" in line)
    assert "90.0 %" in next(line for line in lines if "text to image" in line)
    assert "25.0 %" in shown["zero-shot classification"]
    assert "87.5 %" in shown["fine-tuned classification"]
    assert lines[-1] == "export: some/where"


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert main(["--results", str(tmp_path / "none.jsonl")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
