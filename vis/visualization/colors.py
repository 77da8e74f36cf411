"""One colour per track id."""

from __future__ import annotations

# A fixed table, so that a colour depends on the id alone: not on the run, the frame, the platform or the other tracks.
# It was made by farthest-point selection in CIELAB among vivid colours of medium lightness (38 < L < 92), where the
# distance to the last six chosen ones counted about double: any two of the 40 are at least 22 apart, any two ids that
# differ by at most 4 at least 44.
_PALETTE = (
    0xF22424, 0x19FF19, 0x7019FF, 0x73DCFF, 0xFFDC73, 0x993D82, 0x00BF78, 0xBF4800, 0xA9FF19, 0x1953FF,
    0x19A9FF, 0xFFD2A6, 0xFF19A9, 0x19FFE2, 0x993D49, 0x30BF00, 0xFFE219, 0x7384FF, 0x3D8299, 0xFF19FF,
    0x998E3D, 0xFF4D79, 0x19FF8C, 0xFF8C19, 0xE9A6FF, 0x00BFBF, 0xA700BF, 0xA7BF00, 0xBF0030, 0x3D6099,
    0xFFA773, 0xFF73B9, 0x3D9977, 0xA64DFF, 0x96FF73, 0xBFA700, 0xA6B1FF, 0x99603D, 0xBF0060, 0xFFA6BC,
)  # fmt: skip


def track_color(track_id: int) -> tuple[int, int, int]:
    """The (red, green, blue) colour of a track, 0..255: the same in every frame and every run.

    Ids that are near each other get colours that are far apart; the table repeats after 40 ids.
    """
    value = _PALETTE[int(track_id) % len(_PALETTE)]
    return value >> 16, value >> 8 & 0xFF, value & 0xFF


def text_color(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is easier to read on ``background`` (relative luminance of sRGB, ITU-R BT.709)."""
    red, green, blue = ((channel / 255.0) ** 2.2 for channel in background)
    # 0.179 is where the contrast ratios (WCAG 2) with black and with white are equal.
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else (255, 255, 255)
