"""Outputs of a recording against those of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from vis.engine.parity.common import Array, Check, chosen, clip_sample, read_npz
from vis.structures import VideoPrediction
from vis.structures.rle import area

#: Largest allowed difference, in units of the recorded array's largest absolute value.
OUTPUT_BAR = 1e-4
#: Runs of one model on other numbers of threads differ by this much of an array's largest value. A mask logit that is
#: nearer to zero than that has no side of its own, so its pixel is not held against an area.
ROUNDING = 3e-6

_RESULTS = ("scores", "labels", "areas")
_SIDE = (".shape", ".stride")


def array_names(recorded: Mapping[str, Array]) -> list[str]:
    """The recorded outputs: neither the input nor the shapes and strides of others."""
    side = {name for name in recorded if name.endswith(_SIDE) and name.rsplit(".", 1)[0] in recorded}
    return [name for name in recorded if name != "input" and name not in side]


def check_outputs(model: nn.Module, path: str | Path, only: Sequence[str] = ()) -> list[Check]:
    """Every array of the ``.npz`` file against what the model gives for its ``input``.

    With ``only``, the arrays whose names begin with one of them. A model that runs other windows than the recorded one
    may then give backbone features of more frames: those of the first are compared.

    Raises:
        FileNotFoundError, ValueError: the file is missing or not of the format, or has no such array.
    """
    recorded = read_npz(path, "input")
    frames = recorded.pop("input")
    names = [name for name in array_names(recorded) if chosen(name, only)]
    if not names:
        raise ValueError(
            f"{path} has no array that begins with {' or '.join(only)}: {', '.join(array_names(recorded))}"
        )
    offered = getattr(model, "parity_outputs", None)
    if offered is None and set(names) - set(_RESULTS):
        return [Check(str(path), False, f"{type(model).__name__} has no parity_outputs(sample): nothing was compared")]

    model.eval()
    sample = clip_sample(frames)
    with torch.no_grad():
        actual = offered(sample) if offered is not None else {}
        found = model([sample])[0] if set(names) & set(_RESULTS) else None
    if only:
        actual = {name: _first_frames(name, array, recorded) for name, array in actual.items()}
    checks = [_check_array(name, recorded, actual) for name in names if name not in _RESULTS]
    if found is not None:
        # Mask logits in track order: recorded ones, or beside them where recorded masks are those of all queries.
        undecided = _undecided_pixels(actual.get("track_masks", actual.get("pred_masks")), frames.shape)
        checks += _check_results(found, recorded, len(frames), undecided)
    return checks


def _first_frames(name: str, found: Tensor, recorded: Mapping[str, Array]) -> Tensor:
    """Backbone features of as many frames as were recorded."""
    if name not in recorded or not name.startswith("backbone."):
        return found
    shape = recorded.get(f"{name}.shape", recorded[name].shape)
    return found[: int(shape[0])]


def _check_array(name: str, recorded: Mapping[str, Array], actual: Mapping[str, Tensor]) -> Check:
    expected = recorded[name]
    if expected.dtype.kind not in "fiub":
        return Check(name, False, f"cannot be compared: an array of {expected.dtype}")
    if name not in actual:
        return Check(name, False, f"unknown array: the model gives {', '.join(sorted(actual)) or 'none'}")
    found = actual[name].detach().cpu().numpy()
    stride = int(recorded.get(f"{name}.stride", 1))
    shape = tuple(int(size) for size in recorded.get(f"{name}.shape", np.asarray(expected.shape)))
    if found.shape != shape:
        return Check(name, False, f"shape {found.shape} instead of {shape}")
    found = found.reshape(-1)[::stride]
    if found.size != expected.size:
        return Check(name, False, f"{expected.size} recorded elements, {found.size} at stride {stride} of {shape}")
    note = f"{shape}" + (f", every {stride}. element" if stride > 1 else "")
    error = relative_error(found, expected.reshape(-1))
    return Check(name, error <= OUTPUT_BAR, f"largest relative error {error:.2e}   {note}")


def relative_error(found: Array, expected: Array) -> float:
    """Largest difference of two flat arrays over the largest finite value of ``expected``; inf if not finite alike."""
    if expected.size == 0:
        return 0.0
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite]) or not np.isfinite(found[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    difference = float(np.abs(found[finite] - expected[finite]).max())
    scale = float(np.abs(expected[finite]).max())
    return difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))


def _undecided_pixels(logits: Tensor | None, frames: tuple[int, ...]) -> Array | None:
    """(Q, T) pixels of each query's mask whose logit is zero but for rounding.

    Args:
        logits: (Q, T, h, w) at a quarter of the frames' size, or None; frames: the shape (T, 3, H, W) of the input.

    Returns:
        None where nobody can say: there are no such logits.
    """
    size = frames[-2:]
    if logits is None or logits.dim() != 4 or tuple(4 * side for side in logits.shape[-2:]) != tuple(size):
        return None
    nearest = ROUNDING * float(logits.abs().max())
    full = (F.interpolate(frame[None].float(), size=size, mode="bilinear", align_corners=False)[0] for frame in logits)
    return np.stack([(query.abs() < nearest).flatten(1).sum(dim=1).cpu().numpy() for query in full])


def _check_results(
    found: VideoPrediction, recorded: Mapping[str, Array], length: int, undecided: Array | None
) -> list[Check]:
    """Scores, labels and areas, both sides sorted by label, then score."""
    if "scores" not in recorded or "labels" not in recorded:
        return [Check("scores, labels, areas", False, "cannot be compared: scores or labels are not recorded")]
    scores, labels = recorded["scores"].astype(np.float64), recorded["labels"].astype(np.int64)
    count = len(found)
    if count != len(scores):
        return [Check("scores, labels, areas", False, f"{count} results instead of {len(scores)}")]
    ours_scores = found.scores.detach().cpu().numpy().astype(np.float64)
    ours_labels = found.labels.detach().cpu().numpy().astype(np.int64)
    order, ours = np.lexsort((scores, labels)), np.lexsort((ours_scores, ours_labels))
    error = relative_error(ours_scores[ours], scores[order])
    equal_labels = int((ours_labels[ours] == labels[order]).sum())
    checks = [
        Check("scores", error <= OUTPUT_BAR, f"largest relative error {error:.2e}   {count} results"),
        Check("labels", equal_labels == count, f"{equal_labels} of {count} equal"),
    ]
    if "areas" in recorded:
        groups = _ties(scores[order], labels[order])
        ours_areas = track_areas(found, length)[ours]
        slack = np.zeros_like(ours_areas)
        tracks = found.track_ids.cpu().numpy()[ours]
        if undecided is not None and undecided.shape[1] == length and len(undecided) > tracks.max(initial=-1):
            slack = undecided[tracks]
        checks.append(_check_areas(ours_areas, recorded["areas"].astype(np.int64)[order], groups, slack))
    return checks


def _ties(scores: Array, labels: Array) -> Array:
    """(N,) group numbers of sorted results: one label and scores too close to tell which comes first share a number."""
    if len(scores) == 0:
        return np.zeros(0, dtype=np.int64)
    apart = (np.diff(labels) != 0) | (np.diff(scores) > OUTPUT_BAR * np.abs(scores).max())
    return np.concatenate([[0], np.cumsum(apart)])


def _check_areas(found: Array, expected: Array, groups: Array, slack: Array) -> Check:
    """Equal but for ``slack`` (N, T) pixels of ``found``, which is said; rows of one group may stand in any order."""
    if found.shape != expected.shape:
        return Check("areas", False, f"shape {found.shape} instead of {expected.shape}")
    apart = np.abs(found[:, None] - expected[None])  # (N, N, T)
    beyond = (apart > slack[:, None]).any(axis=2)
    # The partner of a row is another of its group, if possible one that it equals.
    cost = (groups[:, None] != groups[None]) * 1e6 + beyond * 1e3 + (apart > 0).any(axis=2)
    rows, partners = linear_sum_assignment(cost)
    apart = apart[rows, partners]
    wrong = beyond[rows, partners]
    different = int(wrong.sum())
    rounded = int((apart > 0).any(axis=1).sum()) - different
    count, worst, small = len(found), int(apart[wrong].max(initial=0)), int(apart[~wrong].max(initial=0))
    lines = [f"{different} of {count} tracks differ, by up to {worst} pixels"] if different else []
    if rounded:
        lines.append(
            f"NOT EQUAL in {rounded} of {count} tracks, by up to {small} pixels, all within rounding of a zero logit"
        )
    return Check("areas", different == 0, "; ".join(lines) or f"equal in {count} tracks")


def track_areas(prediction: VideoPrediction, length: int) -> Array:
    """(N, T) mask areas in pixels, 0 where a track has no mask."""
    areas = np.zeros((len(prediction), length), dtype=np.int64)
    for row, masks in zip(areas, prediction.masks, strict=True):
        for frame, rle in enumerate(masks):
            if rle is not None:
                row[frame] = area(rle)
    return areas
