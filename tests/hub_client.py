"""Code that uses the Hub of `hub_server.py` through the unmodified client, in processes of its own.

The pytest process cannot be such a client: it is offline for good (see conftest.py).
"""

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Self

from hub_server import HubServer
from warm_python import WarmPython


class ClientError(Exception):
    """The client's process failed; the message is what it wrote to stderr."""


class HubClients:
    """Processes that are clients of `server`. The client reads the Hub's address and the place of its cache when it is
    imported; the former stays the same, the latter is a link that leads to the `home` of each run.

    Args:
        imports: what all processes start with; see `WarmPython`.
    """

    def __init__(self, server: HubServer, imports: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._home = Path(self._folder.name) / "home"
        drop = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        env = {k: v for k, v in os.environ.items() if not k.startswith(drop) and not k.lower().endswith("_proxy")}
        env |= {"HF_ENDPOINT": server.endpoint, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        # With hf_xet installed the client sends every LFS file to Xet, whatever the server offers.
        env |= {f"HF_HUB_DISABLE_{name}": "1" for name in ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK")}
        self._env = env | {"HF_HOME": str(self._home), "ACCELERATE_USE_CPU": "true"}
        self._warm = WarmPython(imports, self._env)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._warm.__exit__(*exc)
        self._folder.cleanup()

    def run(
        self,
        code: str,
        home: Path,
        token: str | None = None,
        *,
        offline: bool = False,
        waits: bool = True,
        cold: bool = False,
        cwd: Path | None = None,
    ) -> str:
        """Run Python `code` with the cache in `home`; return what it printed.

        Args:
            offline: with HF_HUB_OFFLINE=1, which is read at import, so in a process that imports all by itself.
            waits: False makes `time.sleep` return at once: the client sleeps 1, 2, 4, 8, 8 seconds between its tries.
            cold: in a process that has imported nothing yet.
        """
        home.mkdir(parents=True, exist_ok=True)
        self._home.unlink(missing_ok=True)
        self._home.symlink_to(home)
        code = ("" if waits else "import time; time.sleep = lambda seconds: None\n") + textwrap.dedent(code)
        env = {"HF_TOKEN": token} if token else {}
        if offline or cold:
            env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
            done = subprocess.run(
                [sys.executable, "-c", code],
                env=self._env | env, cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
        else:
            done = self._warm.run(code, env=env, cwd=cwd)
        if done.returncode != 0:
            raise ClientError(done.stderr)
        return done.stdout
