"""The segmenter's predictions on disk: the same numbers, made once, for these pixels and these weights only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vis.config import CfgNode
from vis.modeling import build_model
from vis.modeling.segmenter.cache import SegmenterCache, build_segmenter_cache, cached_segment, refuse_segmenter_cache
from vis.modeling.transformer_decoders.masked import DecoderOutput

Q, K, C, CM = 5, 3, 8, 6


class Segmenter(nn.Module):
    """Counts the frames it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, CM), requires_grad=False)
        self.norm = nn.BatchNorm2d(3).requires_grad_(False).eval()
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> DecoderOutput:
        self.seen.append(len(images))
        features = torch.einsum("nchw,cd->ndhw", images, self.weight)
        means = features.mean(dim=(2, 3))
        queries = torch.arange(1.0, Q + 1)[:, None]
        embeds = means.mean(dim=1)[:, None, None] * queries.expand(Q, C)
        return {
            "pred_logits": embeds[..., : K + 1],
            "pred_embeds": embeds,
            "raw_embeds": embeds + 1,
            "mask_embeds": means[:, None] * queries,
            "mask_features": features,
            "aux_outputs": [],
        }


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, 11, 13)


def cache(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> SegmenterCache:
    return SegmenterCache(folder=folder, dtype=dtype, **{"max_bytes": 1e9, **options})


def same(found: DecoderOutput, expected: DecoderOutput, atol: float = 0.0) -> None:
    assert set(found) == set(expected)
    for name in ("pred_logits", "pred_embeds", "raw_embeds", "mask_embeds", "mask_features"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol)  # type: ignore[literal-required]


def test_frames_are_segmented_once(tmp_path: Path, images: Tensor) -> None:
    model = Segmenter()
    expected = model(images)
    model.seen.clear()
    store = cache(tmp_path)
    same(store.segment(images[:2], [model], model), {**expected, **_rows(expected, slice(0, 2))})
    same(store.segment(images[[1, 3, 0, 2]], [model], model), _rows(expected, [1, 3, 0, 2]))
    assert model.seen == [2, 2]  # the second time only the new frames
    same(cache(tmp_path).segment(images, [model], model), expected)  # another process
    assert model.seen == [2, 2]


def _rows(output: DecoderOutput, rows: Any) -> DecoderOutput:
    return {name: value if isinstance(value, list) else value[rows] for name, value in output.items()}  # type: ignore[return-value]


def test_half_precision_reads_what_it_wrote(tmp_path: Path, images: Tensor) -> None:
    model = Segmenter()
    store = cache(tmp_path, torch.float16)
    first, second = (store.segment(images, [model], model) for _ in range(2))
    assert model.seen == [4]
    same(second, first)
    same(first, model(images), atol=5e-3)
    assert first["mask_features"].dtype == torch.float32


def test_other_pixels_weights_and_settings_are_other_entries(tmp_path: Path, images: Tensor) -> None:
    model, store = Segmenter(), cache(tmp_path)
    store.segment(images, [model], model)
    moved = images.clone()
    moved[2, 0, 0, 0] += 1e-3
    store.segment(moved, [model], model)
    assert model.seen == [4, 1]
    padded = torch.nn.functional.pad(images, (0, 2))
    store.segment(padded, [model], model)
    assert model.seen == [4, 1, 4]
    cache(tmp_path, settings="more heads").segment(images, [model], model)
    assert model.seen == [4, 1, 4, 4]
    with torch.no_grad():
        model.weight[0, 0] += 1  # the same cache notices
    same(store.segment(images, [model], model), model(images))
    assert model.seen == [4, 1, 4, 4, 4, 4]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        store.segment(images, [model], model)
    assert model.seen[-1] == 4


def test_a_trained_segmenter_is_refused(tmp_path: Path, images: Tensor) -> None:
    model = Segmenter()
    model.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen"):
        cache(tmp_path).segment(images, [model], model)


def test_a_full_folder_is_still_read(tmp_path: Path, images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = Segmenter()
    store = cache(tmp_path, max_bytes=1)
    with caplog.at_level("WARNING"):
        store.segment(images, [model], model)
    assert len(list(tmp_path.glob("*.pt"))) == 1
    assert "is full" in caplog.text
    store.segment(images, [model], model)
    assert model.seen == [4, 3]


def test_a_damaged_file_is_named(tmp_path: Path, images: Tensor) -> None:
    model, store = Segmenter(), cache(tmp_path)
    store.segment(images[:1], [model], model)
    (path,) = tmp_path.glob("*.pt")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"{path.name} of the segmenter cache is damaged"):
        store.segment(images[:1], [model], model)


def test_without_a_cache_everything_is_computed(images: Tensor) -> None:
    model = Segmenter()
    for _ in range(2):
        same(cached_segment(None, images, [model], model), model(images))
    assert model.seen == [4] * 4


OFF = {"INPUT.RANDOM_FLIP": "none", "INPUT.MIN_SIZE_TRAIN": "(96,)", "INPUT.AUGMENTATIONS": "[]"}


def test_keys(tiny_cfg: Callable[..., CfgNode], tmp_path: Path) -> None:
    assert build_segmenter_cache(tiny_cfg()) is None
    refuse_segmenter_cache(tiny_cfg())
    on = {"MODEL.SEGMENTER_CACHE.ENABLED": True, "MODEL.SEGMENTER_CACHE.DIR": str(tmp_path / "cache"), **OFF}
    built = build_segmenter_cache(tiny_cfg(on))
    assert built is not None
    assert (built.folder, built.dtype) == (tmp_path / "cache", torch.float16)
    other = build_segmenter_cache(tiny_cfg({**on, "MODEL.MASK_FORMER.NHEADS": 2}))
    assert other is not None
    assert other.settings != built.settings
    for changes, message in (
        ({"MODEL.SEGMENTER_CACHE.DIR": ""}, "DIR"),
        ({"MODEL.SEGMENTER_CACHE.DTYPE": "int8"}, "DTYPE is 'int8'"),
        ({"INPUT.RANDOM_FLIP": "flip_by_clip"}, "INPUT.RANDOM_FLIP flip_by_clip"),
        ({"INPUT.MIN_SIZE_TRAIN": "(96, 112)"}, r"INPUT.MIN_SIZE_TRAIN \(96, 112\)"),
        ({"INPUT.AUGMENTATIONS": "['rotation']"}, "rotation"),
        ({"INPUT.CROP.ENABLED": True}, "INPUT.CROP.ENABLED"),
    ):
        with pytest.raises(ValueError, match=message):
            build_segmenter_cache(tiny_cfg({**on, **changes}))
    for refused in (refuse_segmenter_cache, build_model):
        with pytest.raises(ValueError, match="MinVIS trains its own"):
            refused(tiny_cfg(on))


@pytest.mark.parametrize("name", ["DVISOnline", "DVISOffline"])
def test_dvis_trains_and_evaluates_through_it(tiny_cfg: Callable[..., CfgNode], tmp_path: Path, name: str) -> None:
    changes = {"MODEL.META_ARCHITECTURE": name, "MODEL.TRACKER.DECODER_LAYERS": 1, "MODEL.REFINER.DECODER_LAYERS": 1}
    on = {"MODEL.SEGMENTER_CACHE.ENABLED": True, "MODEL.SEGMENTER_CACHE.DIR": str(tmp_path), **OFF}
    torch.manual_seed(0)
    plain = build_model(tiny_cfg(changes))
    cached = build_model(tiny_cfg({**changes, **on, "MODEL.SEGMENTER_CACHE.DTYPE": "float32"}))
    cached.load_state_dict(plain.state_dict())
    images = torch.randn(3, 3, 32, 64)
    calls: list[int] = []
    segment = cached.segment
    cached.segment = lambda frames: (calls.append(len(frames)), segment(frames))[1]
    expected = plain.segment_clips(images, 1)
    for _ in range(2):
        found = cached.train().segment_clips(images, 1)
        for field, value in vars(expected).items():
            torch.testing.assert_close(getattr(found, field), value, rtol=0, atol=0, msg=field)
    assert calls == [3]
