"""``python -m vis.doctor``: what is wrong with a set-up, in plain words. See :mod:`vis.engine.doctor`."""

from __future__ import annotations

from vis.engine.doctor.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
