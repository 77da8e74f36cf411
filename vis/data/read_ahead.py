"""Work that is done in background threads before its result is asked for, in order and with a bound on what waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["ReadAhead"]

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Results of ``calls`` in order, each computed by a thread before it is taken.

    Threads do: decoding and resizing pictures releases Python's lock. The iterator of calls itself is advanced in the
    thread that takes the results, so it needs no lock and is only ``depth`` calls ahead.

    Args:
        calls: what to do; endless is fine.
        depth: calls that are under way or whose result waits, at most; at least 1.
        threads: how many work.
    """

    def __init__(self, calls: Iterator[Callable[[], T]], *, depth: int, threads: int = 1) -> None:
        if depth < 1 or threads < 1:
            raise ValueError(f"depth ({depth}) and threads ({threads}) must be at least 1")
        self._calls = calls
        self._depth = depth
        self._pool = ThreadPoolExecutor(min(threads, depth), thread_name_prefix="vis-read-ahead")
        self._waiting: deque[Future[T]] = deque()

    def __enter__(self) -> ReadAhead[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._waiting.clear()

    def fill(self) -> None:
        """Start calls until as many as allowed are under way."""
        while len(self._waiting) < self._depth:
            call = next(self._calls, None)
            if call is None:
                return
            self._waiting.append(self._pool.submit(call))

    def take(self) -> T:
        """The next result; the error of its call is raised here.

        Raises:
            IndexError: all results were taken.
        """
        return self._next().result()

    def skip(self) -> None:
        """Pass over the next result, and over its error."""
        self._next().cancel()

    def _next(self) -> Future[T]:
        self.fill()
        future = self._waiting.popleft()
        self.fill()
        return future
