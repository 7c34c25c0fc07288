"""Monge: Mixture-of-Experts by optimal transport.

    hidden states --> router --> Routing --> dispatch --> experts --> combine --> hidden states
                        |
                     monge.ot (plans, assignments, prices)

    dense checkpoint --> convert --> Mixture-of-Experts checkpoint --> load

`MoE` is the layer, `make_router` any router by name, `step` the one call after every optimizer step,
`watch` tells what routing did. `convert` makes a Mixture of Experts of a dense checkpoint, `export` writes it
as a standard architecture, `load` reads it. The solvers stand on their own in `monge.ot`.
"""

from monge import hf, ot, routing
from monge.auditing import audit
from monge.conversion import convert, export, load
from monge.moe import MoE
from monge.monitor import watch
from monge.routing import Routing, aux_loss, make_router, step

__all__ = [
    "MoE",
    "Routing",
    "audit",
    "aux_loss",
    "convert",
    "export",
    "hf",
    "load",
    "make_router",
    "ot",
    "routing",
    "step",
    "watch",
]
__version__ = "0.1.0"
