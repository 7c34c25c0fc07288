"""Joint training of partitions and routers through the whole model: DOT-MoE, and the trained routers of all.

settings --> start --> masks on the model --> four-term loss --> steps --> Aligned
"""

from monge.conversion.alignment.config import PAPER, AlignmentConfig
from monge.conversion.alignment.masks import NeuronMask, masked
from monge.conversion.alignment.training import Aligned, align

__all__ = ["PAPER", "Aligned", "AlignmentConfig", "NeuronMask", "align", "masked"]
