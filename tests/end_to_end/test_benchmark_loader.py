"""The loader benchmark for real: this project's stream beside webdataset and, where its environment is, open_clip."""

from __future__ import annotations

import json

from launch.benchmark import cli
from micro_trial import micro_trial


def test_the_loaders_run_for_real(tmp_path, capsys, repo_root):
    shards = micro_trial(tmp_path).source
    peer = repo_root / ".peers" / "open_clip"
    peers = ["webdataset", *(["open_clip"] if (peer / "bin" / "python").exists() else [])]
    sizes = ["--images", "16", "--batch", "8", "--size", "24", "--rounds", "1", "--peers", *peers]
    words = ["loader", "--shards", shards, "--work-dir", str(tmp_path), "--peer-env", str(peer), *sizes]
    assert cli.main(words) == 0
    report = json.loads(next(tmp_path.glob("loader-*/report.json")).read_text())
    assert set(report["rounds"][0]) == {"dualstream", *peers}
    for figures in report["figures"]["loaders"].values():
        assert all(rate["median"] > 0 for rate in figures.values())
    assert set(report["figures"]["ratio_per_round"]) == set(peers)
    assert report["trial"]["scaled_decode"] is True
    assert "webdataset (float32)" in capsys.readouterr().out
