"""From a record to a training sample: slots, ids, classes, absent and vanished instances, unreadable frames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vis.config import CfgNode, get_cfg
from vis.data.frame_sampling import FrameSampler
from vis.data.image_mapper import build_image_mapper, build_mapper
from vis.data.mapper import ClipMapper, build_clip_mapper
from vis.data.transforms import ClipAugmentation, Crop, ResizeShortest, Step
from vis.structures import ClipSample

MakeRecord = Callable[..., dict[str, Any]]
A, B, C = (2, 3, 12, 13), (20, 5, 30, 21), (34, 2, 40, 9)


def mapper_of(frames: int, *steps: Step, **options: Any) -> ClipMapper:
    """Contiguous clips of an odd number of frames."""
    sampler = FrameSampler(num_frames=frames, frame_range=frames // 2)
    return ClipMapper(frames=sampler, augmentation=ClipAugmentation(steps=steps), **options)


def run(mapper: ClipMapper, record: dict[str, Any], seed: int = 0) -> ClipSample:
    return mapper(record, np.random.default_rng(seed))


@pytest.fixture
def record(make_record: MakeRecord) -> dict[str, Any]:
    """Object 0 in all three frames, 1 leaves, 2 enters, 3 is a crowd."""
    return make_record(
        9, (27, 45), [[A, A, A], [B, B, None], [None, None, C], [C, None, None]], categories=(4, 5, 6, 4), crowds=(3,)
    )


def test_sample_of_a_clip(record: dict[str, Any]) -> None:
    sample = run(mapper_of(3), record)
    assert (sample["height"], sample["width"], sample["length"], sample["video_id"]) == (27, 45, 3, 9)
    assert sample["frame_ids"] == [0, 1, 2]
    assert sample["file_names"] == record["file_names"]
    assert [tuple(frame.shape) for frame in sample["image"]] == [(3, 27, 45)] * 3
    assert all(frame.dtype == torch.uint8 for frame in sample["image"])
    assert [int(frame[0, 26, 44]) for frame in sample["image"]] == [0, 1, 2]


def test_slots_keep_order_class_and_id(record: dict[str, Any]) -> None:
    frames = run(mapper_of(3), record)["instances"]
    assert [frame.gt_classes.tolist() for frame in frames] == [[4, 5, 6]] * 3  # an absent instance keeps its class
    assert [frame.gt_ids.tolist() for frame in frames] == [[0, 1, -1], [0, 1, -1], [0, -1, 2]]
    assert all(frame.gt_ids.dtype == frame.gt_classes.dtype == torch.int64 for frame in frames)
    boxes = torch.stack([frame.gt_boxes.tensor for frame in frames])
    assert boxes[0].tolist() == [list(A), list(B), [0] * 4]
    assert boxes[2].tolist() == [list(A), [0] * 4, list(C)]
    assert not frames[2].gt_masks.tensor[1].any()


def test_masks_lie_on_their_pixels(record: dict[str, Any]) -> None:
    sample = run(mapper_of(3, ResizeShortest(min_sizes=(54,), max_size=999)), record)
    for image, frame in zip(sample["image"], sample["instances"], strict=True):
        assert frame.image_size == tuple(image.shape[1:]) == (54, 90)
        for slot, value in enumerate((100, 120, 140)):
            pixels = image[0][frame.gt_masks.tensor[slot]]
            assert (frame.gt_ids[slot] >= 0) == (len(pixels) > 0)
            assert pixels.tolist() == [] or pixels.median() == value


def test_only_instances_of_the_chosen_frames_get_a_slot(record: dict[str, Any]) -> None:
    mapper = mapper_of(1)
    ids = {tuple(run(mapper, record, seed)["instances"][0].gt_ids.tolist()) for seed in range(20)}
    assert ids == {(0, 1), (0, 2)}


def test_only_the_chosen_frames_are_read_and_decoded(record: dict[str, Any]) -> None:
    for frame in (0, 1):
        Path(record["file_names"][frame]).unlink()
        for annotation in record["annotations"]:
            annotation["segmentations"][frame] = {"size": [27, 45], "counts": "damaged"}
    mapper = mapper_of(1)
    sample = next(sample for sample in (_run_or_none(mapper, record, seed) for seed in range(20)) if sample is not None)
    assert sample["frame_ids"] == [2]
    assert sample["instances"][0].gt_ids.tolist() == [0, 2]


def _run_or_none(mapper: ClipMapper, record: dict[str, Any], seed: int) -> ClipSample | None:
    try:
        return run(mapper, record, seed)
    except FileNotFoundError:
        return None


def test_a_frame_without_box_does_not_count(record: dict[str, Any]) -> None:
    record["annotations"][0]["bboxes"][1] = None
    assert [frame.gt_ids[0].item() for frame in run(mapper_of(3), record)["instances"]] == [0, -1, 0]


class _Window(Crop):
    """Always the lower right part of the frame."""

    def draw(self, sizes: Any, rng: np.random.Generator) -> Any:
        from fvcore.transforms.transform import CropTransform

        height, width = sizes[0]
        window = (height - 10, width - 25)
        return [(CropTransform(25, 10, window[1], window[0], width, height), window)] * len(sizes)


def test_instances_that_vanish_in_the_crop(make_record: MakeRecord) -> None:
    inside, outside = (30, 12, 40, 20), (3, 4, 20, 25)
    record = make_record(1, (27, 45), [[outside] * 3, [outside, inside, None], [inside] * 3])
    frames = run(mapper_of(3, _Window(kind="absolute", size=(1, 1))), record)["instances"]
    # Object 0 is nowhere in the clip any more, object 1 only in the second frame.
    assert [frame.gt_ids.tolist() for frame in frames] == [[-1, 2], [1, 2], [-1, 2]]
    assert [frame.gt_classes.tolist() for frame in frames] == [[1, 2]] * 3
    assert frames[1].gt_boxes.tensor.tolist() == [[5, 2, 15, 10]] * 2
    assert frames[0].gt_boxes.tensor[0].tolist() == [0] * 4


def test_a_clip_may_have_no_instance(make_record: MakeRecord) -> None:
    for objects in ([[None, None, None]], []):
        record = make_record(1, (27, 45), objects, length=3)
        frames = run(mapper_of(3), record)["instances"]
        assert [len(frame) for frame in frames] == [0, 0, 0]
        assert frames[0].gt_masks.tensor.shape == (0, 27, 45)
        assert frames[0].gt_boxes.tensor.shape == (0, 4)
        assert frames[0].gt_classes.dtype == torch.int64
        assert not mapper_of(3).usable(record)
    del record["annotations"]
    assert len(run(mapper_of(3), record)["instances"][0]) == 0


def test_classes_are_mapped_and_unmapped_ones_left_out(record: dict[str, Any]) -> None:
    categories = [None] * 4 + [1, None, 0]
    mapper = mapper_of(3, categories=categories)
    frames = run(mapper, record)["instances"]
    assert [frame.gt_classes.tolist() for frame in frames] == [[1, 0]] * 3
    assert [frame.gt_ids.tolist() for frame in frames] == [[0, -1], [0, -1], [0, 2]]
    assert mapper.usable(record)
    assert not mapper_of(3, categories=[None] * 7).usable(record)


def test_frames_of_different_sizes(record: dict[str, Any]) -> None:
    step = ResizeShortest(min_sizes=(20, 30, 40), max_size=999, sampling="choice")
    sizes = set()
    for seed in range(5):
        sample = run(mapper_of(3, step), record, seed)
        shapes = [tuple(frame.shape[1:]) for frame in sample["image"]]
        assert [frame.image_size for frame in sample["instances"]] == shapes
        assert [frame.gt_masks.tensor.shape for frame in sample["instances"]] == [(3, *shape) for shape in shapes]
        sizes.add(len(set(shapes)))
    assert max(sizes) > 1


def small_cfg(**keys: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (20, 30)
    cfg.INPUT.PSEUDO.MIN_SIZE_TRAIN = (25,)
    cfg.INPUT.LSJ_AUG.IMAGE_SIZE = cfg.INPUT.IMAGE_SIZE = 48
    cfg.merge_from_list([part for key, value in keys.items() for part in (key.replace("__", "."), value)])
    return cfg


def test_pseudo_video_of_an_image(make_record: MakeRecord) -> None:
    record = make_record(5, (50, 70), [[(20, 15, 50, 40)], [(1, 1, 3, 3)]])
    mapper = build_mapper(small_cfg(INPUT__SAMPLING_FRAME_NUM=5), dataset_name="toy", still=True)
    sample = run(mapper, record, 1)
    assert sample["file_names"] == record["file_names"] * 5
    assert sample["frame_ids"] == [0, 1, 2, 3, 4]
    assert sample["length"] == 5
    assert all(tuple(frame.shape) == (3, 25, 35) for frame in sample["image"])
    assert all(frame.gt_ids[0] == 0 for frame in sample["instances"])
    masks = torch.stack([frame.gt_masks.tensor[0] for frame in sample["instances"]])
    changes = [(masks[0] != mask).sum().item() for mask in masks]
    assert changes == sorted(changes)  # the object turns steadily
    assert changes[-1] > 0
    two = build_image_mapper(small_cfg(INPUT__PSEUDO__SAMPLING_FRAME_NUM=2), jitter=False)
    assert len(run(two, record)["image"]) == 2


@pytest.mark.parametrize(
    "keys", [{"INPUT__DATASET_MAPPER_NAME": "coco_instance_lsj"}, {"INPUT__LSJ_AUG__ENABLED": True}]
)
def test_large_scale_jitter_of_an_image(make_record: MakeRecord, keys: dict[str, Any]) -> None:
    record = make_record(5, (50, 70), [[(20, 15, 50, 40)]])
    mapper = build_mapper(small_cfg(**keys), dataset_name="toy", still=True)
    samples = [run(mapper, record, seed) for seed in range(12)]
    assert all(tuple(sample["image"][0].shape) == (3, 48, 48) for sample in samples)
    assert len({len(sample["instances"][0]) for sample in samples}) == 1 or any(
        len(sample["instances"][0]) == 0 for sample in samples
    )
    areas = {int(sample["instances"][0].gt_masks.tensor.sum()) for sample in samples}
    assert len(areas) > 6


def test_keys_reach_the_mapper(record: dict[str, Any]) -> None:
    cfg = small_cfg(
        INPUT__SAMPLING_FRAME_NUM=3,
        INPUT__SAMPLING_FRAME_RANGE=1,
        INPUT__AUGMENTATIONS=["brightness", "contrast", "saturation", "rotation"],
        INPUT__CROP__ENABLED=True,
        INPUT__CROP__SIZE=(300, 350),
    )
    mapper = build_clip_mapper(cfg)
    shapes = {tuple(run(mapper, record, seed)["image"][0].shape[1:]) for seed in range(10)}
    assert {min(shape) for shape in shapes} == {20, 30}
    assert len(shapes) > 2  # crops change the aspect
    with pytest.raises(ValueError, match="Did you mean 'rotation'"):
        build_clip_mapper(small_cfg(INPUT__AUGMENTATIONS=["rotatoin"]))
    with pytest.raises(ValueError, match="holds videos"):
        build_mapper(small_cfg(INPUT__DATASET_MAPPER_NAME="coco_clip"), dataset_name="toy", still=False)
    with pytest.raises(ValueError, match="Did you mean 'coco_clip'"):
        build_mapper(small_cfg(INPUT__DATASET_MAPPER_NAME="coco_clips"), dataset_name="toy", still=True)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def _text(path: Path) -> None:
    path.write_text("not a picture")


def _cut_jpeg(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (27, 45, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:-400])


def _other_size(path: Path) -> None:
    Image.new("RGB", (44, 27)).save(path)


def _turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (45, 27)).save(path, format="JPEG", exif=exif)


def _deep(path: Path) -> None:
    Image.fromarray(np.full((27, 45), 999, dtype=np.uint16)).save(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "Cannot decode"),
        (_text, "Cannot decode"),
        (_cut_jpeg, "Cannot decode"),
        (_other_size, r"27 x 44 .* toy.json says 27 x 45"),
        (_deep, "mode 'I;16'"),
        (_turned, "45 x 27 .* EXIF orientation 6"),
    ],
)
def test_bad_frames_are_named(record: dict[str, Any], damage: Callable[[Path], None], message: str) -> None:
    damage(Path(record["file_names"][1]))
    with pytest.raises(ValueError, match=message) as error:
        run(mapper_of(3), record)
    assert all(part in str(error.value) for part in (record["file_names"][1], "video 9", "'toy'", "frame 1"))


def test_missing_frames_are_named(record: dict[str, Any]) -> None:
    Path(record["file_names"][2]).unlink()
    with pytest.raises(FileNotFoundError, match="video 9 of data set 'toy'") as error:
        run(mapper_of(3), record)
    assert record["file_names"][2] in str(error.value)


def test_exif_orientation_is_applied(record: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    pixels = np.zeros((45, 27, 3), dtype=np.uint8)
    pixels[:20] = 255
    Image.fromarray(pixels).save(record["file_names"][0], format="PNG", exif=exif)
    image = run(mapper_of(3), record)["image"][0]
    assert image[0, :, -1].min() == 255
    assert image[0, :, 0].max() == 0


def test_mask_of_another_size_is_named(record: dict[str, Any]) -> None:
    record["annotations"][1]["segmentations"][0]["size"] = [45, 27]
    with pytest.raises(ValueError, match="toy.json: annotation 1001 of video 9, frame 0"):
        run(mapper_of(3), record)


def test_grey_and_transparent_frames_become_rgb(record: dict[str, Any]) -> None:
    Image.new("L", (45, 27), 77).save(record["file_names"][0])
    Image.new("RGBA", (45, 27), (1, 2, 3, 4)).save(record["file_names"][1])
    sample = run(mapper_of(3), record)
    assert sample["image"][0].flatten(1).unique(dim=1).tolist() == [[77]] * 3
    assert sample["image"][1].flatten(1).unique(dim=1).tolist() == [[1], [2], [3]]
