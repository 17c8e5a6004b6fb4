"""`python -m benchmarks [--quick] [--only SECTION …] [--out FILE]`: measure, show, keep."""

import argparse
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import measure, report
from benchmarks.goals import goals
from xsmom_nb.files import write_atomically

LATEST = Path(__file__).with_name("results") / "latest.json"
SECTIONS = {
    "peers": measure.peers, "batch": measure.batch, "imports": measure.imports, "first_calls": measure.first_calls,
    "decisions": measure.decisions, "replays": measure.replays, "scheduled_run": measure.scheduled_run, "growth": measure.growth,
}  # fmt: skip


def rounded(value: Any) -> Any:
    "Figures with five digits, all the way down: more would be noise that git keeps."
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def measured(names: list[str], quick: bool, before: dict[str, Any], console: Console) -> Iterator[dict[str, Any]]:
    "The results after each section; those that were not asked for are taken from before."
    made, place = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), measure.machine()
    sections = {name: before.get(name, []) for name in SECTIONS}
    with console.status("measuring") as status:
        def say(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                console.print(text, highlight=False)

        for name in (name for name in SECTIONS if name in names):
            sections[name] = SECTIONS[name](quick, say)
            busy = {"load_average_after": measure.load_average()}
            results = rounded({"schema": 1, "quick": quick, "made": made, "machine": place | busy, **sections})
            yield results | {"goals": [] if quick else rounded(goals(results))}


def main(arguments: list[str]) -> int:
    "Exit status 0: measured, all equities agreed."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,500 bars, one round, nothing kept: do all engines still agree?")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="the others stay as they were")
    parser.add_argument("--out", type=Path, help="file of the results; else benchmarks/results/latest.json; none with --quick")
    chosen = parser.parse_args(arguments)
    path = chosen.out or (None if chosen.quick else LATEST)
    before = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    for results in measured(chosen.only, chosen.quick, before, Console(stderr=True)):
        if path:
            write_atomically(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    report.show(results)
    if path:
        report.draw(results, path.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
