"""The evaluator of a data set: predictions to disk as they arrive, then AP where the ground truth has annotations."""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from vis.config import declare
from vis.evaluation.results_writer import PartWriter, compose_results, part_files, parts_folder, run_key
from vis.evaluation.resume import Identity, identity_of, prepare_parts
from vis.evaluation.submission import benchmark_of, write_submission
from vis.evaluation.ytvis_eval import YTVISResult, evaluate_ytvis
from vis.evaluation.ytvis_io import NoGroundTruth
from vis.structures import ClipSample, VideoPrediction

logger = logging.getLogger(__name__)


_SHARED_FOLDER_S = 60  # a network file system may show a file to other machines this late
_SHOWN = 10  # ids in a message


@declare
def add_config(cfg: CfgNode) -> None:
    """Keys of the evaluation."""
    # An evaluation continues after the last finished video of one that was stopped, where data set, config, weights and
    # code are equal; one that was finished is not computed again. False always starts anew.
    cfg.TEST.RESUME = True


class VideoEvaluator(DatasetEvaluator):
    """detectron2's evaluator interface for video instance segmentation.

    Every finished video goes to ``<output_dir>/parts`` at once; ``evaluate`` composes the parts of all processes into
    ``<output_dir>/results.json``, the file that the servers take, and zips it where a server takes it. Processes share
    nothing but that folder, which therefore must be the same for all of them.

    Args:
        dataset_name: registered name. Its metadata gives the data set's category ids and the json file; neither is
            read before it is needed.
        output_dir: folder for the results; those of another evaluation in it are replaced.
        identity: called by ``reset`` in the main process: what the results will depend on. An evaluation of the same
            identity in ``output_dir`` is continued; None always starts anew.
        resume: False starts anew also where the identity is the same.

    Attributes:
        finished: ids of the videos that need not be computed; known after ``reset``.
        result: numbers of the last ``evaluate`` in the main process, None where there is no ground truth.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | Path,
        *,
        identity: Callable[[], Identity] | None = None,
        resume: bool = True,
    ) -> None:
        self.dataset_name = dataset_name
        self.output_dir = Path(output_dir)
        self.finished: frozenset[int] = frozenset()
        self.result: YTVISResult | None = None
        self._identity = identity
        self._resume = resume
        self._writer: PartWriter | None = None
        self._written: list[int] = []
        self._category_ids: dict[int, int] = {}

    def reset(self) -> None:
        """Find out which videos are finished, and remove the parts of any other evaluation.

        Raises:
            ResultsWriteError: the folder cannot be written.
            FileNotFoundError: another machine's ``output_dir`` is not that of the main process.
        """
        self.result = None
        self._written = []
        self._category_ids = _category_ids(self.dataset_name)
        run, finished = "", frozenset[int]()
        if comm.is_main_process():
            identity = self._identity() if self._identity is not None else None
            run = identity.key if identity is not None else ""
            finished = prepare_parts(self.output_dir, identity, resume=self._resume)
        run, self.finished = comm.all_gather((run, finished))[0]
        if not comm.is_main_process():
            self._await_run(run)
        self._writer = PartWriter(self.output_dir, run)

    def _await_run(self, run: str) -> None:
        """Before hours of work: what the main process wrote can be seen here too."""
        folder = parts_folder(self.output_dir)
        until = time.monotonic() + _SHARED_FOLDER_S
        while not folder.is_dir() or run_key(folder) != run:
            if time.monotonic() > until:
                raise FileNotFoundError(
                    f"{folder}, which the main process has prepared, is not the one that process {comm.get_rank()} "
                    "sees: OUTPUT_DIR must be a folder that all machines share."
                )
            time.sleep(0.5)

    def process(self, inputs: Sequence[ClipSample], outputs: Sequence[VideoPrediction]) -> None:
        """Write the predictions of one batch of videos to disk.

        Raises:
            ValueError: a prediction does not fit its video.
            ResultsWriteError: the disk is full, say; what was written before stays.
        """
        if self._writer is None:
            raise RuntimeError("reset() must be called before process()")
        if len(inputs) != len(outputs):
            raise ValueError(f"{len(inputs)} videos went in, {len(outputs)} predictions came out")
        for sample, prediction in zip(inputs, outputs, strict=True):
            video_id = int(sample["video_id"])
            self._writer.append(video_id, self._entries(sample, prediction, video_id))
            self._written.append(video_id)

    def _entries(self, sample: ClipSample, prediction: VideoPrediction, video_id: int) -> list[dict[str, Any]]:
        if prediction.video_id is not None and int(prediction.video_id) != video_id:
            raise ValueError(f"video {video_id} went in, a prediction for video {prediction.video_id} came out")
        expected = (sample["height"], sample["width"], sample["length"])
        found = (prediction.height, prediction.width, prediction.length)
        if found != expected:
            raise ValueError(
                f"video {video_id}: the prediction is for (height, width, frames) = {found}, the video has {expected}"
            )
        entries = []
        values = zip(
            prediction.scores.tolist(),
            prediction.labels.tolist(),
            prediction.track_ids.tolist(),
            prediction.masks,
            strict=True,
        )
        for score, label, track_id, masks in values:
            if not math.isfinite(score):
                raise ValueError(f"video {video_id}: a score is {score}; the model's outputs are not finite")
            if label not in self._category_ids:
                raise ValueError(
                    f"video {video_id}: the model gives class {label}, {self.dataset_name} has classes 0 to "
                    f"{len(self._category_ids) - 1}; check NUM_CLASSES and the data set"
                )
            if len(masks) != prediction.length:
                raise ValueError(f"video {video_id}: a track has {len(masks)} masks for {prediction.length} frames")
            entries.append(
                {
                    "video_id": video_id,
                    "category_id": self._category_ids[label],
                    "score": score,
                    "track_id": track_id,
                    "segmentations": masks,
                }
            )
        return entries

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Compose ``results.json`` and measure it.

        Returns:
            In the main process ``{"segm": {"AP", "AP50", ..., "AP-<class>", ...}}`` in percent, -1 where the ground
            truth has nothing to measure; empty where it has no annotations, and in the other processes.

        Raises:
            ResultsWriteError: a file cannot be written; the parts stay.
            GroundTruthError, ResultsError, FileNotFoundError: see ``evaluate_ytvis``; ``results.json`` stays.
        """
        if self._writer is None:
            raise RuntimeError("reset() and process() must be called before evaluate()")
        written = comm.gather(self._written)
        if not comm.is_main_process():
            return OrderedDict()
        self._check_parts(self.finished.union(*written))
        path, videos, predictions = compose_results(self.output_dir)
        logger.info("%s: %d predictions for %d videos written to %s", self.dataset_name, predictions, videos, path)
        benchmark = benchmark_of(self.dataset_name)
        archive = write_submission(path) if benchmark is not None else None
        submit = f"submit {archive} to {benchmark.page}" if benchmark is not None else f"the results are in {path}"
        try:
            self.result = evaluate_ytvis(self._ground_truth(), path)
        except NoGroundTruth:
            logger.info(
                "%s: no AP can be computed here, because its json (%s) has no annotations: %s",
                self.dataset_name,
                MetadataCatalog.get(self.dataset_name).get("json_file"),
                submit,
            )
            return OrderedDict()
        if archive is not None:
            logger.info("%s: to have it measured by the benchmark's server, %s", self.dataset_name, submit)
        logger.info("%s, percent:\n%s", self.dataset_name, self.result.table())
        return OrderedDict(segm={**self.result.percent(), **self.result.class_percent()})

    def _check_parts(self, expected: Collection[int]) -> None:
        missing = sorted(set(expected) - part_files(parts_folder(self.output_dir)).keys())
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} videos that were computed (ids {missing[:_SHOWN]}) are not in "
                f"{parts_folder(self.output_dir)}: OUTPUT_DIR must be a folder that all machines share, and no other "
                "evaluation may run in it at the same time. Evaluate again: it continues with those videos."
            )

    def _ground_truth(self) -> Mapping[str, Any]:
        """The content of the data set's json; a json of images (COCO) is put in the same form from its records."""
        try:
            json_file = MetadataCatalog.get(self.dataset_name).get("json_file")
            content = json.loads(Path(json_file).read_bytes()) if json_file is not None else None
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the ground truth of {self.dataset_name} is not there (anymore): {error}. The results are in "
                f"{self.output_dir / 'results.json'}; `python tools/evaluate.py --gt ... --results ...` measures them."
            ) from error
        if isinstance(content, Mapping) and "videos" in content:
            return self._chosen(content)
        return self._from_records(DatasetCatalog.get(self.dataset_name))

    def _chosen(self, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """``content`` with the videos that the data set consists of, where it is a part of its json."""
        chosen = MetadataCatalog.get(self.dataset_name).get("video_ids")
        if chosen is None:
            return content
        parts = {"videos": "id", "annotations": "video_id"}
        kept = {key: [e for e in content.get(key) or () if e.get(of) in chosen] for key, of in parts.items()}
        return {**content, **kept, "annotations": kept["annotations"] if content.get("annotations") else None}

    def _from_records(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = MetadataCatalog.get(self.dataset_name).thing_classes
        annotated = any("annotations" in record for record in records)
        return {
            "videos": [
                {"id": r["video_id"], "height": r["height"], "width": r["width"], "length": r["length"]}
                for r in records
            ],
            "categories": [{"id": i, "name": names[label]} for label, i in sorted(self._category_ids.items())],
            "annotations": [
                {**a, "video_id": r["video_id"], "category_id": self._category_ids[a["category_id"]]}
                for r in records
                for a in r.get("annotations") or ()
            ]
            if annotated
            else None,
        }


def _category_ids(dataset_name: str) -> dict[int, int]:
    """Contiguous class -> the data set's category id."""
    contiguous = MetadataCatalog.get(dataset_name).get("thing_dataset_id_to_contiguous_id")
    if not contiguous:
        raise ValueError(
            f"data set {dataset_name!r} has no thing_dataset_id_to_contiguous_id in its metadata, so labels cannot be "
            "turned into its category ids. Is it registered? A data set of your own is registered by DATASETS.CUSTOM."
        )
    return {label: category_id for category_id, label in contiguous.items()}


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | Path | None = None, *, model: nn.Module | None = None
) -> VideoEvaluator:
    """The evaluator of a data set.

    Args:
        cfg: gives ``OUTPUT_DIR`` and ``TEST.RESUME``.
        dataset_name: registered name.
        output_folder: where the results go; default ``OUTPUT_DIR/inference/<dataset_name>``.
        model: the model to be evaluated, with its weights: an evaluation of the same that was stopped is continued.
    """
    folder = Path(output_folder) if output_folder else Path(cfg.OUTPUT_DIR) / "inference" / dataset_name
    identity = None if model is None else functools.partial(identity_of, cfg, dataset_name, model)
    return VideoEvaluator(dataset_name, folder, identity=identity, resume=cfg.TEST.RESUME)
