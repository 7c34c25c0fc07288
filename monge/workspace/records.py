"""records.jsonl: one JSON object a line, appended as it happens, valid after any interruption.

Every record has a ``kind``; what else it holds is its command's business.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monge.workspace.writing import append_line, write_atomic

Record = dict[str, Any]


class Records:
    """The records of a command's output folder, in memory and on disk.

    Opening drops what a killed process left after the last whole line.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "records.jsonl"
        >>> records = Records(path)
        >>> records.append({"kind": "train", "router": "topk", "seed": 0, "step": 10, "loss": 4.5})
        >>> len(Records(path).rows)
        1
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Record] = []
        data = path.read_bytes() if path.exists() else b""
        whole = 0
        for line in data.splitlines(keepends=True):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:  # JSON or UTF-8
                row = None
            if not isinstance(row, dict):
                break
            self.rows.append(row)
            whole += len(line)
        if whole < len(data):
            write_atomic(path, data[:whole])

    def append(self, record: Record) -> None:
        """Add one record, on disk before this returns."""
        append_line(self.path, json.dumps(record, allow_nan=False))
        self.rows.append(record)

    def first(self, kind: str, **fields: Any) -> Record | None:
        """The first record of that kind whose fields have those values, or None."""
        wanted = {"kind": kind, **fields}
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def keep(self, wanted: Callable[[Record], bool]) -> None:
        """Drop every other record, on disk too: what an interrupted run wrote after its last checkpoint."""
        kept = [row for row in self.rows if wanted(row)]
        if len(kept) < len(self.rows):
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
            self.rows = kept
