"""Class heads between label sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vis.checkpoint import ClassMap, build_class_map, load_weights
from vis.checkpoint.class_rows import plain_names
from vis.data.registration import class_names_of
from vis.engine import load_cfg

SETS = ("coco_2017_train_video", "ytvis_2019_train", "ytvis_2021_train", "ovis_train")
COCO, YTVIS19, YTVIS21, OVIS = (tuple(class_names_of([name])) for name in SETS)


class Predictor(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.class_embed = nn.Linear(3, rows)
        self.query_feat = nn.Embedding(5, 3)


class Model(nn.Module):
    """A segmenter with one class head."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.sem_seg_head = nn.ModuleDict({"predictor": Predictor(rows)})
        self.criterion = nn.Module()
        self.criterion.register_buffer("empty_weight", torch.full((rows,), 0.5))


def copied_rows(path: Path, classes: int, names: tuple[str, ...], **options: Any) -> tuple[Any, list[int], Model]:
    """(report, for each row of the model the row of the file it is, -1 for a new one, the model)."""
    source = Model(classes + 1)
    source.sem_seg_head["predictor"].class_embed.weight.data = torch.arange(3.0 * (classes + 1)).reshape(-1, 3)
    source.sem_seg_head["predictor"].class_embed.bias.data = torch.arange(classes + 1.0)
    source.criterion.empty_weight.fill_(9)
    torch.save(source.state_dict(), path)
    model = Model(len(names) + 1)
    head = model.sem_seg_head["predictor"].class_embed
    before = head.weight.detach().clone()
    report = load_weights(model, path, class_map=ClassMap(names, **options))
    rows = []
    for weight, bias, old in zip(head.weight.detach(), head.bias.detach(), before, strict=True):
        row = -1 if torch.equal(weight, old) else int(bias)
        assert row == -1 or weight.tolist() == [3.0 * row, 3.0 * row + 1, 3.0 * row + 2]
        rows.append(row)
    return report, rows, model


def test_coco_to_ovis(tmp_path: Path) -> None:
    report, rows, model = copied_rows(tmp_path / "w.pth", 80, OVIS)
    expected = [COCO.index(name) for name in ("person", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant")]
    expected += [COCO.index(name) for name in ("bear", "zebra", "giraffe")]
    expected += [-1] * 9  # poultry to turtle
    expected += [COCO.index(name) for name in ("bicycle", "motorcycle", "airplane", "boat", "car")]
    assert rows == [*expected, 80], "the row of no object goes along"
    assert model.criterion.empty_weight.tolist() == [0.5] * 26
    assert report.rows[0].new[:3] == ("Poultry", "Giant_panda", "Lizard")
    assert len(report.rows) == 2
    assert "rows of 16 classes copied by name into 2 of these (Person, Bird" in report.summary()
    assert "new: Poultry, Giant_panda" in report.summary()


def test_coco_to_youtube_vis(tmp_path: Path) -> None:
    _, rows, _ = copied_rows(tmp_path / "w.pth", 80, YTVIS19)
    found = {name: COCO[row] for name, row in zip(YTVIS19, rows, strict=False) if row >= 0}
    assert found["motorbike"] == "motorcycle"
    assert found["sedan"] == "car"
    assert found["tennis_racket"] == "tennis racket"
    assert "mouse" not in found, "COCO's is a computer's"
    assert found["person"] == "person"
    assert len(found) == 19
    _, rows, _ = copied_rows(tmp_path / "w.pth", 80, YTVIS21)
    found = {name: COCO[row] for name, row in zip(YTVIS21, rows, strict=False) if row >= 0}
    assert found["flying_disc"] == "frisbee"
    assert "mouse" not in found
    assert len(found) == 21


def test_equal_numbers_are_no_equal_classes(tmp_path: Path) -> None:
    """YouTube-VIS 2019 and 2021 have 40 classes each, in another order."""
    with pytest.raises(ValueError, match="file has 40 classes, those of ytvis_2019_train or ytvis_2021_train.*CLASSES"):
        copied_rows(tmp_path / "w.pth", 40, YTVIS21)
    report, rows, _ = copied_rows(tmp_path / "w.pth", 40, YTVIS21, file_names=YTVIS19)
    assert rows[YTVIS21.index("zebra")] == YTVIS19.index("zebra")
    assert rows[YTVIS21.index("car")] == YTVIS19.index("sedan")
    assert rows[YTVIS21.index("mouse")] == YTVIS19.index("mouse")
    assert rows[40] == 40
    assert report.rows[0].new == ("bird", "flying_disc", "squirrel", "whale")
    report, rows, _ = copied_rows(tmp_path / "w.pth", 40, YTVIS21, file_names=YTVIS21)
    assert rows == list(range(41))
    assert not report.remade


def test_heads_without_a_row_of_no_object(release: Callable[..., Any], tmp_path: Path) -> None:
    state = release("idol_r50").state(80)
    torch.save(state, tmp_path / "w.pth")
    model = release("idol_r50").model(25)
    report = load_weights(model, tmp_path / "w.pth", class_map=ClassMap(OVIS))
    assert len(report.rows) == 12
    for layer in range(6):
        name = f"detr.detr.class_embed.{layer}.weight"
        loaded = model.state_dict()[name]
        assert torch.equal(loaded[0], state[name][0])
        assert torch.equal(loaded[24], state[name][COCO.index("car")])
        assert not loaded[11].any()


def test_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="those of none of COCO, YouTube-VIS and OVIS. Say which"):
        copied_rows(tmp_path / "w.pth", 7, OVIS)
    with pytest.raises(ValueError, match="names a data set of 25 classes, but .*class_embed.weight of the file has 7"):
        copied_rows(tmp_path / "w.pth", 7, YTVIS19, file_names=OVIS)


def test_the_configuration(project_root: Path) -> None:
    config = str(project_root / "configs" / "minvis" / "ovis_r50.yaml")
    assert build_class_map(load_cfg(config)) is None
    by_name = ["MODEL.WEIGHTS_CLASS_MAP", "by_name"]
    assert build_class_map(load_cfg(config, by_name)) == ClassMap(OVIS)
    given = build_class_map(load_cfg(config, [*by_name, "MODEL.WEIGHTS_CLASSES", "ytvis_2019_val"]))
    assert given == ClassMap(OVIS, YTVIS19)
    with pytest.raises(ValueError, match="MODEL.WEIGHTS_CLASS_MAP is 'name'"):
        build_class_map(load_cfg(config, ["MODEL.WEIGHTS_CLASS_MAP", "name"]))
    with pytest.raises(ValueError, match="needs DATASETS.TRAIN"):
        build_class_map(load_cfg(config, [*by_name, "DATASETS.TRAIN", "()"]))


def test_names_are_compared_without_case_and_separators() -> None:
    assert plain_names(["Giant_panda", "giant panda", "GiantPanda", "panda"]) == ["giantpanda"] * 4
    for names in (COCO, YTVIS19, YTVIS21, OVIS):
        assert len(set(plain_names(names))) == len(names), "synonyms join no two classes of one data set"
