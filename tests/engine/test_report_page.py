"""The report as a file and, where there is a Chromium, as a page in it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vis.engine.report import ReportOptions, write_report
from vis.structures.rle import encode

H, W, T = 54, 90, 9
EVIL = "<script>alert(1)</script>"
EVIL_FILE = "</script><img src=x onerror=alert(2)>"

Boxes = list[tuple[int, int] | None]


def masks(places: Boxes) -> list[Any]:
    """(row, column) of an object of 16 x 20 pixels per frame -> codes."""
    found: list[Any] = []
    for place in places:
        mask = np.zeros((H, W), bool)
        if place is not None:
            mask[place[0] : place[0] + 16, place[1] : place[1] + 20] = True
        found.append(None if place is None else encode(mask))
    return found


def moving(row: int, column: int, step: int = 2) -> Boxes:
    return [(row, column + step * frame) for frame in range(T)]


def result(video: int, category: int, score: float, places: Boxes, **more: Any) -> dict[str, Any]:
    return {
        "video_id": video, "category_id": category, "score": score, "segmentations": masks(places), **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos: 1 is found exactly, 2 has a switch, a miss and a false track, 3 is empty. One category is evil."""
    root = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    videos = []
    for number in (1, 2, 3):
        names = [f"clip{number}/{frame:05d}.jpg" for frame in range(T)]
        (root / "images" / f"clip{number}").mkdir(parents=True)
        for name in names:
            Image.fromarray(rng.integers(0, 255, (H, W, 3), np.uint8)).save(root / "images" / name)
        videos.append({"id": number, "height": H, "width": W, "length": T, "file_names": names})
    objects = [
        (1, 1, moving(4, 5)),
        (1, 2, moving(30, 50)),
        (2, 1, moving(4, 5)),
        (2, 1, moving(30, 50)),
        (2, 3, moving(4, 60, 0)),
    ]
    annotations = [
        {"id": number, "video_id": video, "category_id": category, "iscrowd": 0, "segmentations": masks(places)}
        for number, (video, category, places) in enumerate(objects, start=1)
    ]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": EVIL}, {"id": 3, "name": "cat"}]
    truth = {"videos": videos, "categories": categories, "annotations": annotations}
    (root / "gt.json").write_text(json.dumps(truth))
    switched = moving(4, 5)[:4] + moving(30, 50)[4:]
    other = moving(30, 50)[:4] + moving(4, 5)[4:]
    good = [result(1, 1, 0.9, moving(4, 5)), result(1, 2, 0.8, moving(30, 50))]
    # a second class of the first track, and one that is not shown
    good += [result(1, 3, 0.5, moving(4, 5)), result(1, 3, 0.1, moving(20, 20))]
    bad = [
        result(2, 1, 0.7, switched, track_id=11),
        result(2, 1, 0.6, other, track_id=12),
        result(2, 3, 0.4, moving(36, 2, 0)),
    ]
    (root / "a.json").write_text(json.dumps(good + bad))
    (root / "b.json").write_text(json.dumps(good[:1] + [result(2, 1, 0.9, moving(4, 5))]))
    return root


def options(folder: Path, **more: Any) -> ReportOptions:
    return replace(ReportOptions(image_root=folder / "images", date="2024-05-06"), **more)


def blocks(path: Path) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', path.read_text(), re.S)
    return {name: json.loads(text) for name, text in found}


def test_numbers_videos_and_tracks(folder: Path, tmp_path: Path) -> None:
    path = write_report(folder / "gt.json", [folder / "a.json"], tmp_path / "r.html", options(folder))
    content = blocks(path)
    summary = content["summary"]
    # worst first; what has nothing to see comes last
    assert [row["id"] for row in summary["videos"]] == [2, 1, 3]
    rows = {row["id"]: row["runs"][0] for row in summary["videos"]}
    assert rows[1] == {"quality": 1.0, "missed": 0, "false": 0, "switches": 0}
    assert rows[2]["missed"] == 3  # no track follows an object for more than 5 of 9 frames: IoU 5 / 13 at best
    assert rows[2]["switches"] == 2
    assert rows[3]["quality"] is None
    numbers = {row["name"]: row["values"][0] for group in summary["groups"] for row in group["rows"]}
    assert numbers["IDSW"] == 2
    assert numbers["found"] + numbers["missed"] == 5
    assert {"AP", "AR100", "HOTA", "IDF1"} <= set(numbers)
    assert {row["name"] for row in summary["errors"]} >= {"identity switch", "background", "missed"}
    assert [(row["name"], row["objects"]) for row in summary["classes"]] == [("dog", 3), (EVIL, 1), ("cat", 1)]
    tracks = content["video-1"]["runs"][0]["tracks"]
    assert [(track["number"], track["name"], track["score"]) for track in tracks] == [(0, "dog", 0.9), (1, EVIL, 0.8)]
    assert [track["number"] for track in content["video-2"]["runs"][0]["tracks"][:2]] == [11, 12]


def test_equal_inputs_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    results = [folder / "a.json", folder / "b.json"]
    first, second = (
        write_report(folder / "gt.json", results, tmp_path / name, replace(options(folder), date=None)).read_bytes()
        for name in ("first.html", "second.html")
    )
    assert first == second
    os.utime(folder / "b.json", (2_000_000_000, 2_000_000_000))
    write_report(folder / "gt.json", results, tmp_path / "first.html", replace(options(folder), date=None))
    assert "2033-05-18" in (tmp_path / "first.html").read_text()


def test_worst_videos_only(folder: Path, tmp_path: Path) -> None:
    path = write_report(
        folder / "gt.json", [folder / "a.json"], tmp_path / "r.html", options(folder, videos=1, frames_per_video=4)
    )
    content = blocks(path)
    assert set(content) == {"video-2", "summary"}
    assert len(content["video-2"]["frames"]) == 4
    assert "1 worst of 3" in " ".join(content["summary"]["notes"])


def test_nothing_over_the_threshold_is_said(folder: Path, tmp_path: Path) -> None:
    path = write_report(
        folder / "gt.json", [folder / "a.json"], tmp_path / "r.html", options(folder, score_threshold=0.95)
    )
    notes = " ".join(blocks(path)["summary"]["notes"])
    assert "the best has 0.900" in notes
    assert "no prediction for 1 of 3 videos" in notes


def test_names_from_a_json_stay_below_the_image_root(folder: Path, tmp_path: Path) -> None:
    truth = json.loads((folder / "gt.json").read_text())
    secret = tmp_path / "secret.png"
    Image.new("RGB", (W, H)).save(secret)
    truth["videos"][1]["file_names"][:2] = ["../../secret.png", str(secret)]
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    path = write_report(tmp_path / "gt.json", [folder / "a.json"], tmp_path / "r.html", options(folder))
    content = blocks(path)["video-2"]
    assert [picture is None for picture in content["pictures"]] == [True, True] + [False] * (T - 2)
    assert "image root" in content["note"]


@pytest.mark.slow
def test_a_hundred_videos_stay_under_the_limit(tmp_path: Path) -> None:
    """100 videos of 36 frames; the pictures are noise upon a gradient, harder than most frames."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 640).astype(np.uint8)[None, :, None]
    for number in range(8):
        picture = ramp + rng.integers(0, 55, (360, 640, 3)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{number}.jpg", quality=90)
    rows, columns = np.mgrid[:360, :640]
    discs = [encode((rows - 180) ** 2 + (columns - 60 - 15 * frame) ** 2 < 60**2) for frame in range(36)]
    names = [f"{frame % 8}.jpg" for frame in range(36)]
    truth = {
        "videos": [{"id": n, "height": 360, "width": 640, "length": 36, "file_names": names} for n in range(100)],
        "categories": [{"id": 1, "name": "disc"}],
        "annotations": [
            {"id": 2 * n + k, "video_id": n, "category_id": 1, "segmentations": discs[k:] + discs[:k]}
            for n in range(100) for k in range(2)
        ],
    }  # fmt: skip
    results = [
        {"video_id": n, "category_id": 1, "score": 0.5, "segmentations": discs[k:] + discs[:k]}
        for n in range(100) for k in range(2)
    ]  # fmt: skip
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "a.json").write_text(json.dumps(results))
    path = write_report(tmp_path / "gt.json", [tmp_path / "a.json"], tmp_path / "r.html", ReportOptions(tmp_path))
    assert 10e6 < path.stat().st_size <= 20e6
    shown = [len(block["frames"]) for name, block in blocks(path).items() if name != "summary"]
    assert len(shown) == 100
    assert min(shown) >= 10


# In a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is on the PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a file; afterwards nothing may have been said on the console or asked of a network."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True)
    page = context.new_page()
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on(
        "request", lambda request: trouble.append(request.url) if request.url[:5] not in ("file:", "data:") else None
    )

    def open_file(path: Path) -> Any:
        page.goto(path.as_uri())
        page.wait_for_selector(".timeline svg")
        return page

    yield open_file
    context.close()
    assert not trouble


def pixels(page: Any, part: int) -> str:
    return str(page.evaluate("part => document.querySelectorAll('.panel canvas')[part].toDataURL()", part))


def test_page_of_one_run(folder: Path, tmp_path: Path, opened: Any) -> None:
    page = opened(write_report(folder / "gt.json", [folder / "a.json"], tmp_path / "r.html", options(folder)))
    widths = page.locator(".strip img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert widths == [W] * T
    assert page.locator(".panel:visible").count() == 2
    # the list: worst first, the first one open
    assert page.locator("#video-list .name span:first-child").all_inner_texts() == ["clip2", "clip1", "clip3"]
    assert page.locator("#viewer h2").inner_text() == "clip2"
    # the timeline: both tracks in both rows, a mark for each switch, the third object in red, the false track
    colours = page.locator(".timeline rect[data-track]").evaluate_all("rects => rects.map(r => r.dataset.track)")
    assert colours == ["11", "12", "12", "11"]
    assert page.locator(".timeline > svg > path.switch").count() == 2
    assert page.locator(".timeline > svg rect.gap").count() == 1
    assert page.locator("rect[data-false]").count() == 1

    # the player
    before = pixels(page, 1)
    page.keyboard.press("ArrowRight")
    assert page.locator("output").inner_text() == f"frame 2 of {T}"
    assert pixels(page, 1) != before
    page.keyboard.press("End")
    assert page.locator("output").inner_text() == f"frame {T} of {T}"
    page.locator(".player .main").click()
    page.locator("output", has_text="frame 2 of").wait_for()
    page.locator(".player .main").click()
    page.locator(".player input").fill("4")
    assert page.locator("output").inner_text() == f"frame 5 of {T}"
    box = page.locator(".timeline > svg").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 14, box["y"] + 40)
    assert page.locator("output").inner_text() == f"frame {T} of {T}"

    # what is drawn can be switched
    for name in ("Picture", "Fill", "Labels", "Truth as dashed line"):
        before = pixels(page, 1)
        page.get_by_role("checkbox", name=name).click()
        assert pixels(page, 1) != before, name
    page.get_by_role("checkbox", name="Ground truth").click()
    assert page.locator(".panel:visible").count() == 1
    before = pixels(page, 1)
    page.locator(".tables tbody tr").first.click()
    assert pixels(page, 1) != before

    # keys and the list lead to other videos; one without objects is no problem
    page.keyboard.press("j")
    assert page.locator("#viewer h2").inner_text() == "clip1"
    page.locator("#video-list button").nth(2).click()
    assert page.locator("#viewer h2").inner_text() == "clip3"
    page.locator("#search").fill("clip2")
    assert page.locator("#video-list li").count() == 1


def test_tables_sort(folder: Path, tmp_path: Path, opened: Any) -> None:
    page = opened(
        write_report(folder / "gt.json", [folder / "a.json", folder / "b.json"], tmp_path / "r.html", options(folder))
    )

    def names() -> list[str]:
        return page.locator("#classes tbody td:first-child").all_inner_texts()

    head = page.locator("#classes th button")
    head.nth(0).click()
    assert names() == [EVIL, "cat", "dog"]
    head.nth(0).click()
    assert names() == ["dog", "cat", EVIL]
    head.nth(1).click()
    assert names()[0] == "dog"
    assert page.locator("#classes th[aria-sort='descending']").count() == 1


def test_two_runs_share_pictures_and_colours(folder: Path, tmp_path: Path, opened: Any) -> None:
    wanted = options(folder, names=("first", EVIL_FILE))
    path = write_report(folder / "gt.json", [folder / "a.json", folder / "b.json"], tmp_path / "r.html", wanted)
    page = opened(path)
    assert page.locator(".panel:visible").count() == 3
    assert page.locator(".strip img").count() == T  # one picture a frame, for all three panels
    assert page.locator("figcaption").all_inner_texts()[2].endswith(EVIL_FILE)
    page.locator("#order").select_option("B worse than A")
    assert page.locator("#video-list .name span:first-child").first.inner_text() in ("clip1", "clip2")
    # nothing of the json became an element
    assert page.locator("#classes td", has_text=EVIL).count() == 1
    assert page.evaluate("document.scripts.length") == 2 + 3  # summary, code, three videos
    assert page.locator("img[src='x']").count() == 0


def test_without_an_image_root(folder: Path, tmp_path: Path, opened: Any) -> None:
    page = opened(write_report(folder / "gt.json", [folder / "a.json"], tmp_path / "r.html"))
    assert "No image root" in page.locator("#notes").inner_text()
    assert page.locator(".strip img").count() == 0
    blank = pixels(page, 0)
    page.get_by_role("checkbox", name="Fill").click()
    assert pixels(page, 0) != blank  # masks are drawn all the same


def test_frames_that_do_not_fit_are_left_out(folder: Path, tmp_path: Path, opened: Any) -> None:
    """Numbers and timeline are there for all of them, and no key does harm."""
    path = write_report(folder / "gt.json", [folder / "a.json"], tmp_path / "r.html", options(folder, max_mb=0.077))
    assert path.stat().st_size <= 77_000
    shown = {name: block["frames"] for name, block in blocks(path).items() if name != "summary"}
    assert len(shown["video-2"]) == 1
    page = opened(path)
    for key in ("ArrowRight", "End", "Space", "Space", "j"):
        page.keyboard.press(key)
    assert page.locator("#viewer h2").inner_text() == "clip1"
