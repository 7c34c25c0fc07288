"""Text that Debian packages hold: dict-wn (WordNet as a dictionary) and anarchism (essays, as HTML).

What is not plain text is decoded by the end of its name: ``.dz`` and ``.gz`` are decompressed, of ``.html``
and ``.htm`` the text between the tags is kept. Sizes and positions of spans count decoded bytes.
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

DEBIAN = {"dict-wn": ".dict.dz", "anarchism": ".html"}
"""Debian package -> how the names of its text files end."""
PACKED = (".dz", ".gz")
MARKED_UP = (".html", ".htm")

# What ends a line of text in HTML, and what holds none.
_BLOCKS = frozenset(
    (
        "p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "table", "ul",
        "ol", "title", "dt", "dd", "hr",
    )
)  # fmt: skip
_SILENT = frozenset(("script", "style"))


def installed_files(package: str) -> list[Path]:
    """The text files of a package of `DEBIAN`, by name; none where it is not installed, or without dpkg."""
    dpkg = shutil.which("dpkg")
    if dpkg is None:
        return []
    listed = subprocess.run([dpkg, "-L", package], capture_output=True, text=True, check=False).stdout
    return sorted(Path(line) for line in listed.splitlines() if line.endswith(DEBIAN[package]))


def install_command(packages: list[str]) -> str:
    """The command that installs Debian packages."""
    return f"apt-get install {' '.join(packages)}"


def is_encoded(path: Path) -> bool:
    """Whether the text of the file is other than its bytes."""
    return path.name.endswith(PACKED + MARKED_UP)


@lru_cache(maxsize=512)
def decoded(path: Path) -> bytes:
    """The text of an encoded file, UTF-8.

    Raises:
        OSError: the file cannot be read; `gzip.BadGzipFile` is one.
    """
    if path.name.endswith(PACKED):
        with gzip.open(path) as file:
            return file.read()
    text = _Text()
    text.feed(path.read_bytes().decode("utf-8", errors="replace"))
    text.close()
    return text.text().encode()


def text_size(path: Path) -> int:
    """Bytes of the decoded text of a file."""
    return len(decoded(path)) if is_encoded(path) else path.stat().st_size


class _Text(HTMLParser):
    """Collects what a browser would show, blocks on lines of their own."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.silent += tag in _SILENT
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(0, self.silent - (tag in _SILENT))
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(re.sub(r"\s+", " ", data))

    def text(self) -> str:
        lines = (re.sub(r" +", " ", line).strip() for line in "".join(self.parts).split("\n"))
        return "\n".join(line for line in lines if line)
