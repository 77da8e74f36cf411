"""Masks, contours, boxes and labels on a frame, with NumPy and Pillow only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vis.visualization.colors import text_color, track_color
from vis.visualization.tracks import FrameTrack, VideoTrack, tracks_at

# Below this width a label of readable size covers the object that it names.
MIN_WIDTH = 320
_MIN_FONT, _MAX_FONT = 10, 36

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, x1 and y1 exclusive


def auto_scale(width: int) -> float:
    """The whole factor that brings a picture of ``width`` pixels to at least 320."""
    return float(max(1, math.ceil(MIN_WIDTH / width)))


def draw_frame(
    image: np.ndarray,
    tracks: Sequence[FrameTrack],
    *,
    scale: float | None = None,
    alpha: float = 0.45,
    boxes: bool = False,
    labels: bool = True,
) -> np.ndarray:
    """Draws tracks on a copy of a frame: a see-through fill, a contour inside the mask, and a label.

    Args:
        image: (H, W, 3) uint8, RGB.
        tracks: the objects; their masks are (H, W) bool.
        scale: size of the result over that of the frame. None: 1, or for frames narrower than 320 pixels the smallest
            whole number that makes the labels fit.
        alpha: weight of the colour inside a mask, 0..1.
        boxes: draw the tight box of each mask too.
        labels: write class, track id and score.

    Returns:
        (H * scale, W * scale, 3) uint8. Fill and contour change pixels of the mask only.

    Raises:
        ValueError: the picture is not (H, W, 3) uint8, or a mask is of another size.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"a frame must be (H, W, 3) uint8, this one is {image.shape} {image.dtype}")
    for track in tracks:
        if track.mask.shape != image.shape[:2]:
            raise ValueError(f"track {track.track_id} has a mask of {track.mask.shape}, the frame is {image.shape[:2]}")
    scale = auto_scale(image.shape[1]) if scale is None else scale
    canvas = resize(image, scale)
    height, width = canvas.shape[:2]
    # Large objects first: a small one in front of a large one stays visible.
    masks = [
        (track, _resize_mask(track.mask, height, width)) for track in sorted(tracks, key=lambda t: -int(t.mask.sum()))
    ]
    drawn = [(track, mask, box) for track, mask in masks if (box := _tight_box(mask)) is not None]
    thickness = max(1, round(min(height, width) / 300))
    for track, mask, box in drawn:
        _fill(canvas, mask, box, track_color(track.track_id), alpha)
    for track, mask, box in drawn:
        _outline(canvas, mask, box, track_color(track.track_id), thickness)
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    if boxes:
        for track, _, (x0, y0, x1, y1) in drawn:
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=track_color(track.track_id), width=thickness)
    if labels:
        taken: list[Box] = []
        objects = [box for _, _, box in drawn]
        # The smallest object chooses its place first: it has the fewest places that are clearly its own.
        for track, _, box in reversed(drawn):
            color = track_color(track.track_id)
            taken.append(_draw_label(pen, track.label, box, color, (width, height), taken, objects))
    return np.asarray(picture).copy()


def draw_video(frames: Iterable[np.ndarray], tracks: Sequence[VideoTrack], *, scale: float | None = None,
               boxes: bool = False) -> Iterator[np.ndarray]:  # fmt: skip
    """Draws the frames of a video as they come, one at a time; masks are decoded for the frame in hand only.

    Args:
        frames: (H, W, 3) uint8 pictures in order, for example a ``FrameStream``.
        tracks: see ``vis.visualization.tracks``; already chosen with ``visible_tracks``.
        scale, boxes: as in ``draw_frame``.
    """
    for index, frame in enumerate(frames):
        yield draw_frame(frame, tracks_at(tracks, index, *frame.shape[:2]), scale=scale, boxes=boxes)


def resize(image: np.ndarray, scale: float) -> np.ndarray:
    """A copy of (H, W, 3) uint8, ``scale`` times as large."""
    if scale == 1:
        return np.array(image, copy=True)
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    way = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((width, height), way)).copy()


@lru_cache(maxsize=32)
def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that pictures look the same on every machine."""
    return ImageFont.load_default(size)


def font_size(width: int, height: int) -> int:
    """Pixels of text that can be read at this picture size and leaves room for the objects."""
    return int(min(max(_MIN_FONT + 1, round(math.sqrt(width * height) / 42)), _MAX_FONT))


def _resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    if mask.shape == (height, width):
        return mask.astype(bool)
    # Nearest neighbour: an enlarged mask shows its true pixels.
    rows = (np.arange(height) * mask.shape[0]) // height
    columns = (np.arange(width) * mask.shape[1]) // width
    return mask[rows[:, None], columns[None, :]].astype(bool)


def _tight_box(mask: np.ndarray) -> Box | None:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _fill(canvas: np.ndarray, mask: np.ndarray, box: Box, color: tuple[int, int, int], alpha: float) -> None:
    x0, y0, x1, y1 = box
    inside, part = mask[y0:y1, x0:x1], canvas[y0:y1, x0:x1]
    part[inside] = (part[inside] * (1.0 - alpha) + np.asarray(color) * alpha + 0.5).astype(np.uint8)


def _outline(canvas: np.ndarray, mask: np.ndarray, box: Box, color: tuple[int, int, int], thickness: int) -> None:
    x0, y0, x1, y1 = box
    core = inside = mask[y0:y1, x0:x1]
    for _ in range(thickness):
        # The edge of the picture counts as edge of the object: False around.
        padded = np.pad(core, 1)
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    canvas[y0:y1, x0:x1][inside & ~core] = color


def _draw_label(pen: ImageDraw.ImageDraw, text: str, box: Box, color: tuple[int, int, int], size: tuple[int, int],
                taken: Sequence[Box], objects: Sequence[Box]) -> Box:  # fmt: skip
    text, points, (text_width, text_height) = _fit_text(text, size)
    x, y = _place(box, (text_width, text_height), size, taken, objects)
    pen.rectangle((x, y, x + text_width - 1, y + text_height - 1), fill=color)
    pen.text((x + text_width / 2, y + text_height / 2), text, fill=text_color(color), font=font_of(points), anchor="mm")
    return x, y, x + text_width, y + text_height


def _fit_text(text: str, size: tuple[int, int]) -> tuple[str, int, tuple[int, int]]:
    """The text, smaller or shortened where the picture is too narrow for it, its font size and its (width, height)."""
    width, height = size
    points = font_size(width, height)

    def extent(line: str) -> tuple[int, int]:
        return math.ceil(font_of(points).getlength(line)) + 4, points + 3

    while points > _MIN_FONT and extent(text)[0] > width:
        points -= 1
    # The class name is shortened from its end, id and score stay.
    name, mark, rest = text.partition(" #")
    while name and extent(text)[0] > width:
        name = name[:-1]
        text = f"{name}.{mark}{rest}" if name else f"{mark}{rest}".strip()
    label_width, label_height = extent(text)
    return text, points, (min(label_width, width), min(label_height, height))


def _place(box: Box, label: tuple[int, int], size: tuple[int, int], taken: Sequence[Box],
           objects: Sequence[Box]) -> tuple[int, int]:  # fmt: skip
    """Top-left corner of a label: near its object, inside the picture, off labels and objects where there is room."""
    x0, y0, x1, y1 = box
    label_width, label_height = label
    limit_x, limit_y = size[0] - label_width, size[1] - label_height
    middle_x, middle_y = (x0 + x1 - label_width) // 2, (y0 + y1 - label_height) // 2
    places = [(x0, y0 - label_height), (x1 - label_width, y0 - label_height), (x0, y1), (x1 - label_width, y1)]
    places += [(x1, middle_y), (x0 - label_width, middle_y), (middle_x, middle_y)]
    if y0 < label_height:
        places.insert(0, (x0, y0))
    places += [(x0, y0 + step * label_height) for step in range(-3, 4)]
    inside = [(min(max(x, 0), limit_x), min(max(y, 0), limit_y)) for x, y in places]

    def cost(place: tuple[int, int]) -> int:
        # Two labels on each other cannot be read, an object under a label can still be recognised.
        return 8 * _covered(place, label, taken) + _covered(place, label, objects)

    return min(inside, key=cost)  # the first of those that cost least


def _covered(place: tuple[int, int], label: tuple[int, int], boxes: Sequence[Box]) -> int:
    (x, y), (width, height) = place, label
    return sum(
        max(0, min(x + width, x1) - max(x, x0)) * max(0, min(y + height, y1) - max(y, y0)) for x0, y0, x1, y1 in boxes
    )
