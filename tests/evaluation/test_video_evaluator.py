"""The evaluator of a data set and the loop over it: category ids, files, AP or one line why not, failures."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from torch import nn

from vis.config import get_cfg
from vis.evaluation import (
    ResultsWriteError,
    VideoEvaluator,
    VideoInferenceError,
    build_evaluator,
    inference_on_dataset,
    iter_parts,
)
from vis.evaluation import video_evaluator as module
from vis.structures import VideoPrediction

NAME = "evaluator_test_videos"
A, B = (1, 1, 5, 5), (6, 6, 10, 12)
Make = Callable[..., Any]


@pytest.fixture
def dataset(make_gt: Make, tmp_path: Path) -> Iterator[Path]:
    """Two annotated videos (ids 7 and 9) with categories 1, 2, 5, which are classes 2, 0, 1; returns the json file."""
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(make_gt([(7, 1, [A] * 4, 0), (9, 5, [B] * 4, 0)])))
    MetadataCatalog.get(NAME).set(
        json_file=str(path),
        thing_classes=["class2", "class5", "class1"],
        thing_dataset_id_to_contiguous_id={2: 0, 5: 1, 1: 2},
    )
    yield path
    MetadataCatalog.pop(NAME)


def sample(video_id: int) -> dict[str, Any]:
    frames = [torch.zeros(3, 22, 26, dtype=torch.uint8)] * 4
    names = [f"/data/clip{video_id}/{t}.jpg" for t in range(4)]
    return {"video_id": video_id, "height": 11, "width": 13, "length": 4, "image": frames, "file_names": names}


@pytest.fixture
def predict(make_masks: Make) -> Make:
    def make(video_id: int, tracks: Any = (), /, **changes: Any) -> VideoPrediction:
        """Tracks: (class, score, boxes)."""
        values = {
            "scores": torch.tensor([t[1] for t in tracks]),
            "labels": torch.tensor([t[0] for t in tracks], dtype=torch.int64),
            "track_ids": torch.arange(len(tracks)) + 40,
            "masks": [make_masks(t[2]) for t in tracks],
            "height": 11,
            "width": 13,
            "length": 4,
            "video_id": video_id,
        }
        return VideoPrediction(**{**values, **changes})

    return make


def test_writes_results_with_the_data_sets_ids_and_measures_them(dataset: Path, predict: Make, tmp_path: Path) -> None:
    evaluator = VideoEvaluator(NAME, tmp_path / "out")
    evaluator.reset()
    evaluator.process([sample(9)], [predict(9, [(1, 0.5, [B, None, B, B])], video_id=None)])
    evaluator.process([sample(7)], [predict(7, [(2, 0.75, [A] * 4), (0, 0.25, [A] * 4)])])
    found = evaluator.evaluate()["segm"]
    entries = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(e["video_id"], e["category_id"], e["score"]) for e in entries] == [(7, 1, 0.75), (7, 2, 0.25), (9, 5, 0.5)]
    assert entries[2]["segmentations"][1] is None
    assert set(entries[0]) == {"video_id", "category_id", "score", "segmentations"}
    assert list(found)[:8] == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10"]
    assert found["AP-class1"] == pytest.approx(100)
    assert found["AP-class5"] == pytest.approx(60)  # IoU 3/4: thresholds 0.5 to 0.75
    assert found["AP-class2"] == found["APl"] == -1
    assert evaluator.result is not None


def test_only_the_chosen_videos_of_a_json_count(dataset: Path, predict: Make, tmp_path: Path) -> None:
    MetadataCatalog.get(NAME).set(video_ids=(7,))
    evaluator = VideoEvaluator(NAME, tmp_path / "out")
    evaluator.reset()
    evaluator.process([sample(7)], [predict(7, [(2, 0.9, [A] * 4)])])
    results = evaluator.evaluate()["segm"]
    assert (results["AP"], results["AP-class1"]) == pytest.approx((100.0, 100.0))
    assert results["AP-class5"] == -1.0  # its only object is in the video that is left out


def test_line_instead_of_ap_without_annotations(
    dataset: Path, predict: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset.write_text(json.dumps({**json.loads(dataset.read_text()), "annotations": None}))
    evaluator = VideoEvaluator(NAME, tmp_path / "out")
    evaluator.reset()
    evaluator.process([sample(7)], [predict(7)])
    with caplog.at_level(logging.INFO, logger="vis"):
        assert not evaluator.evaluate()
    lines = [r.getMessage() for r in caplog.records if "no AP" in r.getMessage()]
    assert len(lines) == 1
    assert str(tmp_path / "out" / "results.json") in lines[0]
    assert "nan" not in caplog.text


def test_json_of_images_is_measured_from_its_records(
    dataset: Path, predict: Make, make_masks: Make, tmp_path: Path
) -> None:
    dataset.write_text(json.dumps({"images": [{"id": 3}], "annotations": []}))
    annotation = {"id": 5, "category_id": 1, "iscrowd": 0, "segmentations": make_masks([A]), "bboxes": [None]}
    record = {"video_id": 3, "height": 11, "width": 13, "length": 1, "file_names": ["a"], "annotations": [annotation]}
    DatasetCatalog.register(NAME, lambda: [record])
    try:
        evaluator = VideoEvaluator(NAME, tmp_path / "out")
        evaluator.reset()
        image = {**sample(3), "length": 1}
        evaluator.process([image], [predict(3, [(1, 0.5, [A])], length=1)])
        assert evaluator.evaluate()["segm"]["AP-class5"] == pytest.approx(100)
    finally:
        DatasetCatalog.pop(NAME)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_id": 8}, "video 7 went in, a prediction for video 8"),
        ({"height": 22}, r"\(22, 13, 4\), the video has \(11, 13, 4\)"),
        ({"scores": torch.tensor([float("nan")])}, "video 7: a score is nan"),
        ({"labels": torch.tensor([3])}, "class 3, .* has classes 0 to 2"),
        ({"masks": [[None] * 3]}, "3 masks for 4 frames"),
    ],
)
def test_prediction_that_does_not_fit(
    dataset: Path, predict: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    evaluator = VideoEvaluator(NAME, tmp_path)
    evaluator.reset()
    with pytest.raises(ValueError, match=message):
        evaluator.process([sample(7)], [predict(7, [(0, 0.5, [A] * 4)], **changes)])
    with pytest.raises(ValueError, match="1 videos went in, 0"):
        evaluator.process([sample(7)], [])


def test_metadata_without_ids_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'evaluator_test_nothing' has no thing_dataset_id"):
        VideoEvaluator("evaluator_test_nothing", tmp_path).reset()
    MetadataCatalog.pop("evaluator_test_nothing")


def test_ground_truth_that_went_away_leaves_the_results(dataset: Path, predict: Make, tmp_path: Path) -> None:
    evaluator = VideoEvaluator(NAME, tmp_path)
    evaluator.reset()
    evaluator.process([sample(7)], [predict(7)])
    dataset.unlink()
    with pytest.raises(FileNotFoundError, match="results are in .*results.json"):
        evaluator.evaluate()
    assert (tmp_path / "results.json").is_file()


class Ranks:
    """Stands for detectron2's comm in one of two processes that are run one after the other."""

    def __init__(self) -> None:
        self.rank = 0
        self.said: dict[str, list[Any]] = {}

    def get_rank(self) -> int:
        return self.rank

    def is_main_process(self) -> bool:
        return self.rank == 0

    def all_gather(self, value: Any) -> list[Any]:
        return self._add("all", value)

    def gather(self, value: Any) -> list[Any]:
        return self._add("one", value)

    def _add(self, kind: str, value: Any) -> list[Any]:
        self.said[kind] = [*self.said.get(kind, []), value]
        return self.said[kind]


def test_processes_meet_on_disk(dataset: Path, predict: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = Ranks()
    monkeypatch.setattr(module, "comm", comm)
    evaluators = [VideoEvaluator(NAME, tmp_path / "out") for _ in range(2)]
    (tmp_path / "out" / "parts").mkdir(parents=True)
    (tmp_path / "out" / "parts" / "video_3.jsonl").write_text("of an earlier run\n")
    for comm.rank, (video, track) in enumerate([(7, (2, 0.75, [A] * 4)), (9, (1, 0.5, [B] * 4))]):
        evaluators[comm.rank].reset()
        evaluators[comm.rank].process([sample(video)], [predict(video, [track])])
    assert evaluators[1].evaluate() == {}
    comm.rank = 0
    assert evaluators[0].evaluate()["segm"]["AP"] == pytest.approx(100)
    (tmp_path / "out" / "parts" / "video_9.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 videos that were computed \(ids \[9\]\).*all machines share"):
        evaluators[0].evaluate()


def test_folder_that_is_not_shared(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = Ranks()
    monkeypatch.setattr(module, "comm", comm)
    monkeypatch.setattr(module, "_SHARED_FOLDER_S", 0)
    VideoEvaluator(NAME, tmp_path / "of machine 0").reset()
    comm.rank = 1
    with pytest.raises(FileNotFoundError, match="process 1 sees: OUTPUT_DIR must be a folder that all machines share"):
        VideoEvaluator(NAME, tmp_path / "of machine 1").reset()


class Model(nn.Module):
    """Perfect for video 7; video 9 may fail."""

    def __init__(self, predict: Make, fail: Exception | None = None) -> None:
        super().__init__()
        self.frozen, self.head = nn.Dropout(), nn.Dropout()
        self.frozen.eval()
        self.predict, self.fail = predict, fail

    def forward(self, batch: list[Any]) -> list[VideoPrediction]:
        assert not self.head.training
        assert torch.is_inference_mode_enabled()
        (video,) = batch
        if video["video_id"] == 9 and self.fail:
            raise self.fail
        return [self.predict(video["video_id"], [(2, 0.5, [A] * 4)] if video["video_id"] == 7 else [])]


def test_inference_on_dataset(dataset: Path, predict: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Model(predict)
    evaluator = DatasetEvaluators([VideoEvaluator(NAME, tmp_path / "out")])
    with caplog.at_level(logging.INFO, logger="vis"):
        found = inference_on_dataset(model, [[sample(7)], [sample(9)]], evaluator, log_period_s=0)
    assert found["segm"]["AP-class1"] == pytest.approx(100)
    assert (model.training, model.head.training, model.frozen.training) == (True, True, False)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("inference")]
    assert lines[0].startswith("inference: 1/2 videos, 4 frames, ")
    assert "eta 0:00:00" in lines[0]
    assert "peak memory" in lines[0]
    assert lines[-1].startswith("inference done: 2/2 videos, 8 frames, ")


def test_loader_without_length(dataset: Path, predict: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vis"):
        inference_on_dataset(Model(predict), iter([[sample(7)]]), VideoEvaluator(NAME, tmp_path), log_period_s=0)
    assert "inference: 1 videos, 4 frames" in caplog.text


def test_failing_video_is_named_and_the_others_are_kept(dataset: Path, predict: Make, tmp_path: Path) -> None:
    model = Model(predict, fail=ValueError("the frame is torn"))
    with pytest.raises(
        VideoInferenceError, match=r"video 9 \(4 frames, frames in /data/clip9\): ValueError: the fr"
    ) as e:
        inference_on_dataset(model, [[sample(7)], [sample(9)]], VideoEvaluator(NAME, tmp_path))
    assert e.match(f"videos finished so far are kept in {tmp_path}; evaluating again continues")
    assert isinstance(e.value.__cause__, ValueError)
    assert isinstance(e.value, ValueError), "something that a user can put right"
    assert model.training
    assert [video for video, _ in iter_parts(tmp_path)] == [7]
    with pytest.raises(VideoInferenceError) as error:
        inference_on_dataset(
            Model(predict, fail=RuntimeError("a kernel")), [[sample(9)]], VideoEvaluator(NAME, tmp_path)
        )
    assert not isinstance(error.value, ValueError)


def test_write_error_is_not_blamed_on_the_video(dataset: Path, predict: Make, tmp_path: Path) -> None:
    model = Model(predict, fail=ResultsWriteError("full"))
    with pytest.raises(ResultsWriteError, match="full"):
        inference_on_dataset(model, [[sample(9)]], VideoEvaluator(NAME, tmp_path))


def test_build_evaluator() -> None:
    cfg = get_cfg()
    cfg.OUTPUT_DIR = "somewhere"
    assert build_evaluator(cfg, NAME).output_dir == Path("somewhere/inference") / NAME
    assert build_evaluator(cfg, NAME, "elsewhere").output_dir == Path("elsewhere")
