"""From a converted model to a checkpoint: a standard architecture wherever one can hold it.

structure   what the model is made of, and what it needs of an architecture
targets     the architectures as data: what they hold, their keys and fields
choice      which of them an export takes
tensors     the weights under the architecture's keys
folder      folders that appear whole or not at all
card        README.md
checkpoint  export(), which joins them
"""

from monge.conversion.exporting.checkpoint import export
from monge.conversion.exporting.targets import TARGETS

__all__ = ["TARGETS", "export"]
