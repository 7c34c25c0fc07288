"""What a converted model kept and what it saves, beside the dense model it came from.

quality     perplexity, KL divergence, agreement of language models
embeddings  cosine of encoders
layers      error and expert load of every FFN, the oracle
cost        parameters, active share, FLOPs
speed       tokens per second, peak memory
tasks       zero-shot tasks through lm-eval, offline
study       all of it, in an output folder that can be resumed
"""

from monge.conversion.evaluation.cost import Cost, active_shares, measure_cost
from monge.conversion.evaluation.embeddings import EmbeddingQuality, compare_embeddings
from monge.conversion.evaluation.layers import LayerQuality, measure_layers, oracle
from monge.conversion.evaluation.quality import Quality, compare_models, perplexity
from monge.conversion.evaluation.settings import EvalConfig
from monge.conversion.evaluation.speed import Speed, measure_speed, peak_memory_bytes
from monge.conversion.evaluation.study import evaluate
from monge.conversion.evaluation.tasks import TASKS, Retention, TaskScore, retention, run_task
from monge.hf.blocks import counted_loads, find_blocks, shifted_top_k

__all__ = [
    "TASKS",
    "Cost",
    "EmbeddingQuality",
    "EvalConfig",
    "LayerQuality",
    "Quality",
    "Retention",
    "Speed",
    "TaskScore",
    "active_shares",
    "compare_embeddings",
    "compare_models",
    "counted_loads",
    "evaluate",
    "find_blocks",
    "measure_cost",
    "measure_layers",
    "measure_speed",
    "oracle",
    "peak_memory_bytes",
    "perplexity",
    "retention",
    "run_task",
    "shifted_top_k",
]
