"""The solvers beside their peers: OR-tools, SciPy, POT, the released MaxScore procedure, unrolled Sinkhorn.

    python -m benchmarks.solvers [--only assign|sinkhorn] [--repeats N] [--threads N] [--out FILE.json]

Every row is a pair timed in the same interleaved run; `ratio` is how many times faster ours is (medians).
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import solvers_assign, solvers_sinkhorn
from benchmarks.figures import machine, write_json

GROUPS = {"assign": solvers_assign.run, "sinkhorn": solvers_sinkhorn.run}


def show(group: str, rows: list[dict]) -> None:
    """Print one group of rows; a figure that a row lacks stays empty."""
    table = Table(title=group, title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if column in {"case", "peer"} else "right")
    for row in rows:
        cells = [row.get(column) for column in columns]
        table.add_row(*(f"{c:.4g}" if isinstance(c, float) else "" if c is None else str(c) for c in cells))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(GROUPS), help="one group instead of all")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved rounds per case (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--out", help="also write the rows as JSON to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine())
    rows: list[dict] = []
    for group, run in GROUPS.items():
        if arguments.only in (None, group):
            found = run(arguments.repeats)
            show(group, found)
            rows += [{"group": group, **row} for row in found]
    if arguments.out:
        write_json(arguments.out, rows)


if __name__ == "__main__":
    main()
