"""The parts of the report that need no browser: coverage, outlines, what fits a budget, the page's safety."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from vis.visualization import track_color
from vis.visualization.report import Coverage, ReportTrack, ReportVideo, ReportWriter, cover
from vis.visualization.report.collect import dump, video_block
from vis.visualization.report.coverage import ABSENT, UNCOVERED, colour_numbers, segments
from vis.visualization.report.outlines import grid_of, outline
from vis.visualization.report.pictures import plan, spread

H, W, T = 36, 52, 6
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

Box = tuple[int, int, int, int]


def box_mask(box: Box) -> np.ndarray:
    mask = np.zeros((H, W), np.uint8)
    mask[box[0] : box[2], box[1] : box[3]] = 1
    return mask


def code(mask: np.ndarray) -> dict[str, Any]:
    return coco_mask.encode(np.asfortranarray(mask))


def track(number: int, boxes: Sequence[Box | None], name: str = "dog", **more: Any) -> ReportTrack:
    areas = np.array([0 if box is None else int(box_mask(box).sum()) for box in boxes])
    return ReportTrack(number, name, [None if box is None else code(box_mask(box)) for box in boxes], areas, **more)


def shared(tracks: Sequence[ReportTrack], truth: Sequence[ReportTrack]) -> np.ndarray:
    """(P, N, T) common pixels, by decoding."""

    def masks(track: ReportTrack) -> np.ndarray:
        empty = np.zeros((H, W), np.uint8)
        return np.stack([empty if code is None else coco_mask.decode(code) for code in track.codes])

    pairs = [[(masks(a) & masks(b)).sum((1, 2)) for b in truth] for a in tracks]
    return np.array(pairs, np.int64).reshape(len(tracks), len(truth), T)


def compare(truth: Sequence[ReportTrack], tracks: Sequence[ReportTrack]) -> Coverage:
    return cover(truth, tracks, shared(tracks, truth))


LEFT, RIGHT, FAR = (4, 4, 20, 18), (4, 30, 20, 44), (24, 20, 34, 30)


def test_coverage_shows_switch_gap_and_absence() -> None:
    truth = [track(1, [LEFT, LEFT, LEFT, None, LEFT, LEFT])]
    tracks = [track(0, [LEFT, LEFT, None, None, None, None]), track(1, [None, None, FAR, FAR, LEFT, LEFT])]
    found = compare(truth, tracks)
    assert found.covering.tolist() == [[0, 0, UNCOVERED, ABSENT, 1, 1]]
    assert found.switches().tolist() == [1]
    assert found.stray.tolist() == [[False] * 6, [False, False, True, True, False, False]]
    assert segments(found.covering[0], ABSENT) == [(0, 2, 0), (2, 1, UNCOVERED), (4, 2, 1)]


def test_object_keeps_its_track_while_both_overlap() -> None:
    """A second track that fits better does not take an object over, as long as the first one still covers it."""
    shifted = (4, 7, 20, 21)  # IoU 11 / 17 with LEFT
    truth = [track(1, [LEFT] * T)]
    tracks = [track(5, [LEFT] + [shifted] * 5), track(6, [None] + [LEFT] * 5)]
    assert compare(truth, tracks).covering.tolist() == [[0] * T]


def test_quality_is_one_only_for_a_perfect_video() -> None:
    truth = [track(1, [LEFT] * T), track(2, [RIGHT] * T, "cat")]
    right = [track(0, [LEFT] * T), track(1, [RIGHT] * T, "cat")]
    assert compare(truth, right).quality == pytest.approx(1)
    # a false track: 2 / mean(2, 3); a miss: 1 / mean(2, 1); a wrong class finds nothing
    assert compare(truth, [*right, track(2, [FAR] * T)]).quality == pytest.approx(2 / 2.5)
    assert compare(truth, right[:1]).quality == pytest.approx(1 / 1.5)
    wrong = compare(truth, [track(0, [LEFT] * T, "cat")])
    assert wrong.quality == 0
    assert wrong.covering[0].tolist() == [0] * T  # it is covered all the same
    assert wrong.false.tolist() == [True]


def test_empty_videos() -> None:
    nothing = compare([], [])
    assert np.isnan(nothing.quality)
    assert compare([], [track(0, [LEFT] * T)]).quality == 0
    assert compare([track(1, [LEFT] * T)], []).covering.tolist() == [[UNCOVERED] * T]


def test_what_lies_on_a_crowd_is_no_mistake() -> None:
    truth = [track(1, [LEFT] * T), track(0, [RIGHT] * T, crowd=True)]
    found = compare(truth, [track(0, [LEFT] * T), track(1, [(6, 32, 18, 42)] * T)])
    assert found.quality == pytest.approx(1)
    assert found.covering.shape == (1, T)
    assert found.counted.tolist() == [True, False]
    assert not found.false.any()
    assert not found.stray.any()


def test_tracks_wear_the_colour_of_the_object_they_follow() -> None:
    truth = [track(1, [LEFT] * T), track(2, [RIGHT] * T)]
    tracks = [
        track(7, [FAR] * T),
        track(8, [RIGHT] * T),
        track(9, [LEFT] * 2 + [None] * 4),
        track(4, [None] * 2 + [LEFT] * 4),
    ]
    assert colour_numbers(truth, tracks, compare(truth, tracks)) == [3, 2, 4, 1]


def read_outline(text: str) -> list[list[tuple[int, int]]]:
    """The reader of the page, in Python."""
    numbers, value, shift = [], 0, 0
    for letter in text:
        bits = ALPHABET.index(letter)
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            numbers.append(-(value + 1) // 2 if value % 2 else value // 2)
            value = shift = 0
    lines, at = [], 0
    while at < len(numbers):
        count, x, y, line = numbers[at], 0, 0, []
        for point in range(count):
            x, y = x + numbers[at + 1 + 2 * point], y + numbers[at + 2 + 2 * point]
            line.append((x, y))
        lines.append(line)
        at += 1 + 2 * count
    return lines


def test_outline_redraws_the_mask_with_its_hole() -> None:
    from PIL import Image, ImageDraw

    mask = box_mask((3, 8, 33, 45))
    mask[10:20, 20:30] = 0
    grid = grid_of(H, W)
    assert grid == (512, 354)
    canvas = np.zeros((grid[1], grid[0]), bool)
    for line in read_outline(outline(code(mask), grid)):
        picture = Image.new("1", grid)
        ImageDraw.Draw(picture).polygon(line, fill=1)
        canvas ^= np.asarray(picture)
    wanted = np.asarray(Image.fromarray(mask * 255).resize(grid, Image.Resampling.NEAREST)) > 0
    assert (canvas & wanted).sum() / (canvas | wanted).sum() > 0.97


def test_outline_of_a_single_pixel_is_seen() -> None:
    mask = np.zeros((1080, 1920), np.uint8)
    mask[700, 900] = 1
    (line,) = read_outline(outline(code(mask), grid_of(1080, 1920)))
    assert all(abs(x - 240) <= 1 and abs(y - 187) <= 1 for x, y in line)


@pytest.mark.parametrize(("length", "count"), [(1, 5), (7, 3), (40, 12), (5, 5), (9, 1)])
def test_spread_is_even_and_keeps_the_wanted_frame(length: int, count: int) -> None:
    wanted = length - 2 if length > 2 else 0
    frames = spread(length, count, [wanted])
    assert wanted in frames
    assert len(frames) == min(length, count)
    assert frames == sorted(set(frames))
    assert spread(length, 0, [wanted]) == []


def test_plan_gives_smaller_pictures_before_fewer() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (270, 480, 3), np.uint8)
    plans = [plan(range(30), lambda frame: noise, lambda frame: 100, budget) for budget in (10**7, 10**6, 10**5, 0)]
    assert [each.count for each in plans][0] == 30
    assert plans[0].width == 320
    assert [each.width for each in plans] == sorted((each.width for each in plans), reverse=True)
    assert 0 < plans[2].count < 30
    assert plans[3].count == 0
    assert plan(range(30), None, lambda frame: 100, 10**5).count == 30


def video(read: Any = None, number: int = 3, name: str = "clip") -> ReportVideo:
    truth = [track(1, [LEFT] * T), track(2, [RIGHT, RIGHT, None, None, RIGHT, RIGHT], "cat")]
    tracks = [track(4, [LEFT] * 3 + [RIGHT] * 3, score=0.75)]
    return ReportVideo(number, name, H, W, T, truth, [tracks], [compare(truth, tracks)], read)


def test_block_holds_the_worst_frame_and_keeps_the_budget() -> None:
    picture = np.random.default_rng(1).integers(0, 255, (H, W, 3), np.uint8)
    content = json.loads(video_block(video(lambda frame: picture), frames=3, budget=10**6))
    worst = int(np.nanargmin(video().coverage[0].frame_quality))
    assert worst in content["frames"]
    assert len(content["frames"]) == len(content["pictures"]) == len(content["outlines"]) == 3
    assert content["note"] == ""
    tight = video_block(video(lambda frame: picture), frames=T, budget=6000)
    assert len(tight) <= 6000
    assert len(json.loads(tight)["frames"]) >= 1


def test_unreadable_pictures_are_named_and_the_masks_stay() -> None:
    def read(frame: int) -> np.ndarray:
        if frame == 2:
            raise FileNotFoundError("no file clip/2.jpg")
        return np.zeros((H, W, 3), np.uint8)

    content = json.loads(video_block(video(read), frames=T, budget=10**6))
    assert [picture is None for picture in content["pictures"]] == [False, False, True, False, False, False]
    assert "1 of 6" in content["note"]
    assert "clip/2.jpg" in content["note"]
    assert all(part for part in content["outlines"][2])


def test_json_cannot_end_its_script_element() -> None:
    data = dump({"name": "</script><script>alert(1)</script><!-- &amp;"})
    assert not re.search(rb"[<>&]", data)
    assert json.loads(data)["name"].startswith("</script>")


def write(videos: Sequence[ReportVideo], max_bytes: int = 10**6) -> bytes:
    file = io.BytesIO()
    summary = {"title": "a <b> & {{summary}}", "runs": [{"name": "run"}]}
    writer = ReportWriter(file, summary, videos=len(videos), frames_per_video=4, max_bytes=max_bytes)
    for each in videos:
        writer.add(each)
    writer.finish()
    return file.getvalue()


def test_page_is_whole_small_and_the_same_every_time() -> None:
    videos = [video(number=number) for number in (3, 8)]
    page = write(videos).decode()
    assert page.encode() == write(videos)
    assert page.count("<title>a &lt;b&gt; &amp; {{summary}}</title>") == 1
    blocks = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', page, re.S)
    assert [name for name, _ in blocks] == ["video-3", "video-8", "summary"]
    summary = json.loads(blocks[-1][1])
    assert [row["id"] for row in summary["videos"]] == [3, 8]
    assert summary["palette"][5] == "#{:02x}{:02x}{:02x}".format(*track_color(5))
    # nothing is loaded from anywhere
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)
    assert "default-src 'none'" in page


def test_too_many_videos_for_the_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 videos do not fit 0\.1 MB"):
        write([video(), video(number=4)], max_bytes=50_000)


def test_numbers_that_alone_are_too_large_are_said(caplog: pytest.LogCaptureFixture) -> None:
    size = len(write([video()]))
    assert not caplog.records
    plain = video()
    large = replace(plain, truth=[replace(plain.truth[0], name="x" * 20_000), plain.truth[1]])
    assert len(write([large], max_bytes=size + 10_000)) > size + 10_000
    assert "more than the" in caplog.text
