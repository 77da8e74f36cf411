"""What the servers take: a zip with results.json at its root, the same bytes for the same results, and who takes it."""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import MetadataCatalog

from vis.data import builtin_datasets
from vis.evaluation import VideoEvaluator
from vis.evaluation.submission import BENCHMARKS, benchmark_of, write_submission

SUBMITTED = [
    *(f"ytvis_{year}_{split}" for year in (2019, 2021) for split in ("val", "test")),
    *("ytvis_2022_val", "ytvis_2022_test", "ovis_val", "ovis_test"),
    *("ytvis_ovis_val", "ytvis_ovis_test"),  # names of released code
]


@pytest.mark.parametrize("name", SUBMITTED)
def test_benchmarks_with_hidden_ground_truth(name: str) -> None:
    benchmark = benchmark_of(name)
    assert benchmark is not None
    assert "challenge page" in benchmark.page
    assert "://" not in benchmark.page, "links die"


def test_other_data_sets_are_not_submitted() -> None:
    known = {name for name in builtin_datasets() if benchmark_of(name)}
    assert known == set(SUBMITTED) - {"ytvis_ovis_val", "ytvis_ovis_test"}
    for name in ("mine", "ytvis_2019_train", "ytvis_ovis_val_sub", "synthetic_ovis_val", "my_ovis_val", "ovis_val_2"):
        assert benchmark_of(name) is None
    assert len({benchmark.pattern for benchmark in BENCHMARKS}) == len(BENCHMARKS)


def test_zip_is_what_the_servers_take(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"video_id": 1, "counts": "ab" * 5000}]))
    path = write_submission(results)
    assert path == tmp_path / "submission.zip"
    first = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["results.json"]
        assert archive.read("results.json") == results.read_bytes()
    assert len(first) < results.stat().st_size / 10
    os.utime(results, (10**9, 10**9))
    assert write_submission(results).read_bytes() == first, "the bytes do not depend on time"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.json", "submission.zip"]


@pytest.mark.parametrize("annotations", [None, [], "absent"])
def test_one_line_says_where_it_goes(
    make_gt: Callable[..., Any], tmp_path: Path, annotations: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The json of a hidden split has null, an empty list or nothing for its annotations; no number is made up."""
    path = tmp_path / "gt.json"
    content = make_gt([])
    del content["annotations"]
    path.write_text(json.dumps(content if annotations == "absent" else {**content, "annotations": annotations}))
    name = "ytvis_2021_val"
    before = MetadataCatalog[name]
    del MetadataCatalog[name]
    MetadataCatalog.get(name).set(json_file=str(path), thing_dataset_id_to_contiguous_id={1: 0})
    try:
        evaluator = VideoEvaluator(name, tmp_path / "out")
        evaluator.reset()
        caplog.set_level(logging.INFO, logger="vis")
        assert evaluator.evaluate() == {}
    finally:
        MetadataCatalog[name] = before
    assert zipfile.ZipFile(tmp_path / "out" / "submission.zip").namelist() == ["results.json"]
    (line,) = [record.getMessage() for record in caplog.records if "AP" in record.getMessage()]
    assert "no AP can be computed here" in line
    assert f"submit {tmp_path / 'out' / 'submission.zip'} to the challenge page of the YouTube-VIS benchmark" in line
    assert "nan" not in caplog.text.lower()
