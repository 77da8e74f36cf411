"""Meta-architectures: one method, one file."""

from __future__ import annotations

from vis.modeling.meta_arch.ctvis import CTVIS
from vis.modeling.meta_arch.dvis import DVISOffline, DVISOnline
from vis.modeling.meta_arch.iai import IAI
from vis.modeling.meta_arch.idol import IDOL
from vis.modeling.meta_arch.image_detector import ImageDetector
from vis.modeling.meta_arch.masktrack_rcnn import MaskTrackRCNN
from vis.modeling.meta_arch.minvis import MinVIS
from vis.modeling.meta_arch.vita import VITA

__all__ = ["CTVIS", "IAI", "IDOL", "ImageDetector", "DVISOffline", "DVISOnline", "MaskTrackRCNN", "MinVIS", "VITA"]
