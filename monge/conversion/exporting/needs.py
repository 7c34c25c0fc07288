"""What a converted model may need of an architecture beside experts with gates that sum to 1.

Each need is a phrase that stands in messages as it is. `Structure.needs` are those of a model,
`Architecture.holds` those that an architecture can meet.
"""

from __future__ import annotations

SHARED_EXPERTS = "shared experts"
DENSE_LAYERS = "layers that stayed dense"
LATER_DENSE_LAYERS = "dense layers after converted ones"
UNEQUAL_LAYERS = "layers of different shape (experts, k or widths)"
UNUSUAL_PLACES = "experts in unusual places of the model"
FFN_BIAS = "biases in the FFN"
QKV_BIAS = "biases of query, key and value"
OUTPUT_BIAS = "a bias of the attention's output"
QK_NORM = "norms of query and key"
WINDOW = "a sliding window shorter than the context"
SOME_WINDOWS = "a sliding window in some layers only"
SOFTMAX_GATES = "gates by a softmax"
SIGMOID_GATES = "gates by a sigmoid"
SINGLE_EXPERT = "a single routed expert"
BINARY_GATES = "binary gates (a softmax over all experts cannot tell their logits apart)"
