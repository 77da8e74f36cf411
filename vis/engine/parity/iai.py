"""Replays of the recordings of the released IAI, which hold runs of whole videos, single modules and training steps.

One file holds everything. Its arrays are named after the run they are of: ``f0.enc``, ``forced.det.box``, ``hab.out``,
``train.bn_eval.b1.losses``; whichever runs of the format are there are compared. The settings of a run are not in the
file; they are those under which its name was recorded (:data:`RUNS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vis.engine.parity.common import Array, Check, read_npz
from vis.engine.parity.compared import Comparison
from vis.engine.parity.iai_margins import assignment_margin, compare_margins, detection_margins
from vis.engine.parity.iai_parts import check_parts
from vis.engine.parity.iai_training import check_training
from vis.modeling.criterions.iai import paint
from vis.modeling.detectors.masks import original_masks
from vis.modeling.inference.growing import FrameSizes, GrowingTracks, ResultRules
from vis.modeling.meta_arch.iai import IAI
from vis.modeling.trackers.identified_frames import RANK_FIRST, RANK_LATER, FrameResult, VideoState
from vis.modeling.trackers.identity import exclusive
from vis.structures.rle import area

#: Under which all of it was recorded.
OPTIONS: list[Any] = [
    *("MODEL.IAI.RELEASED.OVERFLOW", True),
    *("MODEL.IAI.RELEASED.UNASSIGNED_NEW", True),
    *("MODEL.IAI.RELEASED.TRAIN_MEMORY", True),
    *("MODEL.IAI.MAX_GLOBAL_FRAMES", -1),
    *("MODEL.IAI.ID_SHUFFLE", False),
    *("MODEL.IAI.SEQUENTIAL", True),
    *("MODEL.IAI.DROP_PATH", 0.0),
]
_LEVELS = ("p3", "p4", "p5", "p6", "p7")


@dataclass(frozen=True)
class Run:
    """Settings of a recorded run.

    Attributes:
        clip: name of its frames; repeats: how often they are shown.
        thresholds: of class and id scores, None: the configuration's; max_num: detections of a frame and results of the
            video, 0: the configuration's.
        new: with the given masks in memory, whether an object is new, by frame; None: the model's own masks.
        output: original size, None: that of the frames.
        bar: largest relative error; pixels: largest difference of an area. Where own masks feed back, one flipped pixel
            moves all later features.
    """

    clip: str = "input"
    repeats: int = 1
    thresholds: tuple[float, float] | None = None
    max_num: int = 0
    new: tuple[bool, ...] | None = None
    output: tuple[int, int] | None = None
    bar: float = 2e-3
    pixels: int = 40


RUNS: dict[str, Run] = {
    "": Run(),
    "forced.": Run(new=(True, True, False, False, False, False), bar=1e-4),
    "strict.": Run(thresholds=(0.9, 0.88), max_num=6),
    "sparse.": Run(thresholds=(0.93, 0.8), max_num=5),
    "pad.": Run(clip="pad.input", output=(150, 230), max_num=5),
    "long.": Run(repeats=3, new=(False,) * 18, bar=1e-4),
}


def replay(model: nn.Module, path: str | Path, refill: Callable[[], None], only: Sequence[str] = ()) -> list[Check]:
    """Every array of the file that begins with one of ``only`` (if any), against the model.

    Args:
        refill: gives the model the recorded weights again; training steps move statistics.

    Raises:
        FileNotFoundError, ValueError: the file is missing or not of the format.
    """
    assert isinstance(model, IAI)
    recorded = read_npz(path, "input")
    compared = Comparison(recorded, only)
    model.eval()
    with torch.no_grad():
        compared.close("norm", model.normalizer(list(torch.from_numpy(recorded["input"]))), 1e-4)
        for prefix, run in RUNS.items():
            if f"{prefix}det.num" in recorded and compared.wanted(prefix):
                _replay(model, prefix, run, compared)
        check_parts(model, compared)
    check_training(model, compared, recorded_masks(recorded), refill)
    refill()
    compared.skip(lambda name: name in ("pad.input",) or name.startswith("gt.masks."), "input")
    return compared.finished()


def given_maps(recorded: Mapping[str, Array], repeats: int, num_ids: int) -> Tensor:
    """(T, H, W) uint8: identity maps of the recorded masks, instance i in channel i."""
    masks = recorded_masks(recorded)
    channels = torch.arange(len(masks))
    maps = torch.stack([paint(masks[:, t], channels, num_ids) for t in range(masks.shape[1])])
    return maps.repeat(repeats, 1, 1)


def recorded_masks(recorded: Mapping[str, Array]) -> Tensor:
    """(N, T, H, W) bool."""
    shape = tuple(int(size) for size in recorded["gt.masks.dims"])
    bits = np.unpackbits(recorded["gt.masks.bits"])[: int(np.prod(shape))]
    return torch.from_numpy(bits.reshape(shape).astype(bool))


@contextmanager
def _settings(model: Any, run: Run) -> Iterator[ResultRules]:
    """The model under the settings of a run."""
    detector = model.image_model
    before = (detector.class_threshold, detector.id_threshold, detector.max_detections)
    rules = model.rules
    if run.thresholds is not None:
        detector.class_threshold, detector.id_threshold = run.thresholds
    if run.max_num:
        detector.max_detections = run.max_num
        rules = ResultRules(
            score_type=rules.score_type, threshold=rules.threshold, max_num=run.max_num, drop_noise=False
        )
    try:
        yield rules
    finally:
        detector.class_threshold, detector.id_threshold, detector.max_detections = before


class _Video:
    """Arrays of a run, one entry for each frame."""

    def __init__(self) -> None:
        self.columns: list[list[int]] = []
        self.next_ids: list[int] = []
        self.rows: dict[str, list[Any]] = {}

    def add(self, **values: Any) -> None:
        for name, value in values.items():
            self.rows.setdefault(name, []).append(value)

    def padded(self, name: str, width: int) -> Tensor:
        """(T, M, ...) rows of frames, -1 beyond each frame's own."""
        return _padded([torch.as_tensor(row) for row in self.rows[name]], width)


def _padded(rows: list[Tensor], width: int) -> Tensor:
    """Rows of different lengths below one another, at least ``width`` long."""
    longest = max((len(row) for row in rows), default=0)
    tail = rows[0].shape[1:] if rows else ()
    out = torch.full((len(rows), max(longest, width), *tail), -1, dtype=rows[0].dtype if rows else torch.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


def _replay(model: IAI, prefix: str, run: Run, compared: Comparison) -> None:
    frames = torch.from_numpy(compared.recorded[run.clip]).repeat(run.repeats, 1, 1, 1)
    size = (int(frames.shape[-2]), int(frames.shape[-1]))
    images = model.normalizer(list(frames))
    sizes = FrameSizes((int(images.shape[-2]), int(images.shape[-1])), size, run.output or size)
    maps = given_maps(compared.recorded, run.repeats, model.num_ids) if run.new is not None else None
    state, video = VideoState(), _Video()
    with _settings(model, run) as rules:
        tracks = GrowingTracks(rules)
        for t in range(len(images)):
            features = model.image_model.bottom_up(images[t, None])
            given = None if maps is None or run.new is None else (maps[t], run.new[t])
            first, known = state.identities.length == 0, state.identities.next_id
            result, state = model.step(features, sizes, state, given)
            tracks.add(*model.report(result, sizes))
            written, new = (result.labels, result.identified.new) if given is None else given
            _frame_arrays(model, f"{prefix}f{t}.", result, state, compared, run)
            _collect(video, model, result, state, sizes, written, new)
            video.add(margins=detection_margins(model, result, size, RANK_FIRST if first else RANK_LATER))
            if not first and len(result.found):
                video.columns.append(result.identified.columns or [])
                assert result.found.id_probs is not None
                margin = assignment_margin(result.found.id_probs[result.kept], known)
                video.add(assign=margin)
    _compare_video(video, prefix, run, compared, model)
    _compare_results(tracks, video, prefix, run, compared, model)


def _frame_arrays(
    model: IAI, prefix: str, result: FrameResult, state: VideoState, compared: Comparison, run: Run
) -> None:
    """Features and memories of a frame."""
    memory = state.memory
    assert result.current is not None
    assert memory.before is not None
    keys, values = memory.before.layers[0]
    size = result.current.size
    tokens = sum(frame.layers[0].keys.shape[1] for frame in memory.stored)
    compared.equal(f"{prefix}mem.sizes", torch.tensor([tokens, 1, keys.shape[2], 1, keys.shape[2], *size]))
    compared.equal(f"{prefix}mem.steps", torch.tensor([memory.step, memory.last]))
    if f"{prefix}enc" not in compared.recorded:
        return
    dim = model.association.dim if model.association is not None else 0
    heads = model.image_model.head(result.pyramid)  # type: ignore[operator]
    found = {
        "enc": result.replaced[:, :dim],
        "hab": result.replaced[:, dim : 2 * dim],
        "c5p": result.replaced,
        "maskfeat": model.image_model.mask_features(result.pyramid),  # type: ignore[operator]
        "mem.local_k": keys.transpose(1, 2).unflatten(2, size),
        "mem.local_v": values.transpose(1, 2).unflatten(2, size),
    }
    for i, level in enumerate(_LEVELS):
        found |= {
            f"fpn.{level}": result.pyramid[level],
            f"cls.{level}": heads.logits[i],
            f"id.{level}": heads.ids[i],
            f"ctr.{level}": heads.centerness[i],
            f"box.{level}": heads.boxes[i],
            f"ctrl.{level}": heads.params[i],
        }
    for name, array in found.items():
        compared.close(prefix + name, array, run.bar)


def _collect(
    video: _Video,
    model: IAI,
    result: FrameResult,
    state: VideoState,
    sizes: FrameSizes,
    written: Tensor,
    new: bool,
) -> None:
    """What a frame adds to the arrays of the video."""
    found, ids = result.found, result.identified.ids
    assert found.id_probs is not None
    factors = [sizes.output[1] / sizes.input[1], sizes.output[0] / sizes.input[0]] * 2
    masks = original_masks(result.probs, input_size=sizes.input, output_size=sizes.output)
    output = exclusive(masks[result.kept])
    out_area, scores = torch.zeros(model.num_ids, dtype=torch.int64), torch.zeros(model.num_ids, model.num_classes + 1)
    for row, identity in enumerate(ids):
        out_area[identity] = output[row].sum()
        scores[identity, :-1] = found.class_probs[result.kept[row]]
    counts = torch.bincount(written.flatten().long(), minlength=256)
    video.add(
        num=len(found),
        candidates=found.candidates,
        box=torch.cat([found.boxes * torch.tensor(factors), found.scores[:, None]], dim=1),
        id=torch.nn.functional.pad(found.id_probs, (0, 1)),
        cls=torch.nn.functional.pad(found.class_probs, (0, 1)),
        pad_area=(result.probs > 0.5).flatten(1).sum(dim=1),
        out_area=masks.flatten(1).sum(dim=1),
        idmap=written,
        idarea=counts[: model.num_ids + 1],
        outarea=out_area,
        frame_cls=scores,
        new_next=torch.tensor([int(new), state.identities.next_id]),
    )
    video.next_ids.append(state.identities.next_id)


def _compare_video(video: _Video, prefix: str, run: Run, compared: Comparison, model: IAI) -> None:
    def width(name: str) -> int:
        recorded = compared.recorded.get(f"{prefix}det.{name}")
        return recorded.shape[1] if recorded is not None and recorded.ndim > 1 else 0

    for name in ("num", "candidates"):
        compared.equal(f"{prefix}det.{name}", torch.tensor(video.rows[name]))
    for name in ("box", "id", "cls"):
        compared.close(f"{prefix}det.{name}", video.padded(name, width(name)), run.bar)
    for name in ("pad_area", "out_area"):
        compared.pixels(f"{prefix}det.{name}", video.padded(name, width(name)), run.pixels)
    if f"{prefix}det.assigned_column" in compared.recorded:
        rows = [torch.tensor(row, dtype=torch.int64) for row in video.columns]
        columns = _padded(rows, width("assigned_column"))
        name = f"{prefix}det.assigned_column"
        # Columns from N + 1 on are copies of "new", column N - 1: which of them one has is no difference.
        compared.equal(name, columns, alike=lambda x: np.where(x > model.num_ids, model.num_ids - 1, x))
    compared.differing(f"{prefix}frame.idmap", torch.stack(video.rows["idmap"]), run.pixels)
    for name in ("idarea", "outarea"):
        compared.pixels(f"{prefix}frame.{name}", torch.stack(video.rows[name]), run.pixels)
    compared.close(f"{prefix}frame.cls", torch.stack(video.rows["frame_cls"]), run.bar)
    compared.equal(f"{prefix}frame.new_next", torch.stack(video.rows["new_next"]))
    compare_margins(compared, f"{prefix}margin.thr_rank_nms", torch.stack(video.rows["margins"]), run.bar)
    if f"{prefix}margin.assign" in compared.recorded:
        compare_margins(compared, f"{prefix}margin.assign", torch.tensor(video.rows.get("assign", [])), run.bar)


def _compare_results(
    tracks: GrowingTracks, video: _Video, prefix: str, run: Run, compared: Comparison, model: IAI
) -> None:
    """Results in the order of identity and label, of which none comes twice."""
    scores, labels, ids = tracks.results()
    areas = torch.zeros(len(ids), len(tracks), dtype=torch.int64)
    for row, identity in enumerate(ids.tolist()):
        for t, rle in enumerate(tracks.masks(identity)):
            areas[row, t] = 0 if rle is None else area(rle)
            if identity >= video.next_ids[t]:
                areas[row, t] = -1  # as the release, for an identity that is not yet given out
    recorded = compared.recorded
    theirs = np.lexsort((recorded[f"{prefix}res.labels"], recorded[f"{prefix}res.track"]))
    ours = torch.from_numpy(np.lexsort((labels.numpy(), ids.numpy())))
    compared.equal(f"{prefix}res.track", ids[ours], order=theirs)
    compared.equal(f"{prefix}res.labels", labels[ours], order=theirs)
    compared.close(f"{prefix}res.scores", scores[ours], run.bar, order=theirs)
    compared.pixels(f"{prefix}res.areas", areas[ours], run.pixels, order=theirs)
