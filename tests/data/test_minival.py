"""Minival: disjoint, balanced, the same everywhere; written beside the training json and loaded by name."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog

from vis.data.categories import OVIS
from vis.data.minival import (
    FRACTIONS,
    MINIVAL_VERSION,
    ids_hash,
    minival_size,
    part_path,
    split_videos,
    verify_minival,
    write_minival,
)
from vis.data.problems import DatasetError


def skewed_labels(num: int, num_classes: int, seed: int) -> dict[int, set[int]]:
    """1 to 3 classes a video, frequent and rare ones as in real sets; some videos show nothing. Ids have gaps."""
    rng = np.random.Generator(np.random.PCG64(seed))
    weights = 1.0 / np.arange(1, num_classes + 1)
    weights /= weights.sum()
    labels = {}
    for index in range(num):
        count = rng.integers(0, 4)
        labels[3 * index + 1] = {int(c) + 1 for c in rng.choice(num_classes, size=count, p=weights, replace=False)}
    return labels


def counts(labels: dict[int, set[int]], ids: list[int], num_classes: int) -> np.ndarray:
    return np.array([sum(c in labels[i] for i in ids) for c in range(1, num_classes + 1)])


@pytest.mark.parametrize(("num", "num_classes", "num_val"), [(607, 25, 121), (2238, 40, 224), (60, 25, 12)])
def test_disjoint_exact_and_balanced(num: int, num_classes: int, num_val: int) -> None:
    labels = skewed_labels(num, num_classes, seed=num)
    train, val = split_videos(labels, num_val)
    assert sorted(train + val) == sorted(labels)
    assert (len(val), train, val) == (num_val, sorted(train), sorted(val))
    in_train, in_val = counts(labels, train, num_classes), counts(labels, val, num_classes)
    totals = in_train + in_val
    assert (in_train[totals >= 2] > 0).all()
    assert (in_val[totals >= 2] > 0).all()
    assert (in_train[totals == 1] == 1).all()  # a single video is worth more in training
    wanted = np.clip(totals * num_val / num, np.minimum(totals // 2, 1), np.maximum(totals - 1, 0))
    # far closer than a random draw, whose standard deviation is sqrt(wanted * (1 - share))
    assert np.abs(in_val - wanted).max() <= (2 if num > 100 else 3)


def test_order_of_videos_plays_no_part_and_the_hash_is_golden() -> None:
    # plain arithmetic, as NumPy's streams may change; class c in about 40 / c percent of 200 videos
    labels = {i: {c for c in range(1, 13) if i * (7 * c + 3) % 101 < 40 // c} for i in range(1, 601, 3)}
    shuffled = {i: labels[i] for i in np.random.Generator(np.random.PCG64(1)).permutation(list(labels)).tolist()}
    assert list(shuffled) != list(labels)
    train, val = split_videos(labels, 20)
    assert split_videos(shuffled, 20) == (train, val)
    assert MINIVAL_VERSION == 1, "a new version has a new golden hash"
    # recorded; a change here means that published splits would change: raise MINIVAL_VERSION instead
    assert ids_hash(val) == "a74ed1a14fe2250c14c1f72f24a54a97d121314e5172c97190b815ea18f462a6"


def test_hash_of_ids_is_plain() -> None:
    assert ids_hash([10, 2, 33]) == hashlib.sha256(b"2,10,33").hexdigest()


def test_rare_classes_are_in_both_parts_where_the_paper_alone_would_not_put_them() -> None:
    labels = {i: {1} for i in range(1, 41)} | {41: {1, 2}, 42: {1, 2}, 43: {1, 3}, 44: {1, 3}, 45: {4}}
    train, val = split_videos(labels, 4)
    for category in (2, 3):
        assert {category} & set().union(*(labels[i] for i in train))
        assert {category} & set().union(*(labels[i] for i in val))
    assert 45 in train


def test_impossible_wish_is_told(caplog: pytest.LogCaptureFixture) -> None:
    # three classes of two videos, each pair shares one: no division of three videos separates them all
    split_videos({1: {1, 2}, 2: {1, 3}, 3: {2, 3}}, 1)
    assert "in one part only" in caplog.text


def test_repaired_by_swaps() -> None:
    # one video has to hold both rare classes, so that a minival of one shows all
    labels = {1: {1}, 2: {2}, 3: {1, 2}, 4: {1}, 5: {2}}
    assert split_videos(labels, 1)[1] == [3]


@pytest.mark.parametrize("size", [0, 3, -1])
def test_size_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 2"):
        split_videos({1: {1}, 2: {1}, 3: set()}, size)


def test_sizes() -> None:
    assert [minival_size(n, FRACTIONS[name]) for name, n in (("ytvis_2019", 2238), ("ytvis_2021", 2985))] == [224, 299]
    assert minival_size(607, FRACTIONS["ovis"]) == 121


def ovis_tree(num: int) -> dict[str, Any]:
    labels = skewed_labels(num, 25, seed=3)
    mask = {"size": [6, 8], "counts": [10, 4, 34]}
    shown = [(video, category) for video in labels for category in sorted(labels[video])]
    return {
        "info": {"year": 2020},
        "licenses": ["kept as it is"],
        "videos": [
            {"id": i, "height": 6, "width": 8, "length": 2, "file_names": [f"v{i}/0.jpg", f"v{i}/1.jpg"]}
            for i in labels
        ],
        "categories": [category._asdict() for category in OVIS],
        "annotations": [
            {"id": n, "video_id": v, "category_id": c, "iscrowd": 0, "segmentations": [mask, None]}
            for n, (v, c) in enumerate(shown, start=1)
        ],
    }


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    tree = ovis_tree(50)
    path = tmp_path / "ovis" / "annotations" / "annotations_train.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(tree))
    for video in tree["videos"]:
        for name in video["file_names"]:
            frame = tmp_path / "ovis" / "train" / name
            frame.parent.mkdir(parents=True, exist_ok=True)
            frame.touch()
    return path


def test_written_parts_load_by_name(source: Path) -> None:
    before = source.read_bytes()
    division = write_minival(source, name="ovis")
    assert source.read_bytes() == before
    assert sorted(path.name for path in source.parent.iterdir()) == [
        "annotations_train.json",
        "annotations_train_minitrain.json",
        "annotations_train_minival.json",
        "annotations_train_minival_manifest.json",
    ]
    whole = {record["video_id"]: record for record in DatasetCatalog.get("ovis_train")}
    for part in ("minitrain", "minival"):
        records = DatasetCatalog.get(f"ovis_{part}")
        ids = [record["video_id"] for record in records]
        assert ids == getattr(division, part)
        assert ids_hash(ids) == division.ids_sha256[part]
        assert len(ids) == division.num_videos[part]
        for record in records:
            for key in ("file_names", "annotations", "height", "length"):
                assert record[key] == whole[record["video_id"]][key]
        content = json.loads(part_path(source, part).read_text())
        assert content["licenses"] == ["kept as it is"]
        assert content["info"]["year"] == 2020
        note = content["info"]["minival"]
        assert (note["part"], note["minival_version"]) == (part, MINIVAL_VERSION)
        assert note["source_sha256"] == hashlib.sha256(before).hexdigest()
    manifest = json.loads(part_path(source, "minival_manifest").read_text())
    assert manifest["minival"] == division.minival
    assert manifest["classes"]["Person"] == division.classes["Person"]
    assert division.num_videos == {"minitrain": 40, "minival": 10}
    assert verify_minival(source, name="ovis") == division


def test_shuffled_json_gives_the_same_videos(source: Path) -> None:
    division = write_minival(source, name="ovis")
    tree = json.loads(source.read_text())
    tree["videos"].reverse()
    tree["annotations"].reverse()
    source.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="Write it again"):  # another source, though the ids agree
        verify_minival(source, name="ovis")
    assert write_minival(source, name="ovis").ids_sha256 == division.ids_sha256


def test_verify_sees_another_division(source: Path) -> None:
    write_minival(source, name="ovis", size=7)
    with pytest.raises(ValueError, match="expected 40 videos"):
        verify_minival(source, name="ovis")
    part_path(source, "minival").unlink()
    with pytest.raises(FileNotFoundError, match=r"prepare_minival\.py"):
        verify_minival(source, name="ovis", size=7)


def test_bad_sources(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give one"):
        write_minival(source, name="my_set")
    with pytest.raises(FileNotFoundError):
        write_minival(tmp_path / "no.json", name="ovis")
    tree = json.loads(source.read_text())
    for change, message in (
        ({"annotations": None}, "training videos"),
        ({"videos": tree["videos"][:1] * 2}, "no other video"),
        ({"videos": [*tree["videos"], {**tree["videos"][0], "id": 99999}]}, "shares the frame"),
        ({"annotations": [{"video_id": -1, "category_id": 1}]}, "not listed"),
    ):
        source.write_text(json.dumps({**tree, **change}))
        with pytest.raises(DatasetError, match=message):
            write_minival(source, name="ovis")
    assert [path.name for path in source.parent.iterdir()] == ["annotations_train.json"]


def script(project_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_minival", project_root / "datasets" / "prepare_minival.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script(source: Path, project_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = script(project_root).main
    assert main(["--verify"]) == 1
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "ytvis_2019: left out" in out
    assert "annotations_train_minival.json: 10 videos, ids sha256 " in out
    assert main(["ovis", "--verify"]) == 0
    assert main(["ytvis_2021"]) == 1
    assert "ytvis_2021/train.json" in capsys.readouterr().err
    assert main(["mine", "--json", str(source), "--size", "5"]) == 0
    assert main(["mine", "--json", str(source)]) == 1
    for bad in (["mine"], ["ovis", "ytvis_2021", "--json", "x"]):
        with pytest.raises(SystemExit):
            main(bad)
