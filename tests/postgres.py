"""A PostgreSQL server of the tests' own, from Debian's packages."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

BINARIES = "/usr/lib/postgresql/15/bin"


def free_port() -> int:
    "A port of the loopback that nobody listens on."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def initdb() -> Path | None:
    "The program that makes a server's folder, where there is one."
    found = shutil.which("initdb", path=os.pathsep.join([BINARIES, os.environ.get("PATH", "")]))
    return Path(found).resolve() if found else None


class Postgres:
    "A server in a folder; it refuses to run as root, so there it runs as nobody."

    def __init__(self, folder: Path, binaries: str) -> None:
        self.folder, self.binaries, self.port = folder, Path(binaries), free_port()
        self.as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
        if self.as_nobody:
            os.chown(folder, 65534, 65534)
        self.run("initdb", "-D", f"{folder}/data", "-U", "study", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C")

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://study@127.0.0.1:{self.port}/postgres"

    def run(self, command: str, *arguments: str) -> None:
        "One of the server's programs, to its end."
        done = subprocess.run([*self.as_nobody, str(self.binaries / command), *arguments], cwd=self.folder, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c fsync=off"
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-w", "-o", options, "-l", f"{self.folder}/log", "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-w", "-m", "immediate", "stop")

    def execute(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self.url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(statement)

    def is_running(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
