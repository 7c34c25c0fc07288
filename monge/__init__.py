"""Monge: Mixture-of-Experts by optimal transport.

    hidden states --> router --> Routing --> dispatch --> experts --> combine --> hidden states
                        |
                     monge.ot (plans, assignments, prices)

`MoE` is the layer, `make_router` any router by name, `step` the one call after every optimizer step,
`watch` tells what routing did. The solvers stand on their own in `monge.ot`.
"""

from monge import ot, routing
from monge.moe import MoE
from monge.monitor import watch
from monge.routing import Routing, aux_loss, make_router, step

__all__ = ["MoE", "Routing", "aux_loss", "make_router", "ot", "routing", "step", "watch"]
__version__ = "0.1.0"
