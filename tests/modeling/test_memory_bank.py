"""The memory-bank tracker: against a slow reference on long random videos, and what becomes of objects.

The reference follows the released procedure step by step, in plain lists and double precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from vis.config import get_cfg
from vis.modeling.inference.growing import GrowingTracks, ResultRules
from vis.modeling.registry import TRACKER_REGISTRY
from vis.modeling.trackers.memory_bank import FrameDetections, MemoryBankTracker

OPTIONS: dict[str, dict[str, Any]] = {
    "released": {},
    "ovis": {"new_score": 0.3},
    "running": {"weighted": False},
    "no frame weight": {"frame_weight": False},
    "paper": {"association": "paper"},
    "long": {"memory_length": 8, "memory_frames": 17},
}
CHANNELS = 6


@dataclass
class Video:
    """Detections of each frame, best first: which object, score, embedding."""

    objects: list[list[int]]
    scores: list[list[float]]
    embeds: list[np.ndarray]

    def frame(self, t: int) -> FrameDetections:
        return FrameDetections(torch.tensor(self.scores[t]), torch.from_numpy(self.embeds[t]).float())


def random_video(seed: int, frames: int = 40, objects: int = 7) -> Video:
    """Objects that come, hide for long, flicker and resemble one another, with false detections among them."""
    rng = np.random.default_rng(seed)
    looks = rng.normal(size=(objects, CHANNELS)) * 1.5
    looks[1] = looks[0] + rng.normal(size=CHANNELS) * 0.3  # a near twin
    visible = np.ones(objects, dtype=bool)
    video = Video([], [], [])
    for _ in range(frames):
        visible ^= rng.random(objects) < 0.12
        found = [*np.flatnonzero(visible).tolist(), *([-1] * rng.integers(0, 3))]
        if not found:
            found = [0]
        scores = np.sort(rng.uniform(0.05, 1.0, len(found)))[::-1]
        rng.shuffle(found)
        embeds = [(looks[i] if i >= 0 else 0) + rng.normal(size=CHANNELS) * (0.6 if i >= 0 else 1.5) for i in found]
        video.objects.append(found)
        video.scores.append(scores.astype(np.float32).tolist())
        video.embeds.append(np.stack(embeds).astype(np.float32))
    return video


class SlowTracker:
    """The procedure in words: templates, two softmaxes, greedy links in order of scores, births, expiry."""

    def __init__(
        self,
        *,
        new_score: float = 0.2,
        weighted: bool = True,
        frame_weight: bool = True,
        association: str = "released",
        memory_length: int = 3,
        memory_frames: int = 10,
    ) -> None:
        self.new_score, self.weighted, self.frame_weight = new_score, weighted, frame_weight
        self.association, self.length, self.frames = association, memory_length, memory_frames
        self.memory: dict[int, dict[str, Any]] = {}
        self.born = 0
        self.now = -1

    def template(self, track: dict[str, Any]) -> np.ndarray:
        if not self.weighted:
            return track["running"]
        total, weights = np.zeros(CHANNELS), 0.0
        count = len(track["embeds"])
        for t in range(1, count + 1):  # 1 is the oldest
            weight = track["scores"][t - 1] + t / count
            if self.association == "paper":
                weight = 1 + count / (count + 1 - t)
            total, weights = total + weight * track["embeds"][t - 1], weights + weight
        return total / weights

    def step(self, scores: list[float], embeds: np.ndarray) -> list[int]:
        self.now += 1
        ids = [-1] * len(scores)
        start = self.new_score if self.memory else 0.2
        if self.memory:
            known = list(self.memory)
            templates = [self.template(self.memory[i]) for i in known]
            ages = [self.memory[i]["exist"] for i in known]
            table = [[float(np.dot(e, m)) for m in templates] for e in embeds.astype(np.float64)]
            score = [[self.answer(table, ages, i, j) for j in range(len(known))] for i in range(len(scores))]
            for i in range(len(scores)):
                row = list(score[i])
                rivals = [j for j in range(len(known)) if row[j] > 0.5]
                if len(rivals) >= 2 and self.frame_weight and self.association == "released":
                    mean = sum(ages[j] for j in rivals) / len(rivals)
                    row = [row[j] * (ages[j] if j in rivals else mean) for j in range(len(known))]
                best = max(range(len(known)), key=lambda j: row[j])
                if row[best] > 0.5:
                    ids[i] = known[best]
                    for other in range(len(scores)):
                        if other != i:
                            score[other][best] = 0.0
        for i, value in enumerate(scores):
            if ids[i] == -1 and value > start:
                ids[i] = self.born
                self.born += 1
        for i, track_id in enumerate(ids):
            if track_id == -1:
                continue
            embed = embeds[i].astype(np.float64)
            if track_id not in self.memory:
                fresh = {"embeds": [], "scores": [], "running": embed, "exist": 0}
                self.memory[track_id] = fresh
            track = self.memory[track_id]
            track["running"] = 0.2 * track["running"] + 0.8 * embed
            track["embeds"] = [*track["embeds"], embed][-self.length :]
            track["scores"] = [*track["scores"], scores[i]][-self.length :]
            track["last"], track["exist"] = self.now, track["exist"] + 1
        self.memory = {i: track for i, track in self.memory.items() if self.now - track["last"] < self.frames}
        return ids

    def answer(self, table: list[list[float]], ages: list[int], i: int, j: int) -> float:
        over_detections = math.exp(table[i][j]) / sum(math.exp(row[j]) for row in table)
        extra = ages if self.association == "paper" else [0] * len(ages)
        mass = [math.exp(value) + age for value, age in zip(table[i], extra, strict=True)]
        return (mass[j] / sum(mass) + over_detections) / 2


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_slow_reference(name: str, seed: int) -> None:
    video = random_video(seed)
    tracker, slow = MemoryBankTracker(**OPTIONS[name]), SlowTracker(**OPTIONS[name])
    state, used = None, set()
    for t in range(len(video.scores)):
        found, state = tracker(video.frame(t), state)
        assert found == slow.step(video.scores[t], video.embeds[t]), t
        used |= set(found)
    assert state is not None
    assert list(state.tracklets) == list(slow.memory)
    assert all(len(tracklet.embeds) <= tracker.memory_length for tracklet in state.tracklets.values())
    assert len(used) > 8, "the video is too easy for the test"


@pytest.mark.parametrize("seed", range(5))
def test_results_equal_the_released_assembly(seed: int) -> None:
    """Whole histories with None for frames without the track, padded and cleaned after every frame."""
    video, rng = random_video(seed), np.random.default_rng(seed)
    tracker, tracks = MemoryBankTracker(), GrowingTracks(ResultRules(threshold=0.45))
    history: dict[int, dict[str, list[Any]]] = {}
    state, dropped = None, 0
    for t in range(len(video.scores)):
        ids, state = tracker(video.frame(t), state)
        probabilities = torch.from_numpy(rng.random((len(ids), 4))).float()
        rles = [{"size": [1, 1], "counts": f"{t}.{row}"} for row in range(len(ids))]
        rows = [row for row, track_id in enumerate(ids) if track_id >= 0]
        tracks.add([ids[row] for row in rows], probabilities[rows], [rles[row] for row in rows])
        for row in rows:
            entry = history.setdefault(ids[row], {"masks": [None] * t, "scores": [None] * t})
            entry["masks"].append(rles[row])
            entry["scores"].append(probabilities[row])
        for entry in history.values():
            if len(entry["masks"]) < t + 1:
                entry["masks"].append(None)
                entry["scores"].append(None)
        if t > 8:
            noise = [
                key
                for key, entry in history.items()
                if entry["masks"][-1] is None
                and entry["masks"][-2] is None
                and sum(mask is not None for mask in entry["masks"]) < 3
            ]
            dropped += len(noise)
            for key in noise:
                del history[key]
    assert dropped, "the video has no noise"
    expected = []
    for key, entry in history.items():
        mean = torch.stack([score for score in entry["scores"] if score is not None]).mean(dim=0)
        expected += [(key, label, float(mean[label])) for label in range(4) if mean[label] > 0.45]
        assert tracks.masks(key) == entry["masks"]
    scores, labels, found = tracks.results()
    assert sorted(zip(found.tolist(), labels.tolist(), strict=True)) == sorted(x[:2] for x in expected)
    by_pair = {x[:2]: x[2] for x in expected}
    for key, label, score in zip(found.tolist(), labels.tolist(), scores.tolist(), strict=True):
        assert score == pytest.approx(by_pair[key, label], abs=1e-6)
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)


# What becomes of objects

EYE = torch.eye(CHANNELS) * 5


def follow(frames: list[list[tuple[int, float]]], scale: float = 1.0, **options: Any) -> list[list[int]]:
    """Ids of each frame's detections, given as (which look, score), best first; ``scale`` of the embeddings."""
    tracker, state, result = MemoryBankTracker(**options), None, []
    for frame in frames:
        looks, scores = [look for look, _ in frame], torch.tensor([score for _, score in frame])
        ids, state = tracker(FrameDetections(scores, EYE[looks].reshape(-1, CHANNELS) * scale), state)
        result.append(ids)
    return result


@pytest.mark.parametrize(("gap", "kept"), [(8, True), (9, True), (10, False), (15, False)])
def test_hidden_object(gap: int, kept: bool) -> None:
    """Object 1 is away for ``gap`` frames beside two that stay; one missed more than nine is forgotten."""
    both, rest = [(0, 0.9), (1, 0.8), (2, 0.7)], [(0, 0.9), (2, 0.7)]
    ids = follow([both, both, *[rest] * gap, both])
    assert ids[0] == ids[1] == [0, 1, 2]
    assert all(frame == [0, 2] for frame in ids[2:-1])
    assert ids[-1] == ([0, 1, 2] if kept else [0, 3, 2])


def test_longer_memory() -> None:
    both, rest = [(0, 0.9), (1, 0.8), (2, 0.7)], [(0, 0.9), (2, 0.7)]
    assert follow([both, *[rest] * 15, both], memory_frames=30)[-1] == [0, 1, 2]


def test_twins_that_cross() -> None:
    """Looks drift and cross in order of scores; ids stay with the looks."""
    frames = [[(0, 0.9), (1, 0.8)], [(1, 0.9), (0, 0.8)], [(1, 0.95), (0, 0.3)]]
    assert follow(frames) == [[0, 1], [1, 0], [1, 0]]
    # Indistinguishable ones are linked one to one in order of scores, never two to a track.
    same = follow([[(0, 0.9), (0, 0.8)]] * 3)
    assert all(len(set(frame)) == 2 for frame in same)


def test_births() -> None:
    """Above 0.2 in an empty memory, above the other threshold beside tracks; weaker ones are left out."""
    assert follow([[(0, 0.25), (1, 0.2)]], new_score=0.3) == [[0, -1]]
    assert follow([[(0, 0.9), (3, 0.9)], [(0, 0.9), (3, 0.8), (1, 0.31), (2, 0.3)]], new_score=0.3)[1] == [0, 1, 2, -1]


def test_nothing_detected() -> None:
    assert follow([[], [(0, 0.9)], [], [(0, 0.9)]]) == [[], [0], [], [0]]


def test_lone_track_takes_whatever_comes() -> None:
    """Released: one track in memory makes one softmax 1, so that after a cut another object inherits the id."""
    cut = [[(0, 0.9)], [(0, 0.9)], [(4, 0.9)]]
    assert follow(cut) == [[0], [0], [0]]
    assert follow(cut, min_cosine=0.3) == [[0], [0], [1]]
    assert follow([[(0, 0.9)], [], [(0, 0.5)]], min_cosine=0.3) == [[0], [], [0]]


def test_lone_detection_goes_to_the_older_track() -> None:
    """Released: one detection answers to every track by more than 0.5; frames of existence then decide."""
    frames = [[(0, 0.9), (2, 0.8)]] * 20 + [[(0, 0.9), (2, 0.8), (1, 0.7)]] * 3 + [[(1, 0.9)]]
    assert follow(frames, scale=0.3)[-1] == [0]
    assert follow(frames, scale=0.3, frame_weight=False)[-1] == [2]
    assert follow(frames, scale=0.3, min_cosine=0.3)[-1] == [2]
    assert follow([*frames, [(4, 0.9)]], scale=0.3, min_cosine=0.3)[-1] == [3], "it resembles none of them"
    both = [(0, 0.9), (1, 0.8)]
    assert follow([both, both, [(1, 0.9)]], scale=0.3) == [[0, 1], [0, 1], [1]]


def test_template_weights() -> None:
    """Scores .9, .8, .7 from the oldest on: .9 + 1/3, .8 + 2/3, .7 + 1."""
    tracker = MemoryBankTracker()
    _, state = tracker(FrameDetections(torch.tensor([0.9]), torch.tensor([[1.0, 0, 0]])), None)
    for score, embed in ((0.8, [0.0, 1, 0]), (0.7, [0.0, 0, 1])):
        _, state = tracker(FrameDetections(torch.tensor([score]), torch.tensor([embed])), state)
    weights = np.array([0.9 + 1 / 3, 0.8 + 2 / 3, 1.7])
    np.testing.assert_allclose(tracker._template(state.tracklets[0]).numpy(), weights / weights.sum(), rtol=1e-5)
    paper = MemoryBankTracker(association="paper")
    weights = np.array([1 + 3 / 3, 1 + 3 / 2, 1 + 3 / 1])
    np.testing.assert_allclose(paper._template(state.tracklets[0]).numpy(), weights / weights.sum(), rtol=1e-5)


def test_answers_by_hand() -> None:
    """Means of two softmaxes; as the paper states it, tracks of 2 and 5 frames take part with n + exp(product)."""
    a, b, c, d = 0.7, -0.2, 1.1, 0.4
    products, ages = torch.tensor([[a, b], [c, d]]), torch.tensor([2.0, 5.0])
    exp = math.exp
    columns = [exp(a) / (exp(a) + exp(c)), exp(b) / (exp(b) + exp(d))]
    released = MemoryBankTracker()._answers(products, ages)
    assert float(released[0, 0]) == pytest.approx((exp(a) / (exp(a) + exp(b)) + columns[0]) / 2, rel=1e-5)
    assert float(released[0, 1]) == pytest.approx((exp(b) / (exp(a) + exp(b)) + columns[1]) / 2, rel=1e-5)
    paper = MemoryBankTracker(association="paper")._answers(products, ages)
    mass = exp(a) + 2 + exp(b) + 5
    assert float(paper[0, 0]) == pytest.approx(((exp(a) + 2) / mass + columns[0]) / 2, rel=1e-5)
    assert float(paper[0, 1]) == pytest.approx(((exp(b) + 5) / mass + columns[1]) / 2, rel=1e-5)


def test_large_products_do_not_overflow() -> None:
    for association in ("released", "paper"):
        tracker = MemoryBankTracker(association=association)
        frame = FrameDetections(torch.tensor([0.9, 0.8]), torch.tensor([[100.0, 0], [0, 100.0]]))
        _, state = tracker(frame, None)
        assert tracker(frame, state)[0] == [0, 1]


def test_two_videos_do_not_mix() -> None:
    """The module keeps nothing."""
    tracker, videos = MemoryBankTracker(), [random_video(1), random_video(2)]
    alone = []
    for video in videos:
        state, ids = None, []
        for t in range(20):
            found, state = tracker(video.frame(t), state)
            ids.append(found)
        alone.append(ids)
    states = [None, None]
    for t in range(20):
        for i, video in enumerate(videos):
            found, states[i] = tracker(video.frame(t), states[i])
            assert found == alone[i][t]
    assert not list(tracker.parameters())
    assert not list(tracker.buffers())


def test_configuration() -> None:
    cfg = get_cfg()
    cfg.MODEL.IDOL.ADD_NEW_SCORE = 0.35
    cfg.MODEL.IDOL.MEMORY_FRAMES = 12
    tracker = TRACKER_REGISTRY.get("MemoryBankTracker")(cfg)
    assert (tracker.new_score, tracker.first_score, tracker.memory_frames, tracker.memory_length) == (0.35, 0.2, 12, 3)
    with pytest.raises(ValueError, match="MODEL.IDOL.ASSOCIATION is 'papers'"):
        MemoryBankTracker(association="papers")
    with pytest.raises(ValueError, match="must be at least 1"):
        MemoryBankTracker(memory_length=0)
