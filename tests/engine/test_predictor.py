from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vis.engine.predictor import VideoPredictor
from vis.structures import VideoPrediction

HEIGHT, WIDTH = 20, 34


class FakeSession:
    def __init__(self, height: int, width: int) -> None:
        self.size = (height, width)
        self.windows: list[list[torch.Tensor]] = []
        self.parts: list[list[list[torch.Tensor]]] = []

    def push(self, frames: list[torch.Tensor]) -> None:
        assert not torch.is_grad_enabled()
        self.windows.append(frames)

    def close(self) -> VideoPrediction:
        length = sum(len(window) for window in self.windows)
        empty = torch.zeros(0)
        return VideoPrediction(empty, empty.long(), empty.long(), [], *self.size, length=length)

    def cut(self) -> VideoPrediction:
        prediction = self.close()
        self.parts.append(self.windows)
        self.windows = []
        return prediction


class FakeModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sessions: list[FakeSession] = []

    def open_video(self, height: int, width: int) -> FakeSession:
        self.sessions.append(FakeSession(height, width))
        return self.sessions[-1]


def frames_of(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(count)]


def predictor_of(**changes: int) -> VideoPredictor:
    settings = {"min_size": 0, "max_size": 1333, "window_size": 3, **changes}
    return VideoPredictor(model=FakeModel(), **settings)


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (3, [3]), (7, [3, 3, 1])])
def test_windows_hold_all_frames_in_order(count: int, sizes: list[int]) -> None:
    predictor = predictor_of()
    frames = frames_of(count)
    prediction = predictor.predict(iter(frames))
    (session,) = predictor.model.sessions
    assert [len(window) for window in session.windows] == sizes
    pushed = [frame for window in session.windows for frame in window]
    assert all(torch.equal(a, torch.from_numpy(b).permute(2, 0, 1)) for a, b in zip(pushed, frames, strict=True))
    assert (prediction.height, prediction.width, prediction.length) == (HEIGHT, WIDTH, count)


def test_frames_are_resized_as_in_the_test_loader() -> None:
    from vis.data.frame_reader import FrameSource, LazyFrames

    predictor = predictor_of(min_size=10, max_size=15)
    frame = frames_of(1)[0]
    predictor.predict([frame])
    (pushed,) = predictor.model.sessions[0].windows[0]
    assert pushed.shape == (3, 9, 15)  # the longer side is the limit: 20 x 34 -> 9 x 15
    assert pushed.dtype == torch.uint8
    loader = LazyFrames(source=FrameSource(["unused"], HEIGHT, WIDTH), size=(9, 15))
    assert loader._resize is not None
    assert np.array_equal(loader._resize.apply_image(frame).transpose(2, 0, 1), pushed.numpy())


def test_arrays_and_tensors_give_the_same() -> None:
    predictor = predictor_of(min_size=11)
    frame = frames_of(1)[0]
    predictor.predict([frame])
    predictor.predict([torch.from_numpy(frame).permute(2, 0, 1)])
    first, second = (session.windows[0][0] for session in predictor.model.sessions)
    assert torch.equal(first, second)


def test_several_videos_do_not_mix(caplog: pytest.LogCaptureFixture) -> None:
    predictor = predictor_of()
    assert not predictor.model.training
    predictor.open(HEIGHT, WIDTH)
    predictor.push(frames_of(1)[0])
    with caplog.at_level(logging.WARNING, logger="vis"):
        predictor.open(5, 6)
    assert "not closed" in caplog.text
    predictor.push(np.zeros((5, 6, 3), dtype=np.uint8))
    assert predictor.close().length == 1


def test_results_on_the_way(caplog: pytest.LogCaptureFixture) -> None:
    predictor = predictor_of()
    predictor.open(HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"cut\(\) without frames"):
        predictor.cut()
    lengths = []
    for count, end in ((4, predictor.cut), (2, predictor.cut), (1, predictor.close)):
        for frame in frames_of(count):
            predictor.push(frame)
        lengths.append(end().length)
    assert lengths == [4, 2, 1]
    (session,) = predictor.model.sessions
    assert [len(window) for window in session.parts[0]] == [3, 1]  # a cut ends the window
    predictor.open(HEIGHT, WIDTH)
    predictor.push(frames_of(1)[0])
    predictor.cut()
    with caplog.at_level(logging.WARNING, logger="vis"):
        predictor.open(HEIGHT, WIDTH)
    assert "not closed" not in caplog.text  # nothing was lost


def test_calls_in_the_wrong_order() -> None:
    predictor = predictor_of()
    frame = frames_of(1)[0]
    with pytest.raises(ValueError, match=r"open\(height, width\)"):
        predictor.push(frame)
    with pytest.raises(ValueError, match=r"open\(height, width\)"):
        predictor.close()
    predictor.open(HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="without frames"):
        predictor.close()
    with pytest.raises(ValueError, match="without frames"):
        predictor.predict([])


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((HEIGHT, WIDTH + 1, 3), dtype=np.uint8),
        np.zeros((HEIGHT, WIDTH), dtype=np.uint8),
        np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32),
        torch.zeros(HEIGHT, WIDTH, 3, dtype=torch.uint8),
        "frame.png",
    ],
)
def test_a_frame_that_does_not_fit(frame: object) -> None:
    predictor = predictor_of()
    predictor.open(HEIGHT, WIDTH)
    predictor.push(frames_of(1)[0])
    with pytest.raises(ValueError, match=r"frame 1 is 20x35|a frame must be"):
        predictor.push(frame)  # type: ignore[arg-type]
    assert predictor.close().length == 1  # what came before is not lost


def test_window_size_is_checked() -> None:
    with pytest.raises(ValueError, match="window_size is 0"):
        predictor_of(window_size=0)


def test_empty_weights_are_an_error() -> None:
    pytest.importorskip("vis.checkpoint")
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        VideoPredictor.from_config(SimpleNamespace(MODEL=SimpleNamespace(WEIGHTS="")))  # type: ignore[arg-type]
