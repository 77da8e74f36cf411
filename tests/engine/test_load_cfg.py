"""``load_cfg``: where a value comes from, and what is said of a configuration that is wrong."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.modeling import META_ARCH_REGISTRY

from vis.config import CfgNode, node
from vis.engine import load_cfg
from vis.engine.config import _PARTS, read_yaml_tree

Write = Callable[..., str]

METHOD = """
from detectron2.modeling import META_ARCH_REGISTRY
from vis.config import CfgNode, declare
print("imported")

@declare
def add_config(cfg):
    cfg.MODEL.LOAD_CFG = CfgNode()
    cfg.MODEL.LOAD_CFG.DECLARED = 1
    cfg.MODEL.LOAD_CFG.DEFAULTS = 1
    cfg.MODEL.LOAD_CFG.FIRST_BASE = 1
    cfg.MODEL.LOAD_CFG.SECOND_BASE = 1
    cfg.MODEL.LOAD_CFG.YAML = 1
    cfg.MODEL.LOAD_CFG.COMMAND = 1
    cfg.SOLVER.WEIGHT_DECAY = 0.5

@META_ARCH_REGISTRY.register()
class LoadCfgMethod:
    DEFAULTS = {"MODEL": {"LOAD_CFG": {name: 2 for name in (
        "DEFAULTS", "FIRST_BASE", "SECOND_BASE", "YAML", "COMMAND")}}, "TEST": {"DETECTIONS_PER_IMAGE": 2}}
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(text, name="a.yaml")`` gives the path of the file."""

    def file(text: str, name: str = "config.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return file


@pytest.fixture
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test declares is forgotten after it; what the parts declare on their first import stays."""
    for part in _PARTS:
        importlib.import_module(part)
    monkeypatch.setattr(node, "_DECLARED", dict(node._DECLARED))
    monkeypatch.setattr(META_ARCH_REGISTRY, "_obj_map", dict(META_ARCH_REGISTRY._obj_map))


def yaml_of(value: int, *names: str) -> str:
    return "MODEL:\n  LOAD_CFG: {" + ", ".join(f"{name}: {value}" for name in names) + "}\n"


@pytest.mark.usefixtures("own_registries")
def test_later_sources_win(write: Write) -> None:
    write(METHOD, "method.py")
    write(yaml_of(3, "FIRST_BASE", "SECOND_BASE", "YAML", "COMMAND"), "first.yaml")
    write(yaml_of(4, "SECOND_BASE", "YAML", "COMMAND"), "bases/second.yaml")
    head = 'IMPORTS: ["method.py"]\n_BASE_: [first.yaml, bases/second.yaml]\n'
    path = write(head + yaml_of(5, "YAML", "COMMAND") + "  META_ARCHITECTURE: LoadCfgMethod\n")
    cfg = load_cfg(path, ["MODEL.LOAD_CFG.COMMAND", "6"])
    names = ("DECLARED", "DEFAULTS", "FIRST_BASE", "SECOND_BASE", "YAML", "COMMAND")
    assert [cfg.MODEL.LOAD_CFG[name] for name in names] == [1, 2, 3, 4, 5, 6]
    assert cfg.SOLVER.WEIGHT_DECAY == 0.5  # a declared part over detectron2's defaults
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 2  # the method's defaults over detectron2's
    assert cfg.SOLVER.MOMENTUM == 0.9  # detectron2's own
    assert cfg.INPUT.FORMAT == "RGB"  # shared defaults over detectron2's
    assert load_cfg(path, ["MODEL.META_ARCHITECTURE", "MinVIS"]).MODEL.LOAD_CFG.DEFAULTS == 1


@pytest.mark.usefixtures("own_registries")
def test_imports_are_relative_to_the_yaml_and_run_once(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write(METHOD, "parts/method.py")
    write("IMPORTS: [method.py]\nMODEL: {META_ARCHITECTURE: LoadCfgMethod}\n", "parts/base.yaml")
    path = write("_BASE_: parts/base.yaml\nMODEL: {LOAD_CFG: {YAML: 7}}\n")
    monkeypatch.chdir(tmp_path.parent)
    for _ in range(2):
        cfg = load_cfg(path)
        assert cfg.MODEL.LOAD_CFG.YAML == 7
        assert cfg.MODEL.META_ARCHITECTURE == "LoadCfgMethod"
    assert capfd.readouterr().out.count("imported") == 1


@pytest.mark.usefixtures("own_registries")
def test_imports_by_name_and_from_the_command_line(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Path(write(METHOD, "load_cfg_method.py"))
    monkeypatch.syspath_prepend(str(module.parent))
    cfg = load_cfg(write("MODEL: {DEVICE: cpu}\n"), ["IMPORTS", "['load_cfg_method']"])
    assert cfg.MODEL.LOAD_CFG.DECLARED == 1


def test_imports_that_fail(write: Write) -> None:
    with pytest.raises(FileNotFoundError, match="IMPORTS names .*absent.py"):
        load_cfg(write("IMPORTS: [absent.py]\n"))
    with pytest.raises(ValueError, match="IMPORTS must be a list of module names or .py files, found .3."):
        load_cfg(write("IMPORTS: [3]\n"))
    with pytest.raises(ValueError, match="IMPORTS must be a list of module names or .py files, found 'method.py'"):
        load_cfg(write("IMPORTS: method.py\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "MODEL: {MASK_FORMER: {NUM_QUERIES: 3}}",
            r"unknown config key MODEL.MASK_FORMER.NUM_QUERIES.*'NUM_OBJECT_QUERIES'",
        ),
        ("SOLVR: {BASE_LR: 1.0}", "unknown config key SOLVR. Did you mean 'SOLVER'"),
        ("SOLVER: {BASE_LR: }", "SOLVER.BASE_LR has no value; give one like"),
        ("SOLVER: {BASE_LR: {A: 1}}", "SOLVER.BASE_LR is a value, not a group of keys, so SOLVER.BASE_LR.A"),
        ("SOLVER: 3", "SOLVER is a group of keys, it cannot be set to 3"),
        ("MODEL: 3", "MODEL is a group of keys, it cannot be set to 3"),
        ("SOLVER: [1]", r"SOLVER is a group of keys, it cannot be set to \[1\]"),
        ("SOLVER: {BASE_LR: fast}", "SOLVER.BASE_LR"),
        ("SOLVER: {MAX_ITER: 0.5}", "SOLVER.MAX_ITER"),
        ("SOLVER: {MAX_ITER: True}", "SOLVER.MAX_ITER"),
        ("SOLVER: {AMP: {ENABLED: 1}}", "SOLVER.AMP.ENABLED"),
        ("DATASETS: {TRAIN: ovis_train}", "DATASETS.TRAIN"),
        ("MODEL: {META_ARCHITECTURE: MinVS}", r"META_ARCHITECTURE 'MinVS' is not known. Did you mean 'MinVIS'\?"),
        ("- 1\n- 2", "holds a list, expected a tree"),
        ("just words", "holds a str, expected a tree"),
        ("A: [1", "cannot be read as plain yaml"),
        ("A: !!python/object/apply:os.getcwd []", "python tags are refused"),
        ("_BASE_: 3", "_BASE_ must be a file name or a list of them, found 3"),
        ("_BASE_: [3]", "_BASE_ must be a file name or a list of them"),
        ("3: {A: 1}", "unknown config key 3"),
    ],
)
def test_wrong_files(write: Write, text: str, message: str) -> None:
    path = write(text + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        load_cfg(path)
    assert path in str(caught.value) or "META_ARCHITECTURE" in message


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASE_LR"], "must be pairs KEY VALUE"),
        (["SOLVER.BASE_LR", "1", "SOLVER.MAX_ITER"], "must be pairs KEY VALUE"),
        (["--resume", "True"], "'--resume' stands where a config KEY is expected"),
        (["SOLVER.BASE_LR", "fast"], "the command line: .*SOLVER.BASE_LR"),
        (["SOLVER.BASELR", "1"], "the command line: unknown config key SOLVER.BASELR. Did you mean 'BASE_LR'"),
        (["SOLVER", "1"], "SOLVER is a group of keys"),
        (["SOLVER.BASE_LR", "1", "SOLVER.BASE_LR.A", "2"], "SOLVER.BASE_LR is a value, not a group"),
        (["MODEL.DEVICE", "cpu", "MODEL", "{'MASK_ON': 3}"], "MASK_ON"),
    ],
)
def test_wrong_command_lines(write: Write, opts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_cfg(write("SOLVER: {BASE_LR: 0.1}\n"), opts)


def test_numbers(write: Write) -> None:
    cfg = load_cfg(write("SOLVER: {BASE_LR: 1, WEIGHT_DECAY: 1e-4, STEPS: [30, 40]}\n"), ["SOLVER.GAMMA", "2"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.GAMMA) == (1.0, 1e-4, 2.0)
    assert isinstance(cfg.SOLVER.BASE_LR, float)
    assert isinstance(cfg.SOLVER.GAMMA, float)
    assert cfg.SOLVER.STEPS == (30, 40)


def test_values_of_the_command_line(write: Write) -> None:
    opts = ["DATASETS.TEST", "('ovis_val',)", "MODEL.WEIGHTS", "a/b.pth", "SOLVER.AMP.ENABLED", "True"]
    cfg = load_cfg(write("MODEL: {WEIGHTS: c.pth}\n"), [*opts, "SOLVER.MAX_ITER", 9, "SOLVER.MAX_ITER", "8"])
    assert cfg.DATASETS.TEST == ("ovis_val",)
    assert (cfg.MODEL.WEIGHTS, cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.MAX_ITER) == ("a/b.pth", True, 8)


@pytest.mark.parametrize("text", ["", "# nothing\n", "MODEL:\nSOLVER:\n", "MODEL: {}\n", "MODEL: {MASK_FORMER: }\n"])
def test_empty_groups_change_nothing(write: Write, text: str) -> None:
    plain, cfg = load_cfg(write("SEED: 42\n", "plain.yaml")), load_cfg(write(text))
    assert cfg == plain
    assert isinstance(cfg.MODEL.MASK_FORMER, CfgNode)


def test_an_empty_group_keeps_its_base(write: Write) -> None:
    write("SOLVER: {MAX_ITER: 77}\n", "base.yaml")
    assert load_cfg(write("_BASE_: base.yaml\nSOLVER:\n")).SOLVER.MAX_ITER == 77


def test_files_that_are_missing(write: Write, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.yaml' does not exist"):
        load_cfg(str(tmp_path / "nothing.yaml"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_cfg(str(tmp_path))
    path = write("_BASE_: [missing.yaml]\n")
    with pytest.raises(FileNotFoundError, match=r"missing.yaml' does not exist \(named as _BASE_ in .*config.yaml\)"):
        load_cfg(path)


def test_circle_of_bases(write: Write) -> None:
    write("_BASE_: sub/b.yaml\n", "a.yaml")
    path = write("_BASE_: [../a.yaml]\n", "sub/b.yaml")
    with pytest.raises(ValueError, match=r"_BASE_ goes in a circle: .*b.yaml -> .*a.yaml -> .*b.yaml"):
        load_cfg(path)
    with pytest.raises(ValueError, match="circle"):
        load_cfg(write("_BASE_: self.yaml\n", "self.yaml"))


def test_a_base_may_be_used_twice(write: Write) -> None:
    """Two bases with one base of their own are no circle."""
    write("SEED: 1\nSOLVER: {MAX_ITER: 5}\n", "root.yaml")
    write("_BASE_: root.yaml\nSEED: 2\n", "left.yaml")
    write("_BASE_: root.yaml\nSOLVER: {BASE_LR: 0.25}\n", "right.yaml")
    tree = read_yaml_tree(write("_BASE_: [left.yaml, right.yaml]\n"))
    assert tree == {"SEED": 1, "SOLVER": {"MAX_ITER": 5, "BASE_LR": 0.25}}


def test_a_list_replaces_the_list_of_its_base(write: Write) -> None:
    write("SOLVER: {STEPS: [1, 2, 3]}\n", "base.yaml")
    assert load_cfg(write("_BASE_: base.yaml\nSOLVER: {STEPS: [9]}\n")).SOLVER.STEPS == (9,)


def test_base_in_the_home_folder(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("SEED: 9\n", "home/base.yaml")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_cfg(write("_BASE_: ~/base.yaml\n")).SEED == 9


def test_the_result_is_frozen(write: Write) -> None:
    cfg = load_cfg(write("SEED: 3\n"))
    assert cfg.is_frozen()
    with pytest.raises(AttributeError, match="SEED"):
        cfg.SEED = 4
    with pytest.raises(AttributeError):
        cfg.MODEL.MASK_FORMER.DEC_LAYERS = 4


def test_two_trees_share_nothing(write: Write) -> None:
    first = load_cfg(write("SEED: 3\n", "a.yaml")).clone()
    first.defrost()
    first.MODEL.PIXEL_MEAN[0] = 0.0
    first.MODEL.MASK_FORMER.DEC_LAYERS = 3
    second = load_cfg(write("SEED: 4\n", "b.yaml"))
    assert second.MODEL.PIXEL_MEAN[0] == 123.675
    assert second.MODEL.MASK_FORMER.DEC_LAYERS == 10


def custom_data(tmp_path: Path, name: str, classes: int) -> dict[str, Any]:
    categories = [{"id": 3 * i + 1, "name": f"thing {i}"} for i in range(classes)]
    tree = {"videos": [], "annotations": [], "categories": categories}
    (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    return {"NAME": name, "JSON": str(tmp_path / f"{name}.json"), "ROOT": str(tmp_path)}


def test_number_of_classes_follows_the_data(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def classes(text: str, *opts: str) -> int:
        return load_cfg(write(text), opts).MODEL.SEM_SEG_HEAD.NUM_CLASSES

    assert classes("SEED: 1\n") == 0
    assert classes("DATASETS: {TEST: [ytvis_2021_val]}\n") == 40
    assert classes("DATASETS: {TRAIN: [coco2ovis_train, ovis_train], TEST: [ytvis_2019_val]}\n") == 25
    assert classes("DATASETS: {TRAIN: [ovis_train]}\n", "DATASETS.TRAIN", "('ytvis_2019_train',)") == 40
    # named in the yaml or on the command line: a known data set does not change it
    assert classes("DATASETS: {TRAIN: [ovis_train]}\nMODEL: {SEM_SEG_HEAD: {NUM_CLASSES: 7}}\n") == 7
    assert classes("DATASETS: {TRAIN: [ovis_train]}\n", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "8") == 8

    entry = json.dumps(custom_data(tmp_path, "load_cfg_custom", 11))
    own = f"DATASETS: {{CUSTOM: [{entry}], TRAIN: [load_cfg_custom]}}\n"
    assert classes(own) == 11
    # a user's data set over a released yaml whose number belongs to other data
    with caplog.at_level(logging.WARNING, logger="vis"):
        assert classes(own + "MODEL: {SEM_SEG_HEAD: {NUM_CLASSES: 40}}\n") == 11
    assert "NUM_CLASSES 40 is replaced by 11: load_cfg_custom has 11" in caplog.text


def test_wrong_data_sets(write: Write) -> None:
    with pytest.raises(ValueError, match=r"ovis_trian.*ovis_train"):
        load_cfg(write("DATASETS: {TRAIN: [ovis_trian]}\n"))
    with pytest.raises(ValueError, match=r"DATASETS.CUSTOM\[0\]"):
        load_cfg(write("DATASETS: {CUSTOM: [3]}\n"))


def configurations() -> list[str]:
    folder = Path(__file__).resolve().parents[2] / "configs"
    files = (file.relative_to(folder) for file in sorted(folder.rglob("*.yaml")))
    return [str(file) for file in files if file.parts[0] not in ("_base_", "recipes", "sweeps")]  # not run as they are


@pytest.mark.parametrize("name", configurations())
def test_configurations_of_the_project_load(project_root: Path, name: str) -> None:
    file = str(project_root / "configs" / name)
    try:
        cfg = load_cfg(file, ["MODEL.DEVICE", "cpu"])
    except FileNotFoundError as error:
        own = read_yaml_tree(file)["DATASETS"].get("CUSTOM", [])
        if not any(Path(entry["JSON"]).name in str(error) for entry in own):
            raise
        pytest.skip(f"its own data is not here: {error}")
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES > 0
    assert cfg.SOLVER.MAX_ITER > 0
    assert cfg.DATASETS.TEST
    assert cfg.OUTPUT_DIR not in ("", "./output")
    again = CfgNode.load_cfg(cfg.dump())  # what is written beside the results is the same tree
    assert again.MODEL.MASK_FORMER == cfg.MODEL.MASK_FORMER


def test_there_are_configurations() -> None:
    assert len(configurations()) >= 6
