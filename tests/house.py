"""The rules of the house, each a function that returns what breaks it (nothing, when all is well).

tests/test_house.py asserts that nothing does; the git hooks call two of them on the files of a commit:

    python tests/house.py imports nbs/00_errors.ipynb …
    python tests/house.py keys FILE …
"""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "xsmom_nb"
LONGEST_CELL = 60  # lines of an exported cell
LONGEST_MODULE = 500  # exported lines of a notebook

# Which room may lean on which: an import points to a lower layer, to the left, or to an earlier notebook of the same room.
# A room is a subpackage, or modules of the root that belong together.
LAYERS = (
    ("errors files clock sections operations credentials schema config ports compiled logs",),
    ("database state lease outbox deployments", "market"),
    ("exchange",),
    ("strategy", "meta"),
    ("risk",),
    ("execution", "decision decide"),
    ("live",),
    ("backtest",),
    ("optimizer",),
    ("runs",),
    ("ops",),
    (("console options cli_data cli_config cli_deploy cli_runs cli_state cli_launch cli_live cli_status cli_lookahead cli_resume "
     "cli_stream cli_sync cli_exchange cli_worker cli_honesty cli_rollout cli_schedule cli_release cli_notify cli_health "
     "cli_docs baseline rehearsal proof cli"),),
)


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def notebooks(root: Path = ROOT) -> list[Path]:
    "Every notebook people edit, in reading order; names that begin with an underscore are passed over, as nbdev does."
    found = (path for folder in ("nbs", "scheduled") for path in (root / folder).rglob("*.ipynb"))
    return sorted(path for path in found if not any(part.startswith((".", "_")) for part in path.relative_to(root).parts))


def code_cells(notebook: Path) -> Iterator[tuple[int, str]]:
    "Number (from 1) and source of each code cell."
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"], start=1):
        if cell["cell_type"] == "code":
            yield number, "".join(cell["source"])


def is_exported(source: str) -> bool:
    "Whether a cell goes into the package."
    return re.search(r"^#\| *(export|exporti|exports)\b", source, re.MULTILINE) is not None


def statements(source: str) -> list[str]:
    "The lines of a cell that are neither blank nor a directive."
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def default_exports(root: Path = ROOT) -> dict[str, list[Path]]:
    "Module (`market.panel`) to the notebooks that claim it."
    claims: dict[str, list[Path]] = defaultdict(list)
    for notebook in notebooks(root):
        for _, source in code_cells(notebook):
            for name in re.findall(r"^#\| *default_exp:? +(\S+)", source, re.MULTILINE):
                claims[name].append(notebook.relative_to(root))
    return dict(claims)


def settings(root: Path = ROOT) -> configparser.SectionProxy:
    "The package's metadata."
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


# ── Notebooks ────────────────────────────────────────────────────────────────────────────────────────────────────────
def twice_exported(root: Path = ROOT) -> list[str]:
    "Modules that two notebooks claim: the later export would silently overwrite the earlier."
    return [f"{module}: {', '.join(map(str, paths))}" for module, paths in default_exports(root).items() if len(paths) > 1]


def is_import(node: ast.stmt) -> bool:
    "Whether a statement is an import, or a block that holds nothing else (`if TYPE_CHECKING:`)."
    if isinstance(node, ast.If):
        return all(is_import(inner) for inner in [*node.body, *node.orelse])
    return isinstance(node, ast.Import | ast.ImportFrom)


def mixed_imports(paths: Iterable[Path]) -> list[str]:
    "Cells that import and do something else as well: whoever reruns the one repeats the other."
    findings = []
    for path in paths:
        for number, source in code_cells(path):
            python = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())
            kinds = {is_import(node) for node in ast.parse(python).body}
            if kinds == {True, False}:
                name = os.path.relpath(path, ROOT)
                findings.append(f"{name}: cell {number} mixes imports with other statements; give imports a cell of their own")
    return findings


def bad_shape(root: Path = ROOT) -> list[str]:
    "Exported cells and modules that grew too long to read, and notebooks that export but assert nothing."
    findings = []
    for path in notebooks(root):
        cells = list(code_cells(path))
        lengths = {number: len(statements(source)) for number, source in cells if is_exported(source)}
        long = {number: length for number, length in lengths.items() if length > LONGEST_CELL}
        name = path.relative_to(root)
        findings += [f"{name}: cell {number} exports {length} lines, at most {LONGEST_CELL}" for number, length in long.items()]
        if sum(lengths.values()) > LONGEST_MODULE:
            findings.append(f"{name}: exports {sum(lengths.values())} lines, at most {LONGEST_MODULE}; split the idea")
        if lengths and not any(re.search(r"\bassert\b|\btest_\w+\(", s) for _, s in cells if not is_exported(s)):
            findings.append(f"{name}: exports, but asserts nothing")
    return findings


def tool(name: str, *arguments: object, cwd: Path) -> None:
    "Run one of the environment's commands; its output is shown when it fails."
    command = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}  # under IN_TEST export does nothing
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited {done.returncode}:\n{done.stdout}{done.stderr}")


def workshop_copy(root: Path, into: Path) -> Path:
    "What export and cleaning read, copied, so that a check never changes the tree."
    for name in ("nbs", "scheduled"):
        if (root / name).is_dir():
            shutil.copytree(root / name, into / name, ignore=shutil.ignore_patterns(".*"))
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(root / name, into / name)
    return into


def first_difference(left: Path, right: Path) -> str | None:
    "Where two files first differ, as a sentence; None when they are equal."
    if not (left.is_file() and right.is_file()):
        return "only in the package: its notebook is gone" if left.is_file() else "missing from the package"
    pairs = zip_longest(left.read_bytes().splitlines(), right.read_bytes().splitlines())
    return next((f"differs in line {number}" for number, (a, b) in enumerate(pairs, start=1) if a != b), None)


def stale_export(root: Path, scratch: Path) -> list[str]:
    "Files of the package that differ from a fresh export of all notebooks into an empty folder."
    copy = workshop_copy(root, scratch)
    (copy / PACKAGE).mkdir()
    shutil.copy(root / PACKAGE / "__init__.py", copy / PACKAGE)  # holds the version, which no notebook does
    tool("nbdev-export", cwd=copy)
    names = sorted({path.relative_to(top) for top in (root / PACKAGE, copy / PACKAGE) for path in top.rglob("*.py")})
    differences = ((name, first_difference(root / PACKAGE / name, copy / PACKAGE / name)) for name in names)
    return [f"{PACKAGE}/{name}: {what}; run `make export`" for name, what in differences if what]


def unclean_notebooks(root: Path, scratch: Path) -> list[str]:
    "Notebooks that cleaning would change."
    copy = workshop_copy(root, scratch)
    for folder in ("nbs", "scheduled"):
        if (copy / folder).is_dir():
            tool("nbdev-clean", "--fname", folder, cwd=copy)
    names = [path.relative_to(root) for path in notebooks(root)]
    differences = ((name, first_difference(root / name, copy / name)) for name in names)
    return [f"{name}: {what} from its cleaned form; run `make clean-notebooks`" for name, what in differences if what]


# ── Package ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def head_of(module: str) -> str:
    "The part of a dotted module that `LAYERS` names: `market` for `market.panel`, `errors` for `errors`."
    return module.split(".")[0]


def imported_modules(source: str, module: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    "Line and dotted name of each own module that `module` imports, wherever in the file the import stands."
    above = [PACKAGE, *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = above[: len(above) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            targets = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        own = (target.removeprefix(PACKAGE + ".") for target in targets if target.startswith(PACKAGE + "."))
        yield from ((node.lineno, name) for name in own if name in modules)


def upward_imports(root: Path = ROOT) -> list[str]:
    "Imports that point up, or to a later notebook of the same layer; and modules that have no place in `LAYERS`."
    reading_order = {module: str(paths[0]) for module, paths in default_exports(root).items()}
    rooms = ((layer, column, room) for layer, row in enumerate(LAYERS) for column, room in enumerate(row))
    place = {name: (layer, column) for layer, column, room in rooms for name in room.split()}
    files = {
        ".".join(path.relative_to(root / PACKAGE).with_suffix("").parts): path
        for path in sorted((root / PACKAGE).rglob("*.py"))
        if path.name not in ("__init__.py", "_modidx.py")
    }
    findings = [f"{module}: not in LAYERS of tests/house.py; give it a layer" for module in files if head_of(module) not in place]
    known = {module: (*place[head_of(module)], reading_order.get(module, "")) for module in files if head_of(module) in place}
    for module in known:
        for line, target in imported_modules(files[module].read_text(encoding="utf-8"), module, set(known)):
            if known[target] >= known[module]:
                findings.append(
                    f"{files[module].relative_to(root)}:{line} imports {target} of layer {known[target][0]}, itself of layer "
                    f"{known[module][0]}; an import points to a lower layer or to an earlier notebook of its own"
                )
    return findings


def disagreements(root: Path = ROOT) -> list[str]:
    "What settings.ini, pyproject.toml and the package say differently about the same thing."
    own = settings(root)
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    nbdev, version = project["tool"]["nbdev"], re.search(r'__version__ = "(.+)"', (root / PACKAGE / "__init__.py").read_text())
    pairs = [
        ("lib_path", own["lib_path"], nbdev.get("lib_path")),
        ("nbs_path", own["nbs_path"], nbdev.get("nbs_path")),
        ("version", own["version"], version and version[1]),
        ("min_python of mypy", own["min_python"], project["tool"]["mypy"]["python_version"]),
        ("min_python of ruff", own["min_python"].replace(".", ""), project["tool"]["ruff"]["target-version"].removeprefix("py")),
    ]
    return [f"{what}: settings.ini says {a}, elsewhere it is {b}" for what, a, b in pairs if a != b]


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
KEPT = ("nbs", "scheduled", "configs", "tests", "benchmarks", "docs", ".ci", PACKAGE)
HOSTS = ("pypi" + ".org", "python" + "hosted", "npm" + "js", "anaconda" + ".org")
FORBIDDEN = {
    "names a package registry's host": re.compile("|".join(map(re.escape, HOSTS))),
    "names a path of one machine": re.compile(r"(?<![\w.~])/(?:work|root|home/\w+|Users/\w+)(?=[/\s'\"`)\\]|$)", re.MULTILINE),
}
PRIVATE_KEY = re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----")


def text_files(root: Path = ROOT) -> list[Path]:
    "What people and tools wrote and git keeps, so far as it is text."
    below = (path for name in KEPT for path in (root / name).rglob("*"))
    kept = (path for path in [*root.iterdir(), *below] if path.is_file() and "__pycache__" not in path.parts)
    shut_out = re.compile(r"/\.(hypothesis|ipynb_checkpoints|virtual_documents)/|/\.(env|coverage)|\.(parquet|png|pyc)$")
    return sorted(path for path in kept if not shut_out.search(path.as_posix()))


def forbidden_words(root: Path = ROOT) -> list[str]:
    "Lines that would break, or give something away, on any other machine."
    findings = []
    for path in text_files(root):
        text = path.read_text(encoding="utf-8", errors="replace")
        for what, pattern in FORBIDDEN.items():
            for match in pattern.finditer(text):
                findings.append(f"{path.relative_to(root)}:{text.count(chr(10), 0, match.start()) + 1} {what}: {match[0]}")
    return findings


def private_keys(paths: Iterable[Path]) -> list[str]:
    "Files that hold a private key."
    texts = ((path, path.read_text(encoding="utf-8", errors="replace")) for path in paths)
    return [f"{path}: holds a private key" for path, text in texts if PRIVATE_KEY.search(text)]


if __name__ == "__main__":
    rule, *names = sys.argv[1:]
    findings = {"imports": mixed_imports, "keys": private_keys}[rule](map(Path, names))
    print(*findings, sep="\n", end="\n" if findings else "")
    sys.exit(bool(findings))
