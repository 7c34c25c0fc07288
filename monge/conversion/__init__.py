"""Dense to MoE: from a dense checkpoint to a standard Mixture-of-Experts checkpoint.

    dense checkpoint --> find FFNs --> partition (neurons -> experts) --> fit / align --> export
     --> standard checkpoint

`convert` runs it all; each stage stands on its own in a module of its name.
"""

from monge.conversion.config import ConvertConfig
from monge.conversion.exporting import TARGETS, export
from monge.conversion.loading import load
from monge.conversion.partition import METHODS
from monge.conversion.pipeline import ConvertResult, convert

__all__ = ["METHODS", "TARGETS", "ConvertConfig", "ConvertResult", "convert", "export", "load"]
