"""Several pictures in one: contact sheets and side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from vis.visualization.draw import font_of

_BACKGROUND, _TEXT = (32, 32, 32), (235, 235, 235)
_CAPTION = 18


def contact_sheet(
    frames: Sequence[np.ndarray], columns: int, *, captions: Sequence[str] | None = None, gap: int = 4
) -> np.ndarray:
    """Puts pictures into a grid, row by row.

    Args:
        frames: (H, W, 3) uint8 each; sizes may differ, a cell is as large as the largest.
        columns: pictures per row; fewer if there are fewer pictures.
        captions: a line above each picture.
        gap: pixels around each cell.

    Returns:
        (height, width, 3) uint8.

    Raises:
        ValueError: no pictures, no columns, or not one caption per picture.
    """
    if not frames or columns < 1:
        raise ValueError(f"a contact sheet needs pictures and columns, got {len(frames)} pictures in {columns} columns")
    if captions is not None and len(captions) != len(frames):
        raise ValueError(f"{len(captions)} captions for {len(frames)} pictures")
    columns = min(columns, len(frames))
    band = _CAPTION if captions is not None else 0
    cell_height = max(frame.shape[0] for frame in frames) + band + gap
    cell_width = max(frame.shape[1] for frame in frames) + gap
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for place, frame in enumerate(frames):
        x, y = gap + place % columns * cell_width, gap + place // columns * cell_height
        if captions is not None:
            pen.text((x + 2, y + band / 2), captions[place], fill=_TEXT, font=font_of(12), anchor="lm")
        sheet.paste(Image.fromarray(frame), (x, y + band))
    return np.asarray(sheet).copy()


def side_by_side(
    left: np.ndarray, right: np.ndarray, captions: tuple[str, str] = ("ground truth", "prediction")
) -> np.ndarray:
    """Two pictures (H, W, 3) uint8 next to each other, each under its caption."""
    return contact_sheet([left, right], 2, captions=captions)


def spread(length: int, count: int) -> list[int]:
    """Up to ``count`` frame numbers spread evenly over a video of ``length`` frames, with the first and the last."""
    count = min(length, count)
    if count <= 1:
        return list(range(count))
    return [round(step * (length - 1) / (count - 1)) for step in range(count)]
