"""The annotations of a YouTube-VIS json: one track each, checked frame by frame without decoding a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vis.data.problems import ProblemLog, video_place
from vis.structures.polygons import polygon_problem
from vis.structures.rle import compress, to_box

Record = dict[str, Any]


class TrackReader:
    """Adds the tracks of a json to the records of its videos.

    Args:
        records: video id -> record; each gets a list ``annotations``.
        mapping: category id in the json -> contiguous class. Known categories that are not in it are left out.
        log: takes what is wrong.
        tolerant: polygons that are none are left out with a warning instead of refusing the file (image data).
    """

    def __init__(
        self, records: Mapping[int, Record], mapping: Mapping[int, int], log: ProblemLog, *, tolerant: bool = False
    ) -> None:
        self._records = records
        self._mapping = mapping
        self._log = log
        self._tolerant = tolerant

    def read(self, annotations: Any, categories: set[int]) -> None:
        """Reads the list of annotations; ``categories`` are the ids that the json defines."""
        log = self._log
        if not isinstance(annotations, list):
            log.error("annotations", f"must be a list or null, found {type(annotations).__name__}")
            return
        for record in self._records.values():
            record["annotations"] = []
        seen: set[int] = set()
        for index, entry in enumerate(annotations):
            if not isinstance(entry, dict) or type(entry.get("id")) is not int:
                log.error(f"annotations[{index}]", "expected an object with id, video_id, category_id, segmentations")
                continue
            number = entry["id"]
            if number in seen:
                log.error(f"annotation {number}", "this id is used twice; give every annotation its own id")
            seen.add(number)
            video: Any = entry.get("video_id")
            if not _plain(video) or video not in self._records:
                log.error(f"annotation {number}", f"belongs to video {video!r}, which is not in 'videos'")
                continue
            record = self._records[video]
            if not categories:
                continue  # none could be read, which is reported once
            if not _plain(entry.get("category_id")) or entry["category_id"] not in categories:
                place = self._place(record, number)
                log.error(place, f"is of category {entry.get('category_id')!r}, which is not in 'categories'")
            elif entry["category_id"] in self._mapping:
                record["annotations"].append(self._track(entry, record))

    def _track(self, entry: Mapping[str, Any], record: Record) -> Record:
        place = self._place(record, entry["id"])
        length = record["length"]
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            self._log.error(place, f"iscrowd must be 0 or 1, found {crowd!r}")
        segmentations = self._per_frame(entry, "segmentations", place, length)
        boxes = self._per_frame(entry, "bboxes", place, length) if entry.get("bboxes") is not None else None
        if entry.get("length", length) != length:
            self._log.error(place, f"length is {entry['length']!r}, the video has {length} frames; make them agree")
        size = [record["height"], record["width"]]
        masks: list[Any] = []
        for frame, segmentation in enumerate(segmentations):
            # nearly all of them: a good RLE or nothing, told apart from the rest without a call
            if not segmentation:
                masks.append(None)
                continue
            counts = segmentation.get("counts") if type(segmentation) is dict else None
            if type(counts) is str and segmentation.get("size") == size:
                masks.append({"size": size, "counts": counts})
            else:
                masks.append(self._segmentation(segmentation, size[0], size[1], place, frame))
        if boxes is None:
            checked = [self._box_of(mask, place, frame) for frame, mask in enumerate(masks)]
        else:
            checked = [self._box(box, place, frame) if box else None for frame, box in enumerate(boxes)]
            self._match(masks, checked, place)
        return {
            "id": entry["id"],
            "category_id": self._mapping[entry["category_id"]],
            "iscrowd": int(crowd == 1),
            "segmentations": masks,
            "bboxes": checked,
            "occlusion": self._occlusion(entry.get("occlusion"), place, length),
        }

    def _place(self, record: Record, number: int) -> str:
        return f"{video_place(record)}, annotation {number}"

    def _per_frame(self, entry: Mapping[str, Any], key: str, place: str, length: int) -> list[Any]:
        values = entry.get(key)
        if not isinstance(values, list):
            self._log.error(place, f"{key} must be a list with one entry per frame, found {type(values).__name__}")
        elif len(values) != length:
            self._log.error(
                place, f"{key} has {len(values)} entries, the video has {length} frames; write null where it is absent"
            )
        else:
            return values
        return [None] * length

    def _segmentation(self, value: Any, height: int, width: int, place: str, frame: int) -> Any:
        """An RLE with text counts, a list of polygons, or None where it is none."""
        if isinstance(value, dict):
            return self._rle(value, height, width, place, frame)
        if not isinstance(value, list):
            self._log.error(
                place, f"frame {frame}: a segmentation is an RLE, a list of polygons or null, found {value!r:.60}"
            )
            return None
        kept = []
        for polygon in value:
            problem = polygon_problem(polygon, height, width)
            if problem is None:
                kept.append(polygon)
            elif self._tolerant:
                self._log.warn(place, f"frame {frame}: {problem}; this polygon is left out")
            else:
                self._log.error(place, f"frame {frame}: {problem}")
        return kept or None

    def _rle(self, value: dict[str, Any], height: int, width: int, place: str, frame: int) -> Any:
        size = value.get("size")
        if size != [height, width]:
            self._log.error(
                place,
                f"frame {frame}: the RLE is of size {size!r}, the video is {[height, width]} ([height, width]); "
                "write the mask at the size of the video",
            )
            return None
        try:
            return compress(value)
        except ValueError as error:
            self._log.error(place, f"frame {frame}: {error}")
            return None

    def _box(self, box: Any, place: str, frame: int) -> list[float] | None:
        try:
            x, y, w, h = box
            good = w >= 0 and h >= 0 and abs(x + y + w + h) < float("inf")
        except (TypeError, ValueError):
            good = False
        if not good:
            self._log.error(
                place, f"frame {frame}: a box is [x, y, width, height] in pixels or null, found {box!r:.60}"
            )
            return None
        return box

    def _box_of(self, mask: Any, place: str, frame: int) -> list[float] | None:
        """The box of a mask where the json gives no boxes."""
        if mask is None:
            return None
        if isinstance(mask, list):
            xs = [x for polygon in mask for x in polygon[0::2]]
            ys = [y for polygon in mask for y in polygon[1::2]]
            return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        try:
            return to_box(mask)
        except ValueError as error:
            self._log.error(place, f"frame {frame}: {error}")
            return None

    def _match(self, masks: list[Any], boxes: list[Any], place: str) -> None:
        """An object is in a frame only with both a mask and a box; where one is missing, the other is dropped."""
        for frame, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
            if (mask is None) == (box is None):
                continue
            if mask is not None or any(box):
                lone, absent = ("mask", "box") if box is None else ("box", "mask")
                self._log.warn(place, f"frame {frame}: has a {lone} but no {absent}; it counts as absent in this frame")
            masks[frame] = boxes[frame] = None

    def _occlusion(self, value: Any, place: str, length: int) -> list[Any] | None:
        if value is None:
            return None
        if isinstance(value, list) and len(value) == length:
            return value
        self._log.warn(place, f"occlusion must have one level per frame ({length}); it is left out")
        return None


def _plain(value: Any) -> bool:
    return type(value) is int
