"""The lab: small models on real text or images that differ in their router alone, trained and measured.

    text or images --> training (each router and seed) --> evaluation --> records.jsonl, summary.json

`compare` is the experiment; `CompareConfig` (text) or `VisionConfig` (images) all that decides its figures;
`PRESETS` their settings by name. Needs ``pip install 'monge[lab]'``.
"""

from __future__ import annotations

from monge.lab.comparison import compare
from monge.lab.config import CompareConfig, ExperimentConfig, VisionConfig
from monge.lab.observer import Observer
from monge.lab.presets import PRESETS

__all__ = ["PRESETS", "CompareConfig", "ExperimentConfig", "Observer", "VisionConfig", "compare"]
