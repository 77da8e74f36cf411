"""The embedded data sets: bytes, pictures, masks, occlusion, and what ends up on disk."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import runpy
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vis.data.synthetic import CATEGORIES, PRESETS, generate, occlusion_level
from vis.data.synthetic import writer as synthetic_writer
from vis.data.synthetic.png import encode_png
from vis.data.synthetic.render import Frame, render_frame
from vis.data.synthetic.scene import Scene
from vis.data.synthetic.shapes import EXTENT, SHAPES, TEXTURES
from vis.data.synthetic.writer import video_scene
from vis.structures.rle import area, decode, to_box

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {"train": 7, "val": 2}


@pytest.fixture(scope="module")
def mild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mild")
    generate("synthetic_ytvis", root, seed=3, num_videos=SMALL)
    return root / "synthetic_ytvis"


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heavy")
    generate("synthetic_ovis", root, seed=3, num_videos={"train": 2, "val": 1})
    return root / "synthetic_ovis"


@pytest.fixture(scope="module")
def heavy_clips() -> list[tuple[Scene, list[Frame]]]:
    scenes = [video_scene(PRESETS["synthetic_ovis"], 3, "train", i) for i in range(4)]
    return [(scene, [render_frame(scene, t) for t in range(scene.length)]) for scene in scenes]


def read(folder: Path, split: str) -> dict:
    return json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))


def tree_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def longest_run(flags: np.ndarray) -> int:
    best = run = 0
    for flag in flags:
        run = run + 1 if flag else 0
        best = max(best, run)
    return best


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(mild: Path, tmp_path: Path):
    generate("synthetic_ytvis", tmp_path / "again", seed=3, num_videos=SMALL)
    generate("synthetic_ytvis", tmp_path / "other", seed=4, num_videos=SMALL)
    assert tree_hash(tmp_path / "again" / "synthetic_ytvis") == tree_hash(mild)
    assert tree_hash(tmp_path / "other" / "synthetic_ytvis") != tree_hash(mild)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("synthetic_ytvis", "6e9b540a833313ab"), ("synthetic_ovis", "f28a402c0096b3f0")],
)
def test_bytes_are_those_recorded(preset: str, expected: str):
    # If this fails after a change to the generator, raise GENERATOR_VERSION and record the new values. If it fails on
    # another machine only, the promise "the same bytes everywhere" is broken.
    digest = hashlib.sha256()
    for split in ("train", "val"):
        scene = video_scene(PRESETS[preset], 0, split, 5)
        for t in range(0, scene.length, 3):
            frame = render_frame(scene, t)
            digest.update(encode_png(frame.image) + np.packbits(frame.masks).tobytes())
    assert digest.hexdigest()[:16] == expected


def test_fewer_videos_are_the_first_of_more(mild: Path, tmp_path: Path):
    generate("synthetic_ytvis", tmp_path, seed=3, splits=("val",), num_videos={"val": 1})
    few, more = read(tmp_path / "synthetic_ytvis", "val"), read(mild, "val")
    assert few["videos"] == more["videos"][:1]
    assert few["annotations"] == [a for a in more["annotations"] if a["video_id"] == 1]


def test_train_and_val_share_no_clip(mild: Path):
    hashes: dict[str, set[str]] = {}
    for split in SMALL:
        frames = (mild / split / "JPEGImages").rglob("*.png")
        hashes[split] = {hashlib.sha256(p.read_bytes()).hexdigest() for p in frames}
    assert hashes["train"]
    assert not hashes["train"] & hashes["val"]


def test_png_is_lossless_also_for_noise():
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.integers(-1, 2, (13, 29, 3)), axis=1).astype(np.uint8)
    for image in (rng.integers(0, 256, (11, 17, 3)).astype(np.uint8), smooth, np.zeros((1, 1, 3), np.uint8)):
        with Image.open(io.BytesIO(encode_png(image))) as picture:
            assert picture.mode == "RGB"
            assert np.array_equal(np.asarray(picture), image)


def test_png_refuses_other_arrays():
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8"):
        encode_png(np.zeros((5, 7), np.uint8))


# --- pictures and masks -----------------------------------------------------------------------------------------------


def test_every_class_has_its_own_shape_and_texture():
    assert set(SHAPES) == set(TEXTURES) == set(CATEGORIES)
    assert len(CATEGORIES) >= 6
    v, u = (a.astype(np.float32) for a in np.mgrid[-1.5:1.5:97j, -1.5:1.5:97j])
    shapes = {name: inside(u, v) for name, inside in SHAPES.items()}
    grain = np.random.default_rng(0).integers(0, 2, (8, 8)).astype(np.float32)
    textures = {name: texture(u, v, 2.0, grain) for name, texture in TEXTURES.items()}
    for i, a in enumerate(CATEGORIES):
        assert not shapes[a][u * u + v * v > EXTENT**2].any()
        assert textures[a].min() >= 0
        assert textures[a].max() <= 1
        for b in CATEGORIES[i + 1 :]:
            assert (shapes[a] ^ shapes[b]).sum() > 0.15 * (shapes[a] | shapes[b]).sum()
            assert np.abs(textures[a] - textures[b]).mean() > 0.15


def test_masks_never_overlap_and_the_nearer_object_wins(heavy_clips: list[tuple[Scene, list[Frame]]]):
    crossings = 0
    for scene, frames in heavy_clips:
        nearest = max(range(len(scene.objects)), key=lambda k: scene.objects[k].depth)
        for frame in frames:
            assert frame.masks.sum(axis=0).max() <= 1
            if frame.silhouettes[nearest]:
                assert frame.visible[nearest] == 1
            crossings += int(((frame.visible > 0) & (frame.visible < 1)).sum())
    assert crossings > 100


def test_masks_fit_the_pixels():
    # The same scene without one object: outside of that object's mask (and its soft edge) nothing may change,
    # inside of it nearly everything does.
    scene = video_scene(PRESETS["synthetic_ytvis"], 0, "train", 1)
    scene = replace(scene, blur=(0,) * scene.length, shutter=0.0)
    nearest = max(range(len(scene.objects)), key=lambda k: scene.objects[k].depth)
    without = replace(scene, objects=tuple(o for k, o in enumerate(scene.objects) if k != nearest))
    full, empty = render_frame(scene, 4), render_frame(without, 4)
    mask = full.masks[nearest]
    changed = (full.image != empty.image).any(axis=2)
    assert changed[mask].mean() > 0.98
    wide = np.pad(mask, 1)
    grown = wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:] | mask
    assert not (changed & ~grown).any()
    assert abs(int(mask.sum()) - full.silhouettes[nearest] / 4) < 0.06 * mask.sum()


def test_visible_fraction_is_what_the_others_leave(heavy_clips: list[tuple[Scene, list[Frame]]]):
    scene, frames = heavy_clips[0]
    for t in range(0, scene.length, 5):
        for k, item in enumerate(scene.objects):
            alone = render_frame(replace(scene, objects=(item,)), t)
            assert alone.silhouettes[0] == frames[t].silhouettes[k]
            if alone.silhouettes[0]:
                left = frames[t].masks[k].sum() / max(1, alone.masks[0].sum())
                tolerance = 0.05 + 40 / alone.silhouettes[0]
                assert abs(left - frames[t].visible[k]) < tolerance


def test_motion_blur_and_defocus_change_pixels_but_not_places():
    scene = video_scene(PRESETS["synthetic_ytvis"], 0, "train", 2)
    sharp = render_frame(replace(scene, blur=(0,) * scene.length, shutter=0.0), 3)
    moved = render_frame(replace(scene, blur=(0,) * scene.length, shutter=1.0), 3)
    soft = render_frame(replace(scene, blur=(2,) * scene.length, shutter=0.0), 3)
    assert not np.array_equal(sharp.image, moved.image)
    assert np.array_equal(sharp.masks, soft.masks)
    edges = [np.abs(np.diff(f.image.astype(int), axis=1)).mean() for f in (sharp, soft)]
    assert edges[1] < 0.8 * edges[0]
    union = (sharp.masks | moved.masks).sum()
    assert (sharp.masks & moved.masks).sum() > 0.8 * union


def test_heavy_clips_hold_crossings_long_occlusions_and_returns(heavy_clips: list[tuple[Scene, list[Frame]]]):
    for scene, frames in heavy_clips:
        silhouettes = np.stack([f.silhouettes for f in frames])
        visible = np.stack([f.visible for f in frames])
        outside = np.flatnonzero(silhouettes[:, 0] == 0)
        assert len(outside) >= 5
        assert silhouettes[: outside[0], 0].max() > 1000
        assert silhouettes[outside[-1] :, 0].max() > 1000
        assert longest_run((silhouettes[:, 1] > 0) & (visible[:, 1] < 0.5)) >= 8
        gaps = [scene.objects[0].path(t) - scene.objects[1].path(t) for t in (0.0, 8.0)]
        assert float((gaps[0] * gaps[1]).sum()) < 0  # they changed sides


def test_objects_move_turn_and_change_size(heavy_clips: list[tuple[Scene, list[Frame]]]):
    for scene, _ in heavy_clips:
        pans = np.stack([scene.camera(t) for t in range(scene.length)])
        assert np.ptp(pans, axis=0).max() > 4
        for item in scene.objects:
            poses = [item.pose(t, scene.camera(t)) for t in range(scene.length)]
            assert np.ptp([p.x for p in poses]) > 10
            assert np.ptp([p.radius for p in poses]) > 0.1 * item.radius
            steps = [abs(a.x - b.x) + abs(a.y - b.y) for a, b in zip(poses, poses[1:], strict=False)]
            assert max(steps) < 40  # smooth, no jumps


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("preset", ["mild", "heavy"])
def test_format(preset: str, split: str, request: pytest.FixtureRequest):
    folder: Path = request.getfixturevalue(preset)
    data = read(folder, split)
    assert data["info"]["seed"] == 3
    assert data["info"]["preset"]["name"] == folder.name
    assert [c["name"] for c in data["categories"]] == list(CATEGORIES)
    videos = {v["id"]: v for v in data["videos"]}
    assert sorted(a["id"] for a in data["annotations"]) == list(range(1, len(data["annotations"]) + 1))
    for video in videos.values():
        assert len(video["file_names"]) == video["length"]
        for name in video["file_names"]:
            with Image.open(folder / split / "JPEGImages" / name) as picture:
                assert picture.size == (video["width"], video["height"])
    for annotation in data["annotations"]:
        video = videos[annotation["video_id"]]
        assert 1 <= annotation["category_id"] <= len(CATEGORIES)
        assert annotation["iscrowd"] == 0
        for key in ("segmentations", "bboxes", "areas", "occlusion"):
            assert len(annotation[key]) == video["length"]
        for t, rle in enumerate(annotation["segmentations"]):
            if rle is None:
                assert annotation["bboxes"][t] is annotation["areas"][t] is annotation["occlusion"][t] is None
                continue
            assert rle["size"] == [video["height"], video["width"]]
            assert annotation["areas"][t] == area(rle) >= PRESETS[folder.name].min_area
            assert annotation["bboxes"][t] == to_box(rle)


def test_annotations_are_the_rendered_scene(heavy: Path):
    data, preset = read(heavy, "val"), PRESETS["synthetic_ovis"]
    scene = video_scene(preset, 3, "val", 0)
    assert len(data["annotations"]) == len(scene.objects)
    frames = [render_frame(scene, t) for t in range(scene.length)]
    first = np.asarray(Image.open(heavy / "val" / "JPEGImages" / data["videos"][0]["file_names"][2]))
    assert np.array_equal(first, frames[2].image)
    for k, annotation in enumerate(data["annotations"]):
        assert CATEGORIES[annotation["category_id"] - 1] == scene.objects[k].category
        for t, rle in enumerate(annotation["segmentations"]):
            if rle is None:
                assert frames[t].masks[k].sum() < preset.min_area
            else:
                assert np.array_equal(decode(rle), frames[t].masks[k])
                assert annotation["occlusion"][t] == occlusion_level(frames[t].visible[k])
    # The one that leaves keeps its annotation when it returns.
    shown = np.array([s is not None for s in data["annotations"][0]["segmentations"]])
    hidden = np.flatnonzero(~shown)
    assert shown[: hidden[0]].any()
    assert shown[hidden[-1] :].any() or shown[hidden[0] : hidden[-1]].any()


def test_occlusion_levels():
    levels = [occlusion_level(x) for x in (1.0, 0.98, 0.97, 0.5, 0.49, 0.0)]
    assert levels == ["no_occlusion"] * 2 + ["slight_occlusion"] * 2 + ["severe_occlusion"] * 2


def test_difficulty_and_classes(mild: Path, heavy: Path):
    shares, instances = {}, Counter()
    for folder in (mild, heavy):
        annotations = read(folder, "train")["annotations"]
        levels = Counter(level for a in annotations for level in a["occlusion"])
        shares[folder.name] = levels["severe_occlusion"] / sum(levels.values())
        instances.update(a["category_id"] for a in annotations)
        repeated = Counter((a["video_id"], a["category_id"]) for a in annotations)
        assert max(repeated.values()) > 1
    assert shares["synthetic_ytvis"] < 0.05
    assert shares["synthetic_ovis"] > 0.05
    assert set(instances) == set(range(1, len(CATEGORIES) + 1))


# --- generate() -------------------------------------------------------------------------------------------------------


def small(root: Path, **arguments: object) -> dict:
    defaults = {"splits": ("val",), "num_videos": {"val": 1}}
    return generate("synthetic_ytvis", root, **(defaults | arguments))["val"]


def test_a_complete_set_is_left_alone(tmp_path: Path):
    first = small(tmp_path)
    stamp = Path(first["json_file"]).stat().st_mtime_ns
    second = small(tmp_path, overwrite=True)
    assert first["written"]
    assert not second["written"]
    assert Path(first["json_file"]).stat().st_mtime_ns == stamp
    assert {**first, "written": None} == {**second, "written": None}


def test_a_different_set_is_replaced_only_when_asked(tmp_path: Path):
    small(tmp_path, num_videos={"val": 2})
    with pytest.raises(ValueError, match="seed is 0, expected 5.*overwrite"):
        small(tmp_path, seed=5)
    with pytest.raises(ValueError, match="num_videos is 2, expected 1"):
        small(tmp_path)
    replaced = small(tmp_path, seed=5, overwrite=True)
    assert replaced["written"]
    assert [p.name for p in Path(replaced["image_root"]).iterdir()] == ["val_0000"]


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not json"), ("[]", "not written by"), ("{}", "not written by")]
)
def test_a_foreign_json_is_not_touched(tmp_path: Path, content: str, message: str):
    path = tmp_path / "synthetic_ytvis" / "val.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        small(tmp_path)
    assert path.read_text() == content


def test_a_missing_frame_is_noticed(tmp_path: Path):
    frame = Path(small(tmp_path)["image_root"]) / "val_0000" / "00003.png"
    frame.unlink()
    with pytest.raises(ValueError, match=r"00003\.png, which is missing"):
        small(tmp_path)
    assert small(tmp_path, overwrite=True)["written"]
    assert frame.is_file()


def test_an_interrupted_generation_is_not_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = []

    def full_disk(image: np.ndarray) -> bytes:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(image)
        return encode_png(image)

    with monkeypatch.context() as patch:
        patch.setattr(synthetic_writer, "encode_png", full_disk)
        with pytest.raises(OSError, match=r"No space left on device.*Make room") as raised:
            small(tmp_path)
    assert raised.value.errno == errno.ENOSPC
    assert not (tmp_path / "synthetic_ytvis" / "val.json").exists()
    small(tmp_path)
    small(tmp_path / "fresh")
    assert tree_hash(tmp_path / "synthetic_ytvis") == tree_hash(tmp_path / "fresh" / "synthetic_ytvis")


def test_a_root_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another root"):
        small(tmp_path / "file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "synthetic_ytvos"}, "no synthetic data set 'synthetic_ytvos'; expected one of synthetic_ytvis"),
        ({"splits": ("test",)}, "split 'test'"),
        ({"num_videos": {"valid": 2}}, "split 'valid'"),
        ({"num_videos": {"val": 0}}, "expected 1 or more"),
        ({"seed": -1}, "expected 0 or a positive"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        generate(**({"preset": "synthetic_ytvis", "root": tmp_path} | arguments))
    assert not list(tmp_path.iterdir())


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> int:
        fixed = ["--preset", "synthetic_ytvis", "--root", str(tmp_path), "--train-videos", "2", "--val-videos", "1"]
        monkeypatch.setattr(sys, "argv", ["prepare_synthetic.py", *fixed, *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(REPOSITORY / "datasets" / "prepare_synthetic.py"), run_name="__main__")
        return int(stopped.value.code or 0)

    assert run() == 0
    assert "synthetic_ytvis train: 2 videos" in capsys.readouterr().out
    assert run("--seed", "1") == 1
    assert "made with other arguments" in capsys.readouterr().err
