"""The report: whole from any part of the records, self-contained, repeatable, escaped, never half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from viz.fake_records import write_fake_run

from monge.viz import figure_paths, write_report
from monge.viz.heatmap import paint
from monge.viz.names import label
from monge.viz.provenance import origin

CASES = {
    "several seeds": {},
    "one seed": {"seeds": 1},
    "a single router": {"routers": ("prices",)},
    "dense only": {"routers": ("dense",)},
    "no load records": {"loads": False},
    "variants of a router": {
        "routers": ("topk", "ssr:p=0.01", "ssr:p=0.1", "ssr:p=1", "ssr:p=0.1,carry=True")
    },
    "images, a synthetic start": {
        "images": True,
        "routers": ("dense", "topk", "maxscore"),
        "router_bias": 3.0,
    },
    "interrupted": {"interrupt_after": 3},
    "interrupted in the first run": {"interrupt_after": 0},
}


class Page(HTMLParser):
    """Ids, references, tags and text of a page; complains about tags left open."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.links, self.tags, self.open = [], [], [], []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.links.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small comparison with its report; for reading only."""
    out = write_fake_run(tmp_path_factory.mktemp("runs") / "mine", routers=("topk", "ssr"), seeds=2, steps=80)
    write_report(out)
    return out


@pytest.mark.parametrize("case", CASES)
def test_any_part_of_the_records_gives_a_whole_page(tmp_path, case):
    options = {"seeds": 2, "steps": 80} | CASES[case]
    out = write_fake_run(tmp_path, **options)
    text = write_report(out).read_text()
    page = Page(text)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    assert "url(http" not in text
    assert all(label(name) in page.words for name in options.get("routers", ("dense", "maxscore")))
    assert page.tags.count("figure") == page.tags.count("figcaption") == len(figure_paths(out)) // 2
    assert ("Synthetic" in page.words) == ("synthetic" in case)
    names = {path.stem for path in figure_paths(out)}
    assert ("sweep" in names) == (case == "variants of a router")
    if "synthetic" in case:
        svgs = [path.read_text() for path in figure_paths(out) if path.suffix == ".svg"]
        assert all("starts at +3 on 4 of the 16 experts" in svg for svg in svgs)
    assert ("Unfinished" in page.words) == ("interrupt" in case)
    for path in figure_paths(out):
        if path.suffix == ".svg":
            ET.parse(path)
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_the_page_adapts_to_theme_and_width(written):
    text = (written / "report.html").read_text()
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text
    for light in ("#0070b0", "#1c2127"):  # drawn colours are variables; the definition is their only place
        assert text.count(light) == 1


def test_the_same_records_give_the_same_bytes_and_leave_matplotlib_alone(tmp_path, written):
    settings, backend = dict(matplotlib.rcParams), matplotlib.rcParams._get_backend_or_none()
    again = write_fake_run(tmp_path / "mine", routers=("topk", "ssr"), seeds=2, steps=80)
    write_report(again)
    assert dict(matplotlib.rcParams) == settings
    assert matplotlib.rcParams._get_backend_or_none() == backend
    names = sorted(path.name for path in written.iterdir())
    assert len([name for name in names if name.endswith((".png", ".svg"))]) == 12
    for name in names:
        assert (written / name).read_bytes() == (again / name).read_bytes(), name


def test_what_comes_from_outside_is_escaped(tmp_path):
    out = write_fake_run(tmp_path, routers=("topk",), seeds=1, steps=80)
    config = json.loads((out / "config.json").read_text())
    evil = "<script>alert(1)</script>"
    config["preset"] = config["data"]["note"] = config["machine"]["cpu"] = evil
    config["config"]["text"] = ["it's & <b>.txt"]
    (out / "config.json").write_text(json.dumps(config))
    for name in ("records.jsonl", "summary.json"):
        (out / name).write_text((out / name).read_text().replace("topk", "<i>&"))
    text = write_report(out).read_text()
    page = Page(text)
    assert not {"script", "i", "b"} & set(page.tags)
    assert evil in page.words
    assert "--text 'it'\"'\"'s & <b>.txt'" in page.words


def test_the_command_spells_out_every_setting(written):
    words = Page((written / "report.html").read_text()).words
    assert "monge compare --preset quick --out mine" in words
    for option in ("--routers topk ssr", "--seeds 2", "--steps 80", "--top-k 2", "--lr 0.004"):
        assert option in words
    assert "--text" not in words  # the default packages: nothing to name


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_keeps_the_old_report(tmp_path, monkeypatch, code, written):
    out = Path(shutil.copytree(written, tmp_path / "copy"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=f"cannot write .*{os.strerror(code)}.*Free some space"):
        write_report(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_without_matplotlib_the_message_names_the_extra(tmp_path, monkeypatch):
    out = write_fake_run(tmp_path, routers=("topk",), seeds=1, steps=80)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'monge\[plot\]'"):
        write_report(out)


def test_loads_are_painted_symmetrically_around_the_mean():
    rgba = paint(np.array([0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 9.0]))
    np.testing.assert_allclose(rgba[:, 3], [1, 1, 0.5, 0, 0.5, 1, 1])
    assert (rgba[:3, 2] > rgba[:3, 0]).all()  # blue below
    assert (rgba[4:, 0] > rgba[4:, 2]).all()  # orange above


@pytest.mark.parametrize(("threads", "told"), [(1, "2 cores, 1 thread."), (2, "2 cores, 2 threads.")])
def test_the_machine_is_told_in_singular_and_plural(threads, told):
    machine, _ = origin({"machine": {"cpu": "a CPU", "cores": 2, "threads": threads}})
    assert f"a CPU, {told}" in machine
