"""Comparison of many recorded arrays, each of which must be asked for: what was not is a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from vis.engine.parity.common import Array, Check, chosen
from vis.engine.parity.outputs import array_names, relative_error


class Comparison:
    """Checks of one file; arrays that ``only`` does not name are neither compared nor missed."""

    def __init__(self, recorded: Mapping[str, Array], only: Sequence[str] = ()) -> None:
        self.recorded, self.only = recorded, only
        self._checks: dict[str, Check] = {}

    def wanted(self, prefix: str) -> bool:
        """Whether an array that begins with ``prefix`` may be asked for."""
        return not self.only or any(each.startswith(prefix) or prefix.startswith(each) for each in self.only)

    def close(self, name: str, found: Tensor, bar: float, *, order: Array | None = None) -> None:
        """Differences up to ``bar`` of the largest recorded value."""
        sides = self._sides(name, found, order)
        if sides is not None:
            error = relative_error(*(side.reshape(-1) for side in sides))
            self._put(name, error <= bar, f"largest relative error {error:.2e}, allowed {bar:.0e}   {self._size(name)}")

    def equal(
        self,
        name: str,
        found: Tensor,
        *,
        order: Array | None = None,
        alike: Callable[[Array], Array] = lambda values: values,
    ) -> None:
        """No difference; ``alike`` makes values the same that mean the same."""
        sides = self._sides(name, found, order)
        if sides is not None:
            different = int((alike(sides[0]) != alike(sides[1])).sum())
            self._put(name, different == 0, f"{different} of {sides[1].size} differ" if different else "equal")

    def pixels(self, name: str, found: Tensor, allowed: int, *, order: Array | None = None) -> None:
        """Numbers of pixels that differ by up to ``allowed``; -1 stands for no mask."""
        sides = self._sides(name, found, order)
        if sides is not None:
            ours, theirs = (side.astype(np.int64) for side in sides)
            worst = int(np.abs(ours - theirs).max(initial=0))
            none = int(((ours < 0) != (theirs < 0)).sum())
            detail = f"differ by at most {worst} pixels, allowed {allowed}" + (f"; {none} are no mask" if none else "")
            self._put(name, worst <= allowed and not none, detail)

    def differing(self, name: str, found: Tensor, allowed: int) -> None:
        """Maps (T, H, W) of which ``allowed`` pixels of a frame may differ."""
        sides = self._sides(name, found, None)
        if sides is not None:
            worst = int((sides[0] != sides[1]).reshape(len(sides[0]), -1).sum(axis=1).max(initial=0))
            self._put(name, worst <= allowed, f"at most {worst} pixels of a frame differ, allowed {allowed}")

    def note(self, name: str, ok: bool, detail: str) -> None:
        """A check of another kind."""
        if chosen(name, self.only):
            self._put(name, ok, detail)

    def skip(self, which: Callable[[str], bool], why: str) -> None:
        """Arrays that are not compared, and are said not to be."""
        for name in array_names(self.recorded):
            if which(name) and name not in self._checks and chosen(name, self.only):
                self._put(name, True, f"not compared: {why}")

    def finished(self) -> list[Check]:
        """All checks in the order of the file; what nobody asked for has failed."""
        names = [name for name in array_names(self.recorded) if chosen(name, self.only)]
        for name in names:
            if name not in self._checks:
                self._put(name, False, "the model offers nothing to compare it with")
        order = {name: i for i, name in enumerate(names)}
        return sorted(self._checks.values(), key=lambda check: order.get(check.name, len(order)))

    def _put(self, name: str, ok: bool, detail: str) -> None:
        self._checks[name] = Check(name, ok, detail)

    def _size(self, name: str) -> str:
        shape = tuple(int(size) for size in self.recorded.get(f"{name}.shape", self.recorded[name].shape))
        stride = int(self.recorded.get(f"{name}.stride", 1))
        return f"{shape}" + (f", every {stride}. element" if stride > 1 else "")

    def _sides(self, name: str, found: Tensor, order: Array | None) -> tuple[Array, Array] | None:
        """The found and the recorded elements; None where that is not wanted or has failed already."""
        if not chosen(name, self.only):
            return None
        if name not in self.recorded:
            self._put(name, False, "is not recorded")
            return None
        expected, ours = self.recorded[name], found.detach().cpu().numpy()
        stride = int(self.recorded.get(f"{name}.stride", 1))
        shape = tuple(int(size) for size in self.recorded.get(f"{name}.shape", expected.shape))
        if ours.shape != shape:
            self._put(name, False, f"shape {ours.shape} instead of {shape}")
            return None
        if stride > 1:
            ours = ours.reshape(-1)[::stride]
        return ours, expected if order is None else expected[order]
