"""The lab: language models on real text that differ in their router alone, trained and measured.

    text --> tokens --> training (each router and seed) --> evaluation --> records.jsonl, summary.json

`compare` is the experiment; `CompareConfig` all that decides its figures; `PRESETS` its settings by name.
Needs ``pip install 'monge[lab]'``.
"""

from __future__ import annotations

from monge.lab.comparison import compare
from monge.lab.observer import Observer
from monge.lab.presets import PRESETS, CompareConfig

__all__ = ["PRESETS", "CompareConfig", "Observer", "compare"]
