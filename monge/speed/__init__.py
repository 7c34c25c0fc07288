"""How fast the layer and whole models run on this machine, beside the dense FFN and transformers' paths.

SpeedConfig --> candidates --> interleaved timing --> one record a case --> table, figures, report
"""

from monge.speed.config import PHASES, TRAINING, SpeedConfig
from monge.speed.measuring import measure_experts

__all__ = ["PHASES", "TRAINING", "SpeedConfig", "measure_experts"]
