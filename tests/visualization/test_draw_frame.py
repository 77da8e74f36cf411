from __future__ import annotations

import numpy as np
import pytest

from vis.structures import VideoPrediction
from vis.visualization import FrameTrack, VideoTrack, draw_frame, draw_video, track_color, tracks_at, visible_tracks
from vis.visualization.draw import _fit_text, _place, auto_scale
from vis.visualization.tracks import tracks_of_prediction, tracks_of_record, tracks_of_results

HEIGHT, WIDTH = 330, 350


def box_mask(y0: int, y1: int, x0: int, x1: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def noise(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pixels_change_inside_the_mask_only() -> None:
    image, before = noise(), noise()
    mask = box_mask(100, 140, 60, 130)
    drawn = draw_frame(image, [FrameTrack(4, mask, "cat", 0.5)], labels=False, alpha=0.25)
    assert np.array_equal(image, before)  # the input is not touched
    assert np.array_equal(drawn[~mask], before[~mask])
    inner = np.s_[101:139, 61:129]
    expected = before[inner] * 0.75 + np.asarray(track_color(4)) * 0.25
    assert np.abs(drawn[inner].astype(float) - expected).max() <= 0.5 + 1e-6
    edge = mask.copy()
    edge[inner] = False
    assert (drawn[edge] == track_color(4)).all()


def test_contour_follows_the_edge_of_the_picture() -> None:
    mask = box_mask(0, 10, 0, 12)
    drawn = draw_frame(noise(), [FrameTrack(1, mask, "cat")], labels=False)
    assert (drawn[0, :12] == track_color(1)).all()
    assert (drawn[:10, 0] == track_color(1)).all()


def test_small_object_stays_visible_in_front_of_a_large_one() -> None:
    large, small = box_mask(10, 300, 10, 300), box_mask(100, 110, 100, 110)
    for tracks in ([(1, large), (2, small)], [(2, small), (1, large)]):
        drawn = draw_frame(
            np.zeros((HEIGHT, WIDTH, 3), np.uint8), [FrameTrack(i, m, "x") for i, m in tracks], labels=False
        )
        assert (drawn[100, 100] == track_color(2)).all()


def test_small_frames_are_enlarged() -> None:
    assert [auto_scale(width) for width in (80, 128, 319, 320, 1280)] == [4, 3, 2, 1, 1]
    mask = box_mask(10, 20, 30, 50, (96, 128))
    drawn = draw_frame(noise(96, 128), [FrameTrack(0, mask, "cat", 0.5)], labels=False)
    assert drawn.shape == (288, 384, 3)
    assert (drawn[30, 90] == track_color(0)).all()
    assert (drawn[59, 149] == track_color(0)).all()
    assert draw_frame(noise(96, 128), [FrameTrack(0, mask, "cat")], scale=1).shape == (96, 128, 3)
    assert draw_frame(noise(96, 128), [FrameTrack(0, mask, "cat")], scale=0.5).shape == (48, 64, 3)


@pytest.mark.parametrize(
    "corner", [(0, 3, 0, 3), (0, 3, 347, 350), (327, 330, 0, 3), (327, 330, 347, 350), (0, 330, 0, 350)]
)
def test_label_stays_inside_the_picture(corner: tuple[int, int, int, int]) -> None:
    y0, y1, x0, x1 = corner
    size = (WIDTH, HEIGHT)
    _, _, (width, height) = _fit_text("kitchen table #12  0.87", size)
    x, y = _place((x0, y0, x1, y1), (width, height), size, [], [(x0, y0, x1, y1)])
    assert x >= 0
    assert y >= 0
    assert x + width <= WIDTH
    assert y + height <= HEIGHT
    drawn = draw_frame(
        np.zeros((HEIGHT, WIDTH, 3), np.uint8), [FrameTrack(12, box_mask(*corner), "kitchen table", 0.87)]
    )
    # The whole background of the label is there: nothing of it was cut off.
    label = (drawn[y : y + height, x : x + width] == track_color(12)).all(axis=-1)
    assert label[0].all()
    assert label[-1].all()
    assert label[:, 0].all()
    assert label[:, -1].all()


def test_label_is_shortened_where_there_is_no_room() -> None:
    text, _, (width, height) = _fit_text("a class with a very long name #12  0.87", (110, 90))
    assert width <= 110
    assert height <= 90
    assert text.endswith("#12  0.87")
    assert text.startswith("a cl")
    text, _, (width, _) = _fit_text("cat #12  0.87", (30, 20))
    assert width <= 30
    draw_frame(noise(3, 5), [FrameTrack(12, np.ones((3, 5), bool), "cat", 0.87)], scale=1)  # no error at any size


def test_labels_do_not_cover_each_other() -> None:
    taken = [(100, 85, 160, 100)]
    x, y = _place((100, 100, 150, 150), (60, 15), (400, 300), taken, [])
    assert x >= 160 or x + 60 <= 100 or y >= 100 or y + 15 <= 85


def test_boxes_are_drawn_on_request() -> None:
    mask = box_mask(50, 90, 60, 120) & (np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) > 148)
    black = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    with_box = draw_frame(black, [FrameTrack(2, mask, "x")], labels=False, boxes=True)
    without = draw_frame(black, [FrameTrack(2, mask, "x")], labels=False)
    assert (with_box[50, 60] == track_color(2)).all()
    assert not without[50, 60].any()


def test_wrong_frames_and_masks() -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8"):
        draw_frame(np.zeros((4, 5, 3)), [])
    with pytest.raises(ValueError, match="track 3 has a mask"):
        draw_frame(noise(), [FrameTrack(3, np.ones((2, 2), bool), "x")])


def rle_track(number: int, length: int, score: float | None = 0.8, name: str = "cat") -> VideoTrack:
    polygon = [[10.0, 10.0, 60.0, 10.0, 60.0, 50.0, 10.0, 50.0]]
    return VideoTrack(number, name, score, [polygon if frame != 1 else None for frame in range(length)])


def test_a_track_keeps_its_colour_through_absence_and_company() -> None:
    frames = [np.zeros((HEIGHT, WIDTH, 3), np.uint8) for _ in range(3)]
    alone = list(draw_video(iter(frames), [rle_track(5, 3)]))
    assert (alone[0][10, 10] == track_color(5)).all()
    assert np.array_equal(alone[0], alone[2])
    assert not alone[1].any()
    other = VideoTrack(1, "dog", 0.9, [None, None, [[200.0, 200.0, 260.0, 200.0, 260.0, 240.0]]])
    together = list(draw_video(frames, [other, rle_track(5, 3)]))
    assert (together[2][10, 10] == track_color(5)).all()


def test_results_of_another_video() -> None:
    with pytest.raises(ValueError, match="3 masks, but the video has a frame 4"):
        tracks_at([rle_track(1, 3)], 3, HEIGHT, WIDTH)
    rle = {"size": [4, 6], "counts": [0, 24]}
    with pytest.raises(ValueError, match="are these the results of this video"):
        tracks_at([VideoTrack(1, "cat", 0.5, [rle])], 0, 5, 6)
    assert tracks_at([VideoTrack(1, "cat", 0.5, [rle])], 0, 4, 6)[0].mask.all()


def test_threshold_and_best_class_of_a_track(caplog: pytest.LogCaptureFixture) -> None:
    tracks = [rle_track(1, 2, 0.4, "dog"), rle_track(1, 2, 0.6, "cat"), rle_track(2, 2, 0.1), rle_track(3, 2, None)]
    with caplog.at_level("INFO", logger="vis"):
        shown = visible_tracks(tracks, 0.3)
    assert [(track.track_id, track.name) for track in shown] == [(1, "cat"), (3, "cat")]
    assert "2 of 4" in caplog.text


def test_tracks_from_predictions_results_and_records() -> None:
    import torch

    masks = [[None, None], [None, None]]
    prediction = VideoPrediction(
        torch.tensor([0.5, 0.25]), torch.tensor([1, 7]), torch.tensor([4, 9]), masks, HEIGHT, WIDTH, 2
    )
    tracks = tracks_of_prediction(prediction, ["cat", "dog"])
    assert [(t.track_id, t.name, t.score) for t in tracks] == [(4, "dog", 0.5), (9, "class 7", 0.25)]
    entries = [
        {"category_id": 3, "score": 0.5, "segmentations": [None]},
        {"category_id": 8, "category_name": "owl", "track_id": 6, "score": 0.4, "segmentations": [None]},
    ]
    assert [(t.track_id, t.name) for t in tracks_of_results(entries, {3: "cat"})] == [(0, "cat"), (6, "owl")]
    assert [t.name for t in tracks_of_results(entries, {})] == ["class 3", "owl"]
    record = {"annotations": [
        {"id": 90, "category_id": 1, "iscrowd": 0, "segmentations": [None]},
        {"id": 91, "category_id": 0, "iscrowd": 1, "segmentations": [None]},
        {"id": 95, "category_id": 0, "iscrowd": 0, "segmentations": [None]},
    ]}  # fmt: skip
    truth = tracks_of_record(record, ["cat", "dog"])
    assert [(t.track_id, t.name, t.score) for t in truth] == [(1, "dog", None), (2, "cat", None)]
