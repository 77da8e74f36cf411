"""Meta-architectures: one method, one file."""

from __future__ import annotations

from vis.modeling.meta_arch.ctvis import CTVIS
from vis.modeling.meta_arch.dvis import DVISOffline, DVISOnline
from vis.modeling.meta_arch.idol import IDOL
from vis.modeling.meta_arch.minvis import MinVIS
from vis.modeling.meta_arch.vita import VITA

__all__ = ["CTVIS", "IDOL", "DVISOffline", "DVISOnline", "MinVIS", "VITA"]
