"""A large json, item after item: memory follows the largest item, not the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TextIO

CHUNK = 2**20


class Event(NamedTuple):
    """A piece of the object at the top of a json.

    Attributes:
        key: at the top.
        kind: "value" (a whole value that is no list), "list" (a list begins), "item" (one of its items).
        value: None for "list".
    """

    key: str
    kind: Literal["value", "list", "item"]
    value: Any


def stream_json(path: str | os.PathLike[str]) -> Iterator[Event]:
    """The object at the top of a json, in the order of the file; lists under its keys are given item by item.

    Raises:
        ValueError: the file is not text, not json, holds something else than an object at its top, or a key twice.
        OSError: it cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        reader = _Reader(file)
        try:
            yield from _top(reader)
        except UnicodeDecodeError as error:
            raise ValueError("is not text; expected a json") from error
        except RecursionError as error:
            raise ValueError("is nested too deeply for a data set") from error


def _top(reader: _Reader) -> Iterator[Event]:
    if reader.peek() != "{":
        raise reader.error("expected an object at its top")
    reader.take("{")
    seen: set[str] = set()
    while reader.peek() != "}":
        if seen:
            reader.take(",")
        key = reader.value()
        if not isinstance(key, str) or key in seen:
            raise reader.error(f"the key {key!r} stands twice or is no text")
        seen.add(key)
        reader.take(":")
        if reader.peek() != "[":
            yield Event(key, "value", reader.value())
            continue
        yield Event(key, "list", None)
        for item in _items(reader):
            yield Event(key, "item", item)
    reader.take("}")
    if reader.peek():
        raise reader.error("something follows the end")


def _items(reader: _Reader) -> Iterator[Any]:
    reader.take("[")
    first = True
    while reader.peek() != "]":
        if not first:
            reader.take(",")
        first = False
        yield reader.value()
    reader.take("]")


class _Reader:
    """Text of a file in pieces; what was read is let go."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text, self._at, self._before = "", 0, 0
        self._ended = False
        self._decoder = json.JSONDecoder(parse_constant=_no_constant)

    def peek(self) -> str:
        """The next character that is no blank, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(CHUNK):
                return ""

    def take(self, wanted: str) -> None:
        """Go past a character that has to come next."""
        if self.peek() != wanted:
            raise self.error(f"expected {wanted!r}, found {self.peek() or 'the end'!r}")
        self._at += 1

    def value(self) -> Any:
        """The next value."""
        self.peek()
        size = CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._more(size):
                    raise self.error(error.msg) from error
            else:
                length = end - self._at
                if end < len(self._text) or not self._more(size):  # a number may go on in the next piece
                    self._at += length
                    return value
            size *= 2

    def error(self, message: str) -> ValueError:
        """What is wrong, and where."""
        place = self._before + self._at
        return ValueError(f"is not valid json ({message}, character {place}); was the download or the copy cut off?")

    def _more(self, size: int) -> bool:
        if self._ended:
            return False
        piece = self._file.read(size)
        self._ended = not piece
        self._before += self._at
        self._text, self._at = self._text[self._at :] + piece, 0
        return not self._ended


def _no_constant(name: str) -> Any:
    raise ValueError(f"holds {name}, which is no number in json")
