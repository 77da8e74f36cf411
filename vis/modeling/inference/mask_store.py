"""Low-resolution maps of a video, frame by frame, outside of working memory once they are many.

Which tracks are reported is known only after the last frame. Until then every query's mask logits are kept or, where
masks are made after the last frame, the features they are made from. Maps are a quarter of the input's size in float32
(logits: 1.5 MB a frame for 100 queries at 192x320); after a few dozen frames they go to a temporary file, from which
rows are read back one frame at a time.
"""

from __future__ import annotations

import errno
import tempfile
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

# Bytes kept in memory before the store moves to a file.
IN_MEMORY = 32 << 20


class MaskStore:
    """Appends (Q, h, w) float32 maps per frame and reads rows of a frame back; the file vanishes with the store.

    The file lies in the system's temporary folder (``TMPDIR``).
    """

    def __init__(self, *, in_memory: int = IN_MEMORY, what: str = "mask logits") -> None:
        """Args: bytes kept in memory before the file; ``what`` is stored, for messages."""
        self._what = what
        self._file = tempfile.SpooledTemporaryFile(max_size=in_memory, prefix="vis_masks_")  # noqa: SIM115 (own close)
        self._shape: tuple[int, int, int] | None = None
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __enter__(self) -> MaskStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, logits: Tensor) -> None:
        """Add the next frame, (Q, h, w) on any device.

        Raises:
            ValueError: the size differs from the frames before.
            OSError: the temporary folder is full.
        """
        shape = (int(logits.shape[0]), int(logits.shape[1]), int(logits.shape[2]))
        if self._shape not in (None, shape):
            raise ValueError(f"{self._what} of frame {self._length} are {shape}, those before {self._shape}")
        self._shape = shape
        data = logits.detach().to("cpu", torch.float32).contiguous().numpy()
        try:
            self._file.seek(self._length * data.nbytes)
            self._file.write(data.tobytes())
            self._file.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            needed = (self._length + 1) * data.nbytes / 2**20
            raise OSError(
                errno.ENOSPC,
                f"no space for the {self._what} of frame {self._length} ({needed:.0f} MB so far) in "
                f"{tempfile.gettempdir()}; free some, or set TMPDIR to a folder on a larger disk",
            ) from error
        self._length += 1

    def read(self, frame: int, queries: list[int] | None = None) -> Tensor:
        """Maps (len(queries), h, w) of one frame; None: all of them, (Q, h, w).

        Raises:
            IndexError: no such frame.
        """
        if self._shape is None or not 0 <= frame < self._length:
            raise IndexError(f"frame {frame} of a store of {self._length}")
        num, height, width = self._shape
        if queries is None:
            whole = np.empty(self._shape, dtype=np.float32)
            self._file.seek(frame * whole.nbytes)
            whole[:] = np.frombuffer(self._file.read(whole.nbytes), dtype=np.float32).reshape(self._shape)
            return torch.from_numpy(whole)
        out = np.empty((len(queries), height, width), dtype=np.float32)
        for row, query in zip(out, queries, strict=True):
            self._file.seek((frame * num + query) * row.nbytes)
            row[:] = np.frombuffer(self._file.read(row.nbytes), dtype=np.float32).reshape(height, width)
        return torch.from_numpy(out)

    def close(self) -> None:
        """Delete what is stored."""
        self._file.close()
