"""The page of an audit: the records' numbers in words, whole from any part of them."""

from __future__ import annotations

import json

import pytest
from viz.test_viz_report import Page

from monge.viz.audit import figure_paths, headline, read_audit, write_report
from monge.viz.audit.report import layer_rows
from monge.viz.audit.run import findings


def write_fake_audit(out, *, layers=3, **changes):
    """Three layers of four experts, of which the last one's fourth is dead; two domains."""
    out.mkdir(parents=True)
    config = {
        "command": "audit",
        "config": {"model": "<my> model", "tokens": 64},
        "model": {"name": "<my> model"},
    }
    (out / "config.json").write_text(json.dumps(config))
    rows = [
        {
            "kind": "audit_layer", "layer": layer, "name": f"layers.{layer}", "num_experts": 4, "top_k": 2,
            "load": [10, 9, 8, 0 if layer == layers - 1 else 5], "routing_entropy": 1.0,
            "duplicates": [[0, 1]],
            "closest": 0.01, "information": 0.1, "information_chance": 0.02,
            "drops": {"1": 0.25, "1.25": 0.1},
            "flips": 0.02, "batch_dependence": 0.0, "leak": 0.0, "batch_dependence_training": None,
            "leak_training": None, "max_violation": 0.25 * layer, "dead": [3] if layer == layers - 1 else [],
            "load_entropy": 1.2,
        }
        for layer in range(layers)
    ]  # fmt: skip
    (out / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "layers": layers, "experts": 12, "tokens": 64, "sequences": 4, "loss": 2.0, "perplexity": 7.389,
        "losses": {"-1": 2.5, "0": 2.0, "+1": 1.9}, "domains": {"a": 1.5, "b": 2.5}, "max_violation": 0.25,
        "dead_experts": 1, "duplicate_pairs": 3, "load_entropy": 1.2, "routing_entropy": 1.0,
        "information": 0.1, "information_chance": 0.02, "drops": {"1": 0.25, "1.25": 0.1},
        "precision": "bfloat16", "flips": 0.02, "loss_precision": 2.125, "loss_checked": 2.0,
        "loss_stock": None, "batch_dependence": 0.0, "leak": 0.0, "batch_dependence_training": None,
        "leak_training": None, **changes,
    }  # fmt: skip
    (out / "summary.json").write_text(json.dumps(summary))
    return out


def test_the_page_says_what_the_records_say(tmp_path):
    out = write_fake_audit(tmp_path / "run")
    run = read_audit(out)
    assert headline(run).startswith(
        "1 of 12 experts are dead; in the least balanced layer (2) the busiest takes"
    )
    assert "1.5 times its share" in headline(run)
    assert "drop 25.0 %" in headline(run)
    said = " ".join(findings(run))
    for words in (
        "3 pairs of experts", "14.4 % of what there is to know", "2.9 % would be chance", "2.0 % of the",
        "changes by +0.1250 nats", "one expert less per token +0.5000", "one expert more per token -0.1000",
        "no route depends on the batch or on later tokens.",
    ):  # fmt: skip
        assert words in said, words
    titles, rows = layer_rows(run)
    assert titles == ["layer", "experts", "imbalance", "dead", "copies", "closest", "domain", "drops 1",
                      "drops 1.25", "flips", "batch", "leak"]  # fmt: skip
    assert rows[2][:5] == ["2", "2 of 4", "0.50", "1", "1"]
    text = write_report(out).read_text()
    page = Page(text)
    assert page.open == []
    assert "<my>" not in text
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    written = [path.name for path in figure_paths(out)]
    assert written == ["layers.png", "layers.svg", "loads.png", "loads.svg"]
    first = (out / "report.html").read_bytes()
    assert write_report(out).read_bytes() == first


def test_what_depends_on_the_batch_is_said(tmp_path):
    changes = {"batch_dependence": 0.2, "leak": 0.1, "batch_dependence_training": 0.3, "leak_training": 0.15}
    said = " ".join(findings(read_audit(write_fake_audit(tmp_path / "run", **changes))))
    assert "In evaluation 20.0 % of the slots depend on the other sequences" in said
    assert "In training 30.0 % depend on the batch and 15.0 % on later tokens." in said
    both = {"batch_dependence": 0.0, "leak": 2e-5, "batch_dependence_training": 0.0, "leak_training": 0.0}
    said = " ".join(findings(read_audit(write_fake_audit(tmp_path / "rounding", loss_stock=2.5, **both))))
    assert "beyond rounding" in said
    assert "Nor in training." in said
    assert "Routed by transformers alone, without Monge, the loss changes by +0.5000" in said


def test_from_any_part_of_the_records(tmp_path):
    out = write_fake_audit(tmp_path / "run", layers=1)
    write_report(out)
    assert [path.stem for path in figure_paths(out)] == ["loads", "loads"]  # no curve over one layer
    (out / "summary.json").unlink()
    assert "Unfinished" in write_report(out).read_text()
    (out / "records.jsonl").unlink()
    assert findings(read_audit(out)) == []
    assert "not finished" in write_report(out).read_text()
    (out / "config.json").write_text('{"command": "eval"}')
    with pytest.raises(ValueError, match="not of an audit"):
        write_report(out)
