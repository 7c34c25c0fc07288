"""Nothing half-written: whole files, whole lines, whatever the disk or a signal does."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest

from monge.workspace.records import Records
from monge.workspace.writing import append_line, prepare_folder, write_atomic


def _full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failure", [_full, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, monkeypatch, failure, where):
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, where, failure)
    with pytest.raises((OSError, KeyboardInterrupt)):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]


def test_a_line_that_does_not_fit_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    append_line(path, "first")
    write, calls = os.write, []

    def nearly_full(file, data):
        calls.append(len(data))
        return write(file, data[:3]) if len(calls) == 1 else _full()

    monkeypatch.setattr(os, "write", nearly_full)
    with pytest.raises(OSError, match=r"records\.jsonl: No space left on device.*--out"):
        append_line(path, "second")
    assert len(calls) == 2
    assert path.read_bytes() == b"first\n"


def test_short_writes_are_completed(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:2]))
    append_line(tmp_path / "r", "longer than two")
    assert (tmp_path / "r").read_text() == "longer than two\n"


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(OSError, match=r"cannot write .*out.*--out"):
            prepare_folder(folder, needed=0)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_read_only_folder_is_found_out_at_once(tmp_path, monkeypatch):
    def denied(self, data):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.write_bytes", denied)
    with pytest.raises(OSError, match="Read-only file system"):
        prepare_folder(tmp_path / "out", needed=0)
    assert os.listdir(tmp_path / "out") == []


def test_a_full_disk_is_found_out_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5 * 2**20))
    prepare_folder(tmp_path / "out", needed=4 * 2**20)
    with pytest.raises(OSError, match="has 5 MiB free, and the run needs about 6 MiB"):
        prepare_folder(tmp_path / "out", needed=6 * 2**20)


@pytest.mark.parametrize(
    "torn", [b'{"kind": "train", "rou', b'{"kind"\n', b"\xff\n", b'["a list"]\n', b'{"kind": "eval"}']
)
def test_records_drop_what_follows_the_last_whole_line(tmp_path, torn):
    path = tmp_path / "records.jsonl"
    rows = [{"kind": "train", "router": "topk", "seed": 0, "step": step} for step in (5, 10)]
    for row in rows:
        Records(path).append(row)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert Records(path).rows == rows
    assert path.read_bytes() == whole


def test_keep_drops_every_other_record_on_disk_too(tmp_path):
    path = tmp_path / "records.jsonl"
    records = Records(path)
    rows = [
        {"kind": "train", "router": router, "seed": seed, "step": step}
        for router in ("topk", "ssr")
        for seed in (0, 1)
        for step in (5, 10)
    ]
    for row in rows:
        records.append(row)
    records.keep(lambda row: (row["router"], row["seed"]) != ("ssr", 1) or row["step"] <= 5)
    assert records.first("train", router="ssr", seed=1)["step"] == 5
    assert records.first("eval") is None
    expected = [row for row in rows if row != {"kind": "train", "router": "ssr", "seed": 1, "step": 10}]
    assert records.rows == expected == [json.loads(line) for line in path.read_text().splitlines()]


def test_a_number_that_json_lacks_is_refused_before_it_is_written(tmp_path):
    records = Records(tmp_path / "records.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        records.append({"kind": "train", "router": "topk", "seed": 0, "step": 1, "loss": float("nan")})
    assert records.rows == []
    assert not records.path.exists()
