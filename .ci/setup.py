"""Make the environment of this checkout: a venv that holds what requirements.lock names, and the package itself, editable.

    python .ci/setup.py FOLDER

Needs a Python with venv and nothing else: no git, no compiler, no bash. A stamp in the folder says what it was made from and
for which checkout, so that a second call costs nothing and a changed lock is noticed whatever the files' times say.
"""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE_FROM = ("requirements.lock", "settings.ini", "setup.py", "pyproject.toml")


def content_key() -> str:
    "SHA-256 over everything the environment is made from, the minor version of Python included."
    digest = hashlib.sha256(repr(sys.version_info[:2]).encode())
    for name in MADE_FROM:
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()


def step(message: str, *command: object) -> None:
    "Say what is done, do it, say how long it took; what the command prints is shown only when it fails."
    print(f"  {message} …", end="", flush=True)
    begin = time.monotonic()
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(f" {time.monotonic() - begin:.0f} s", flush=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        sys.exit(f"Set-up failed while {message} (status {done.returncode}, reason above); mend it and call make again.")


def main(folder: Path) -> None:
    "Make or renew the environment in `folder`; does nothing when its stamp says that it is up to date."
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"Python {sys.version.split()[0]} is not 3.11, 3.12 or 3.13. Name one that is: make PYTHON=python3.12 …")
    stamp, key = folder / "made-from", content_key()
    made_from, made_for = stamp.read_text().splitlines() if stamp.is_file() else ("", str(ROOT))
    if (made_from, made_for) == (key, str(ROOT)):
        return
    print(f"Setting up {folder} with Python {sys.version.split()[0]}: a few minutes the first time", flush=True)
    usable = made_for == str(ROOT) and Path(sys.prefix) == folder  # a venv does not survive being moved
    if not usable:
        step("making the venv", getattr(sys, "_base_executable", sys.executable), "-m", "venv", "--clear", folder)
    stamp.write_text(f"unfinished\n{ROOT}\n")
    python = folder / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet", "--no-deps")
    locked = ("--require-hashes", "--only-binary", ":all:", "--no-compile", "--requirement", "requirements.lock")
    step("installing the locked packages, each checked by its hash", *install, *locked)
    others = "site-packages/.*/tests?/"  # a quarter of the code, never imported here
    step("compiling them to bytecode on all cores", python, "-m", "compileall", "-q", "-j", "0", "-x", others, folder / "lib")
    step("installing this package, editable", *install, "--no-build-isolation", "--editable", ".")
    stamp.write_text(f"{key}\n{ROOT}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
