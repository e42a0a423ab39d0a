"""Run Python code in processes of their own without paying for the imports each time.

A server process does the slow imports once and then forks a child for every piece of code. A child starts with the
modules as imported and shares nothing else with the other children. What a module reads from the environment when it
is imported it has from the server's environment.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self


class WarmPython:
    """A Python process that has executed `imports` in the environment `env`."""

    def __init__(self, imports: str, env: Mapping[str, str]) -> None:
        command = [sys.executable, __file__, imports]
        self.env = dict(env)
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.env)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.communicate(timeout=60)

    def run(
        self, code: str, argv: Sequence[str] = ("",), env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `code` in a child with these `sys.argv`, and with `env` on top of the server's environment."""
        with tempfile.TemporaryDirectory() as folder:
            job = {"code": code, "argv": list(argv), "env": self.env | dict(env or {}), "cwd": str(cwd or Path.cwd())}
            job |= {"stdout": f"{folder}/stdout", "stderr": f"{folder}/stderr"}
            self._server.stdin.write(json.dumps(job) + "\n")
            self._server.stdin.flush()
            returncode = int(self._server.stdout.readline())
            stdout, stderr = (Path(job[name]).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(job["argv"], returncode, stdout, stderr)


def serve(imports: str) -> None:
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)  # what the imports print is no reply
        exec(imports, {})
        for line in sys.stdin:
            job = json.loads(line)
            child = os.fork()
            if child == 0:
                run_child(job)
                return
            replies.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
            replies.flush()


def run_child(job: dict) -> None:
    for stream, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY)] + [(job[name], os.O_WRONLY | os.O_CREAT) for name in ("stdout", "stderr")]
    ):
        os.dup2(os.open(path, flags), stream)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.argv = job["argv"]
    sys.path[0] = ""
    code: object = 0
    try:
        exec(compile(job["code"], "<code>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # a fork of so many modules takes seconds to clean up


if __name__ == "__main__":
    serve(sys.argv[1])
