"""Meta-architectures: one method, one file."""

from __future__ import annotations

from vis.modeling.meta_arch.dvis import DVISOffline, DVISOnline
from vis.modeling.meta_arch.minvis import MinVIS

__all__ = ["DVISOffline", "DVISOnline", "MinVIS"]
