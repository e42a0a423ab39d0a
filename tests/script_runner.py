"""Run scripts and functions in processes that are forked from a server with all imports done: a start takes a fraction
of a second, and each still has a process, an environment and a working directory of its own."""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path

PRELOADED = [
    "torch.distributed", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch._dynamo",
    "transformers.trainer", "transformers.image_processing_utils", "datasets", "accelerate", "hf_detr.training",
    "hotcoco", "scipy.optimize", "timm.models",
]  # fmt: skip


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _run(job, arguments: list, cwd: str, environment: dict[str, str], output: str, setup) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if callable(job):
        job(int(os.environ.get("RANK", "0")), *arguments)
        return
    sys.argv = [str(job), *(str(argument) for argument in arguments)]
    sys.path.insert(0, str(Path(job).parent))
    if setup is not None:
        setup()
    runpy.run_path(str(job), run_name="__main__")


class Script:
    """A running script, on one or several processes of a torch process group; like `subprocess.Popen`.

    Args:
        job: path of the script; or a function of a test module, which is called with the rank and the arguments.
        setup: a function of a test module, called in each process before the script.
    """

    def __init__(self, job, *arguments, cwd, output: Path, processes: int = 1, environment=None, setup=None) -> None:
        self.output = output
        output.unlink(missing_ok=True)
        common = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(processes)}
        common |= environment or {}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            common["WORLD_SIZE"] = str(processes)
        self.processes = []
        for rank in range(processes):
            own = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            self.processes.append(
                _context().Process(target=_run, args=(job, arguments, str(cwd), own, str(output), setup))
            )
            self.processes[-1].start()

    def poll(self) -> int | None:
        """The exit code, or None while a process runs; where one has failed, the others are ended."""
        codes = [process.exitcode for process in self.processes]
        if any(codes):
            time.sleep(0.5)
            self.send(9)
        return self.returncode if None not in codes or any(codes) else None

    @property
    def returncode(self) -> int:
        return next((code for process in self.processes if (code := process.exitcode)), 0)

    def send(self, signal_number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal_number)

    def communicate(self) -> tuple[str, None]:
        while self.poll() is None:
            time.sleep(0.02)
        for process in self.processes:
            process.join()
        return self.output.read_text(), None


def run_script(job, *arguments, cwd, **options) -> tuple[int, str]:
    """Exit code and output of a script or function, see [`Script`]."""
    script = Script(job, *arguments, cwd=cwd, output=Path(cwd) / "output.txt", **options)
    said, _ = script.communicate()
    return script.returncode, said
