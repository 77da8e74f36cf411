"""Writes a synthetic data set to disk in the YouTube-VIS format."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vis.data.synthetic.png import encode_png
from vis.data.synthetic.presets import CATEGORIES, GENERATOR_VERSION, PRESETS, SPLITS, Preset, occlusion_level
from vis.data.synthetic.render import Frame, render_frame
from vis.data.synthetic.scene import Scene, make_scene
from vis.structures import RLE
from vis.structures.rle import area, encode, to_box

logger = logging.getLogger(__name__)
_LOG_EVERY_SECONDS = 5.0


def video_scene(preset: Preset, seed: int, split: str, index: int) -> Scene:
    """Clip `index` (from 0) of a split. Each clip has a random stream of its own, derived from (generator version,
    seed, preset, split, index): train and val share none, and fewer videos are the first ones of more."""
    names = sorted(PRESETS)
    key = [GENERATOR_VERSION, seed, names.index(preset.name), SPLITS.index(split), index]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    return make_scene(preset, rng, index)


def generate(
    preset: str,
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    splits: tuple[str, ...] = SPLITS,
    num_videos: dict[str, int] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a synthetic data set under `root`; the same arguments give the same bytes.

    Written are `<root>/<preset>/<split>.json` and `<root>/<preset>/<split>/JPEGImages/<video>/<frame>.png`. The json is
    written last: where it exists, its split is complete. A complete split made with the same arguments is left alone.

    Args:
        preset: a name in `PRESETS`.
        root: folder of the data sets; made if it is missing.
        seed: 0 or a positive number.
        splits: some of "train" and "val".
        num_videos: number of videos per split, where it is to differ from the preset's.
        overwrite: replace a split that was made with other arguments.

    Returns:
        split -> {"json_file", "image_root" (str), "videos", "frames", "instances" (int), "classes": {name: instances},
        "written": bool (False: it was there already)}.

    Raises:
        ValueError: an unknown preset or split, a number out of range, or a split on disk that was made with other
            arguments (or by something else) without `overwrite`.
        OSError: a folder that cannot be written, or a full disk; what was written so far is not taken for complete.
    """
    if preset not in PRESETS:
        raise ValueError(f"There is no synthetic data set {preset!r}; expected one of {', '.join(PRESETS)}.")
    unknown = [s for s in (*splits, *(num_videos or {})) if s not in SPLITS]
    if unknown:
        raise ValueError(f"Unknown split {unknown[0]!r} of {preset}; expected {' or '.join(SPLITS)}.")
    if seed < 0:
        raise ValueError(f"The seed is {seed}; expected 0 or a positive number.")
    counts = {s: (num_videos or {}).get(s, PRESETS[preset].num_videos(s)) for s in splits}
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"num_videos[{split!r}] is {count}; expected 1 or more.")
    return {s: _generate_split(PRESETS[preset], Path(root), seed, s, counts[s], overwrite) for s in splits}


def _generate_split(preset: Preset, root: Path, seed: int, split: str, count: int, overwrite: bool) -> dict[str, Any]:
    folder = root / preset.name
    json_file, image_root = folder / f"{split}.json", folder / split / "JPEGImages"
    info = {
        "description": f"{preset.name} {split}: drawn by vis.data.synthetic",
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "split": split,
        "num_videos": count,
        # Through json and back: tuples become lists, so that it compares with what is read from disk.
        "preset": json.loads(json.dumps(asdict(preset))),
    }
    if json_file.exists():
        existing = _existing(json_file, image_root, info, overwrite)
        if existing is not None:
            logger.info("%s is complete; left as it is.", json_file)
            return _summary(existing, json_file, image_root, written=False)
    try:
        json_file.unlink(missing_ok=True)
        data = _write_videos(preset, seed, split, count, image_root)
        data = {"info": info, **data}
        _write_json(data, json_file)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Writing {preset.name} {split} failed ({error.strerror or error}); it needs about 10 kB per frame in a "
            f"folder that can be written to. Make room or choose another root and run it again",
            str(error.filename or folder),
        ) from error
    return _summary(data, json_file, image_root, written=True)


def _existing(json_file: Path, image_root: Path, info: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The content of `json_file` if it is what would be written; None if it is to be replaced."""
    if overwrite:
        try:
            same = _read_if_same(json_file, image_root, info)
        except ValueError:
            return None
        return same
    return _read_if_same(json_file, image_root, info)


def _read_if_same(json_file: Path, image_root: Path, info: dict[str, Any]) -> dict[str, Any]:
    advice = "Give another root, or overwrite=True (--overwrite) to replace it."
    try:
        data = json.loads(json_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{json_file} is not json ({error}). {advice}") from error
    found = data.get("info") if isinstance(data, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{json_file} was not written by this generator (it has no 'info'). {advice}")
    for key, value in info.items():
        if found.get(key) != value:
            raise ValueError(
                f"{json_file} was made with other arguments: {key} is {found.get(key)!r}, expected {value!r}. {advice}"
            )
    for video in data["videos"]:
        for name in video["file_names"]:
            if not (image_root / name).is_file():
                raise ValueError(f"{json_file} names the frame {image_root / name}, which is missing. {advice}")
    return data


def _write_videos(preset: Preset, seed: int, split: str, count: int, image_root: Path) -> dict[str, Any]:
    videos: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    last_log = time.monotonic()
    for index in range(count):
        scene = video_scene(preset, seed, split, index)
        name = f"{split}_{index:04d}"
        frames = _write_frames(scene, image_root / name)
        videos.append(
            {
                "id": index + 1,
                "width": scene.width,
                "height": scene.height,
                "length": scene.length,
                "file_names": [f"{name}/{t:05d}.png" for t in range(scene.length)],
            }
        )
        for k, item in enumerate(scene.objects):
            annotation = _annotation(preset, scene, frames, k)
            if any(s is not None for s in annotation["segmentations"]):
                ids = {"id": len(annotations) + 1, "video_id": index + 1}
                annotations.append({**ids, "category_id": CATEGORIES.index(item.category) + 1, **annotation})
        if time.monotonic() - last_log > _LOG_EVERY_SECONDS:
            logger.info("%s %s: %d of %d videos", preset.name, split, index + 1, count)
            last_log = time.monotonic()
    _remove_other_videos(image_root, split, count)
    categories = [{"id": i + 1, "name": name, "supercategory": "object"} for i, name in enumerate(CATEGORIES)]
    return {"categories": categories, "videos": videos, "annotations": annotations}


def _write_frames(scene: Scene, folder: Path) -> list[Frame]:
    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    for t in range(scene.length):
        frame = render_frame(scene, t)
        (folder / f"{t:05d}.png").write_bytes(encode_png(frame.image))
        frames.append(frame)
    # Frames of an earlier, longer clip of this name.
    for path in folder.glob("*.png"):
        if re.fullmatch(r"\d{5}", path.stem) and int(path.stem) >= scene.length:
            path.unlink()
    return frames


def _remove_other_videos(image_root: Path, split: str, count: int) -> None:
    """Remove the clips from number `count` on, which an earlier, larger or killed run left; nothing else."""
    for folder in sorted(image_root.glob(f"{split}_*")):
        number = folder.name[len(split) + 1 :]
        if re.fullmatch(r"\d{4,}", number) and int(number) >= count:
            shutil.rmtree(folder)


def _annotation(preset: Preset, scene: Scene, frames: list[Frame], k: int) -> dict[str, Any]:
    """One object over the clip: lists of `length` entries, None in the frames that show fewer than `min_area` pixels
    of it."""
    out: dict[str, Any] = {"iscrowd": 0, "width": scene.width, "height": scene.height}
    segmentations: list[RLE | None] = []
    levels: list[str | None] = []
    for frame in frames:
        shown = int(frame.masks[k].sum()) >= preset.min_area
        segmentations.append(encode(frame.masks[k]) if shown else None)
        levels.append(occlusion_level(float(frame.visible[k])) if shown else None)
    out["segmentations"] = segmentations
    out["bboxes"] = [None if s is None else to_box(s) for s in segmentations]
    out["areas"] = [None if s is None else area(s) for s in segmentations]
    out["occlusion"] = levels
    return out


def _write_json(data: dict[str, Any], path: Path) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(data, file, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _summary(data: dict[str, Any], json_file: Path, image_root: Path, *, written: bool) -> dict[str, Any]:
    counts = Counter(CATEGORIES[a["category_id"] - 1] for a in data["annotations"])
    return {
        "json_file": str(json_file),
        "image_root": str(image_root),
        "videos": len(data["videos"]),
        "frames": sum(v["length"] for v in data["videos"]),
        "instances": len(data["annotations"]),
        "classes": {name: counts[name] for name in CATEGORIES},
        "written": written,
    }
