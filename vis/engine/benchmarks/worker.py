"""Runs one measuring function in a process of its own: ``python -m vis.engine.benchmarks.worker module:function``.

Settings come as json on standard input; the result goes as one line of json to standard output.
"""

from __future__ import annotations

import importlib
import json
import sys


def main() -> None:
    """Read settings, measure, print."""
    import torch

    from vis.engine.benchmarks.common import settings_of

    module, name = sys.argv[1].split(":")
    settings = settings_of(json.load(sys.stdin))
    torch.set_num_threads(settings.threads)
    result = getattr(importlib.import_module(f"vis.engine.benchmarks.{module}"), name)(settings)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
