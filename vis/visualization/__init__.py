"""Draws tracks on frames; reads and writes picture folders, video files and results."""

from __future__ import annotations

from vis.visualization.colors import track_color
from vis.visualization.draw import draw_frame, draw_video
from vis.visualization.frames import FrameError, FrameStream, natural_key, read_image
from vis.visualization.render import Progress, render_video
from vis.visualization.results import read_results, write_results
from vis.visualization.sheet import contact_sheet, side_by_side
from vis.visualization.tracks import (
    FrameTrack,
    VideoTrack,
    tracks_at,
    tracks_of_prediction,
    tracks_of_record,
    tracks_of_results,
    visible_tracks,
)
from vis.visualization.video_io import VideoWriter, probe_video, read_video

__all__ = [
    "FrameError",
    "FrameStream",
    "FrameTrack",
    "Progress",
    "VideoTrack",
    "VideoWriter",
    "contact_sheet",
    "draw_frame",
    "draw_video",
    "natural_key",
    "probe_video",
    "read_image",
    "read_results",
    "read_video",
    "render_video",
    "side_by_side",
    "track_color",
    "tracks_at",
    "tracks_of_prediction",
    "tracks_of_record",
    "tracks_of_results",
    "visible_tracks",
    "write_results",
]
