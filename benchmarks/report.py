"""The results for people: tables on the terminal, a picture. The tables of the README are made by `xsmom_nb.ops.readme`."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Results = dict[str, Any]
SECTIONS = {
    "batch": "Batch of parameter sets, wall time", "imports": "Whole processes", "first_calls": "First calls in a process",
    "decisions": "Live decision with reasons", "replays": "Live code, hour by hour", "scheduled_run": "Scheduled live run",
}  # fmt: skip
MARK = {True: "[green]met[/]", False: "[red]missed[/]", None: "[dim]not measured[/]"}


def number(value: float | None) -> str:
    "Three digits, thousands apart."
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def goal_table(results: Results) -> Table:
    "What was measured beside what was wanted."
    table = Table("what", "setting", "measured", "goal", "", title="Goals", title_justify="left")
    for line in results["goals"]:
        measured = "–" if line["measured"] is None else f"{number(line['measured'])} {line['unit']}"
        table.add_row(line["what"], line["setting"], measured, f"{line['goal']} {line['unit']}", MARK[line["met"]])
    return table


def engine_table(rows: list[dict[str, Any]]) -> Table:
    "Engines on one work."
    first = rows[0]
    title = f"{first['bars']:,} {first['source']} bars × {first['symbols']} symbols; {first['setting']}"
    columns = ("engine", "median ms", "min ms", "wall ms", "× kernel", "equity differs by", "peak MB")
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        if "absent" in row:
            table.add_row(row["engine"], row["absent"])
            continue
        error = f"{row['equity_error']:.0e}" + ("" if row["same_equity"] else ", other work")
        times = number(row["times_kernel"]) + (f" from {row['bars']:,} bars" if row["extrapolated"] else "")
        figures = (number(row[key]) for key in ("median_ms", "min_ms", "wall_median_ms"))
        table.add_row(row["engine"], *figures, times, error, number(row["peak_mb"]))
    return table


def works_of(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    "The rows of each contest; each begins with the kernel."
    found: list[list[dict[str, Any]]] = []
    for row in rows:
        if row["engine"] == "kernel":
            found.append([])
        found[-1].append(row)
    return found


def growth_table(rows: list[dict[str, Any]]) -> Table:
    "Engines beside each other, a work a line."
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    table = Table("bars × symbols", *(f"{engine}, ms" for engine in engines), title="Growth, seeded market", title_justify="left")
    for contest in works_of(rows):
        taken = {row["engine"]: number(row.get("median_ms")) for row in contest}
        table.add_row(f"{contest[0]['bars']:,} × {contest[0]['symbols']}", *(taken.get(engine, "–") for engine in engines))
    return table


def plain_table(rows: list[dict[str, Any]], title: str) -> Table:
    "Rows of one section as they are."
    names = list(rows[0]) if rows else []
    table = Table(*names, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(number(row[name]) if isinstance(row[name], float) else str(row[name]) for name in names))
    return table


def show(results: Results, console: Console | None = None) -> None:
    "Everything on the terminal."
    console, place = console or Console(), results["machine"]
    load = f"load {place['load_average']} before, {place['load_average_after']} after"
    console.print(f"{place['processor']}, {place['cores']} cores, Python {place['python']}; {load}.")
    console.print("Milliseconds are processor time, unless they are called wall.\n")
    for rows in works_of(results["peers"]):
        console.print(engine_table(rows))
    if results["growth"]:
        console.print(growth_table(results["growth"]))
    for section, title in SECTIONS.items():
        if results[section]:
            console.print(plain_table(results[section], title))
    if results["goals"]:
        console.print(goal_table(results))
    if place["load_average"] > place["cores"] / 2:
        console.print("[yellow]Others were at work on this host: figures are too large, ratios less so.[/]")


def draw(results: Results, path: Path) -> None:
    "Two panels: the engines on one work, and how their time grows with the bars."
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "benchmarks", "svg.fonttype": "none"}  # the same results, the same small file
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    setting = results["peers"][0]["setting"]
    rows = [row for row in results["peers"] if row["setting"] == setting and "absent" not in row]
    rows.sort(key=lambda row: -row["whole_ms"])
    left.barh([row["engine"] for row in rows], [row["whole_ms"] for row in rows],
              color=["tab:blue" if row["engine"] in ("kernel", "full risk", "end to end") else "0.7" for row in rows])
    for place, row in enumerate(rows):
        left.annotate(f" {number(row['whole_ms'])} ms", (row["whole_ms"], place), va="center", fontsize=8)
    left.set(xscale="log", title=f"One backtest: {setting}", xlabel="ms of processor time")
    left.margins(x=0.25)
    for engine in ("kernel", "NumPy", "vectorbt"):
        grown = [row for row in results["growth"] if row["engine"] == engine and row["symbols"] == 36 and "absent" not in row]
        grown.sort(key=lambda row: row["bars"])
        if grown:
            right.plot([row["bars"] for row in grown], [row["median_ms"] for row in grown], marker="o", label=engine)
    right.set(xscale="log", yscale="log", title="Growth in bars, 36 symbols", xlabel="bars", ylabel="ms of processor time")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
