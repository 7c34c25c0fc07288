"""What changed between two benchmark files: `python -m benchmarks.compare OLD.json NEW.json`.

Prints, for every figure that both files have, new / old. A row is known by its texts, whole numbers and
booleans; its figures are its decimal numbers and all numbers of its tables. Times of different machines, or
of one machine under different loads, do not compare: the rows that are ratios to a peer do.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

Row = dict[str, object]


def figures(rows: list[Row]) -> dict[str, float]:
    """Every figure under the name ``row identity: figure``; equal rows are numbered."""
    found: dict[str, float] = {}
    seen: Counter[str] = Counter()
    for row in rows:
        identity = ", ".join(
            f"{k}={v}" if isinstance(v, int) else str(v) for k, v in row.items() if isinstance(v, str | int)
        )
        seen[identity] += 1
        if seen[identity] > 1:
            identity += f" #{seen[identity]}"
        for name, value in row.items():
            if isinstance(value, float):
                found[f"{identity}: {name}"] = value
            elif isinstance(value, dict):
                found |= {
                    f"{identity}: {name}, {k}": float(v)
                    for k, v in value.items()
                    if isinstance(v, int | float)
                }
    return found


def ratios(old: list[Row], new: list[Row]) -> dict[str, float]:
    """new / old of the figures that both have, in the order of ``new``; those that are 0 are left out."""
    before, after = figures(old), figures(new)
    return {name: value / before[name] for name, value in after.items() if before.get(name, 0) and value}


def load(path: str) -> tuple[Row, list[Row]]:
    """The machine and the rows of a file that `benchmarks.figures.write_json` wrote."""
    try:
        content = json.loads(Path(path).read_text())
        return content["machine"], content["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"{path} is not a file of benchmark rows ({error}): give one that --out wrote"
        ) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="JSON file of the earlier run")
    parser.add_argument("new", help="JSON file of the later run")
    parser.add_argument("--beyond", type=float, default=0.0, help="only changes of more than this share")
    args = parser.parse_args()
    (machine_old, old), (machine_new, new) = load(args.old), load(args.new)
    for name in sorted({*machine_old, *machine_new} - {"date", "load_1min"}):
        if machine_old.get(name) != machine_new.get(name):
            print(f"note: {name} was {machine_old.get(name)} and is {machine_new.get(name)}")
    found = ratios(old, new)
    for name, ratio in found.items():
        if abs(ratio - 1) >= args.beyond:
            print(f"{ratio:8.3f}  {name}")
    print(f"{len(found)} figures in both, of {len(figures(old))} and {len(figures(new))}")


if __name__ == "__main__":
    main()
