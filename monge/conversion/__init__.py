"""Dense to MoE: from a dense checkpoint to a standard Mixture-of-Experts checkpoint.

dense checkpoint --> find FFNs --> partition (neurons -> experts) --> fit / align --> export --> checkpoint
"""

from monge.conversion.config import ConvertConfig

__all__ = ["ConvertConfig"]
