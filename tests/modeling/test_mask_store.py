"""Masks of a video on their way from the network to RLEs: the store, the writer, the selection."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from vis.modeling.inference import MaskStore, MaskWriter, select_tracks

Q, H, W = 5, 6, 9
FRAME_BYTES = Q * H * W * 4


def frame(seed: int) -> torch.Tensor:
    return torch.randn(Q, H, W, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("in_memory", [1, 3 * FRAME_BYTES, 1 << 20])
def test_reads_back_exactly(in_memory: int) -> None:
    with MaskStore(in_memory=in_memory) as store:
        for t in range(7):
            store.append(frame(t).requires_grad_() if t % 2 else frame(t).transpose(1, 2).contiguous().transpose(1, 2))
            assert torch.equal(store.read(t, [4, 1]), frame(t)[[4, 1]])  # between two frames
        assert len(store) == 7
        on_disk = isinstance(store._file._rolled, bool) and store._file._rolled
        assert on_disk == (in_memory < 7 * FRAME_BYTES)
        for t in (6, 0, 3):
            assert torch.equal(store.read(t, list(range(Q))), frame(t))
            assert torch.equal(store.read(t), frame(t))
        assert store.read(2, []).shape == (0, H, W)


def test_half_precision_is_kept_as_float32() -> None:
    with MaskStore() as store:
        store.append(frame(1).bfloat16())
        assert torch.equal(store.read(0, [2]), frame(1).bfloat16().float()[[2]])


def test_the_file_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = MaskStore(in_memory=1)
    store.append(frame(0))
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_wrong_use() -> None:
    with MaskStore() as store:
        with pytest.raises(IndexError, match="frame 0 of a store of 0"):
            store.read(0, [0])
        store.append(frame(0))
        with pytest.raises(ValueError, match=r"frame 1 are \(5, 6, 8\), those before \(5, 6, 9\)"):
            store.append(frame(1)[..., 1:])
        for missing in (-1, 1):
            with pytest.raises(IndexError):
                store.read(missing, [0])
        assert len(store) == 1


class FullDisk:
    """A file on a disk that is full after some bytes."""

    def __init__(self, code: int) -> None:
        self.code = code

    def seek(self, position: int) -> None:
        pass

    def write(self, data: bytes) -> None:
        raise OSError(self.code, "the system's words")

    def close(self) -> None:
        pass


def test_a_full_disk_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/some/small/disk")
    store: Any = MaskStore()
    store._file = FullDisk(errno.ENOSPC)
    with pytest.raises(OSError, match=r"frame 0 .*/some/small/disk.*TMPDIR") as caught:
        store.append(frame(0))
    assert caught.value.errno == errno.ENOSPC
    store._file = FullDisk(errno.EIO)
    with pytest.raises(OSError, match="the system's words"):
        store.append(frame(0))
    assert len(store) == 0


PADDED, INPUT, ORIGINAL = (32, 64), (27, 50), (41, 33)


def writer(**changes: Any) -> MaskWriter:
    values: dict[str, Any] = {"padded_size": PADDED, "input_size": INPUT, "output_size": ORIGINAL}
    return MaskWriter(**{"num_queries": 4, **values, **changes})


def naive(logits: torch.Tensor) -> torch.Tensor:
    x = F.interpolate(logits[None], size=PADDED, mode="bilinear", align_corners=False)[..., : INPUT[0], : INPUT[1]]
    return F.interpolate(x, size=ORIGINAL, mode="bilinear", align_corners=False)[0]


def test_writer_equals_resize_crop_resize() -> None:
    torch.manual_seed(1)
    frames = [torch.randn(4, 8, 16), torch.randn(4, 8, 16)]
    frames[1][2] = -1  # empty in the second frame
    frames[0][1] *= 0.1  # weak logits are inside as well
    frames[0][3] = -1
    frames[0][3, 7, 15] = 5  # only in the padding
    out = writer()
    for logits in frames:
        out.add(logits)
    assert [len(track) for track in out.tracks] == [2, 2, 2, 2]
    assert out.tracks[2][1] is None
    assert out.tracks[3][0] is None
    for t, logits in enumerate(frames):
        for query in range(4):
            rle = out.tracks[query][t]
            wanted = (naive(logits)[query] > 0).numpy()
            if rle is None:
                assert not wanted.any()
            else:
                assert rle["size"] == list(ORIGINAL)
                assert isinstance(rle["counts"], str)
                assert np.array_equal(coco_mask.decode(rle).astype(bool), wanted)


def test_writer_without_masks() -> None:
    out = writer(num_queries=2, with_mask_score=True)
    out.add(torch.full((2, 8, 16), -3.0))
    out.add(torch.zeros(2, 8, 16))  # a logit of 0 is not inside
    assert out.tracks == [[None, None], [None, None]]
    assert out.mask_scores().tolist() == [0, 0]
    nobody = writer(num_queries=0)
    nobody.add(torch.zeros(0, 8, 16))
    assert nobody.tracks == []


def test_mask_scores_average_over_all_pixels_of_all_frames() -> None:
    torch.manual_seed(2)
    frames = [torch.randn(4, 8, 16) for _ in range(3)]
    out = writer(with_mask_score=True)
    for logits in frames:
        out.add(logits)
    full = torch.stack([naive(logits) for logits in frames], dim=1)
    for query in range(4):
        inside = full[query][full[query] > 0]
        assert float(out.mask_scores()[query]) == pytest.approx(float(inside.sigmoid().mean()), rel=1e-4)


def test_select_tracks() -> None:
    probabilities = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.05, 0.2]], dtype=torch.bfloat16)
    scores, labels, queries = select_tracks(probabilities, 4)
    assert labels.tolist() == [1, 0, 2, 2]
    assert queries.tolist() == [0, 1, 0, 1]
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([0.9, 0.8, 0.3, 0.2], abs=0.005)
    assert [len(part) for part in select_tracks(probabilities, 50)] == [6, 6, 6]
    assert [len(part) for part in select_tracks(probabilities, 0)] == [0, 0, 0]
