"""Every command and every Python block of the documentation is executed as it is written, on the files it names.

Each page has a folder in which its placeholders exist: `FOLDER` is a data set, `CHECKPOINT` a checkpoint, and so on.
Its commands run there in the order of the page, then its Python blocks, which share their variables. The Hub is one on
the loopback. Training gets options that make it short, and exports are compared on few shapes; the commands themselves
are not changed.
"""

import ast
import json
import re
import shlex
import shutil
import textwrap
import threading
import tomllib
from collections.abc import Iterator
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import transformers
from checkpoints import save_original, save_v4, their_model
from hub_client import HubClients
from hub_server import HubServer
from PIL import Image
from safetensors.torch import save
from shards import contents, write_parquet
from test_other_detectors import save_other
from test_video import make_clip

from hf_detr.cli import COMMANDS as CLI_COMMANDS
from hf_detr.data import draw_shapes_dataset, load_detection_dataset
from hf_detr.interop.original_checkpoints import coco_labels
from hf_detr.training import parse_finetune_args

pytestmark = pytest.mark.xdist_group("documentation")  # its fixtures are expensive: one worker runs them once

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.py"))
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", *DOCS, "examples/README.md", *SCRIPTS]

LAUNCH = "accelerate launch --config_file examples/accelerate/"
NEEDS_INDEX = "needs a package index; the test of extras looks for what it names"
NEEDS_GPUS = "needs GPUs; test_accelerate_configs.py reads the configuration"
SERVES = "serves until it is interrupted; test_app_browser.py visits the page"
NOT_RUN = {
    "python3 -m venv .venv": "makes an environment for the commands after it",
    ". .venv/bin/activate": "changes the shell",
    'pip install ".[train]"': NEEDS_INDEX,
    'pip install ".[test]"': NEEDS_INDEX,
    'pip install ".[evaluation]"': NEEDS_INDEX,
    'pip install ".[onnx]"': NEEDS_INDEX,
    'pip install ".[openvino]"': NEEDS_INDEX,
    'pip install ".[openvino,evaluation]"': NEEDS_INDEX,
    'pip install ".[video]"': NEEDS_INDEX,
    'pip install ".[lora]"': NEEDS_INDEX,
    'pip install ".[visualization]"': NEEDS_INDEX,
    'pip install ".[app,video]"': NEEDS_INDEX,
    "accelerate launch examples/finetune.py --dataset FOLDER --learning_curve --output_dir DIR "
    "--minutes 20": "trains for 80 minutes; test_learning_curve.py trains on fewer images",
    "accelerate launch examples/finetune.py --dataset FOLDER --folds 3 --output_dir CV": "test_folds.py trains two",
    "accelerate launch examples/finetune.py --dataset FOLDER --folds 5 --output_dir CV": "test_folds.py trains two",
    "python examples/label_errors.py --model CV --dataset FOLDER": "test_folds.py runs it",
    "python examples/check_dataset.py DATASET --engine ray": "test_engines.py checks on Ray",
    "python examples/check_dataset.py SHARDS --streaming --engine ray": "test_engines.py checks on Ray",
    "hf-detr env": "test_cli.py runs it",
    "hf-detr troubleshoot": "test_cli.py runs it",
    "hf-detr troubleshoot ap-is-0": "test_cli.py runs it",
    "python examples/app.py --model CHECKPOINT": SERVES,
    "python examples/serve.py --model CHECKPOINT": "serves until it is interrupted; test_server.py asks it",
    "python examples/app.py --model runs/shapes-1": SERVES,
    "python examples/app.py --model CHECKPOINT --examples FOLDER --corrections my-corrections": SERVES,
    "python -m pytest -n 2 --dist loadgroup": "runs these tests",
    "hf auth login": "asks for a token; it is in the environment here",
    f"{LAUNCH}single_gpu.yaml examples/finetune.py --dataset FOLDER": NEEDS_GPUS,
    f"{LAUNCH}eight_gpus.yaml examples/finetune.py --dataset FOLDER": NEEDS_GPUS,
    f"{LAUNCH}fsdp2.yaml examples/finetune.py --dataset FOLDER": NEEDS_GPUS,
    f"{LAUNCH}two_machines.yaml --main_process_ip ADDRESS examples/finetune.py --dataset FOLDER "
    "--output_dir SHARED/run": NEEDS_GPUS,
    "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 examples/finetune.py": "takes two processes; "
    "test_examples.py starts some",
    "python examples/finetune_trainer.py": "trains on 2,000 images; test_trainer_example.py runs it on fewer",
    "accelerate launch examples/finetune_trainer.py --dataset FOLDER": "trains on images of 800 pixels, and has no "
    "option for fewer",
}
TESTED_ELSEWHERE = {
    "docs/moving_from_transformers.md": "test_moving_from_transformers.py executes its blocks",
    "docs/scale.md": "test_engines.py executes its blocks",
}

SHORT_TRAINING = ("--quick", "--epochs", "1")
SMALL_IMAGES = ("--image_size", "64", "--num_workers", "0")
SMALL_MODEL = (
    "--set", "encoder_layers=1", "decoder_layers=1", "d_model=32", "encoder_ffn_dim=32", "decoder_ffn_dim=32",
    "encoder_attention_heads=4", "decoder_attention_heads=4", "num_queries=20",
)  # fmt: skip
MAIN_JOB = "accelerate launch examples/finetune.py"
OVERFIT = "accelerate launch examples/finetune.py --dataset FOLDER --overfit 8"  # one epoch is too short to memorize

IMPORTS = """
import evaluate, torch, hf_detr, hf_detr.data, hf_detr.dataset_check, hf_detr.evaluation
import hf_detr.hub, hf_detr.interop, hf_detr.prediction, hf_detr.speed, hf_detr.training, hf_detr.visualization
import transformers.trainer
from transformers import pipeline
"""
EVALUATION_PRELUDE = """
from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.data import DetectionCollator, build_loader, load_detection_dataset
from transformers import pipeline

detector = pipeline("object-detection", model="CHECKPOINT")
model = DetrForDetection.from_pretrained("CHECKPOINT")
processor = DetrImageProcessor.from_pretrained("CHECKPOINT")
dataset = load_detection_dataset("FOLDER", "val")
loader = build_loader(dataset, DetectionCollator(processor), batch_size=2, num_workers=0, training=False)
predictions = [{"boxes": [[10, 10, 40, 40]], "scores": [0.9], "labels": [0]}]
references = [{"boxes": [[10, 10, 40, 40]], "labels": [0]}]
"""
BATCH_PRELUDE = """
import torch
batch = {
    "pixel_values": torch.rand(1, 3, 64, 64),
    "labels": [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}],
}
"""
# {page: (what its Python blocks have as given, what is done with what they make)}
AROUND = {
    "docs/data.md": ("", "next(iter(loader)), augmentation(rows[0])"),
    "docs/evaluation.md": (EVALUATION_PRELUDE, ""),
    "docs/export.md": ("", "detector('image.jpg')"),
    "docs/fine-tuning.md": (BATCH_PRELUDE, "assert outputs.loss.requires_grad and outputs.loss_dict"),
    "docs/hub.md": ("", "detector('image.jpg')"),
    "docs/prediction.md": (
        "from PIL import Image\nimages = [Image.open('image.jpg')]\nCHECKPOINT = 'CHECKPOINT'",
        "assert model.config.num_queries == 64",
    ),
    "docs/speed.md": (
        "from hf_detr import DetrForDetection\nmodel = DetrForDetection.from_pretrained('CHECKPOINT').eval()",
        "model(torch.rand(1, 3, 64, 64))",
    ),
}
NOT_IN_HELP = {  # options of launchers and of pytest
    "--config_file", "--num_processes", "--machine_rank", "--main_process_ip", "--standalone", "--nproc_per_node",
    "--dist",
}  # fmt: skip
RUN = """
import os, runpy, sys, traceback
os.dup2(1, 2)
os.environ["http_proxy"] = {proxy!r}  # answers every address
code = 0
try:
{work}
except SystemExit as stop:
    code = stop.code
    if isinstance(code, str):
        print(code)
except BaseException:
    code = 1
    traceback.print_exc(file=sys.stdout)
print("\\nEXIT", 1 if isinstance(code, str) else code or 0, flush=True)
os._exit(0)  # a fork of so many modules takes seconds to clean up
"""
SHORT_EXPORT = """
import shutil
from pathlib import Path
from hf_detr.export import exporting
check_cases = exporting.check_cases
exporting.check_cases = lambda *args: check_cases(*args)[2:6]
"""
REUSE_GRAPH = """
exporting.trace = lambda *args, **kwargs: None
graph = [*Path("exports/r50").glob("model.*")]
exporting.write_graph = lambda *args, **options: [shutil.copy(path, args[-1]) for path in graph]
"""


# What the pages hold -------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    page: str
    line: int
    text: str


def fenced(page: str, language: str) -> list[Block]:
    """Fenced blocks of a page, also those in lists."""
    text = (ROOT / page).read_text()
    return [
        Block(page, text[: match.start(2)].count("\n"), textwrap.dedent(match[2]))
        for match in re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    ]


def prose(page: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def commands_of(page: str) -> list[str]:
    """The commands of a page, without the comments behind them: in blocks, in the text, and in the docstring of a
    script."""
    if page.endswith(".py"):
        description = ast.get_docstring(ast.parse((ROOT / page).read_text())) or ""
        lines = [line.strip() for line in description.splitlines()]
        return [line for line in lines if line.startswith(("python examples/", "accelerate launch "))]
    lines = [line for block in fenced(page, "bash") for line in block.text.splitlines()]
    starts = r"accelerate launch \S|python3? \S|pip install|hf \S|hf-detr (?!COMMAND|env|--)\S|[A-Z_]+=\S+ \w"
    lines += re.findall(rf"`((?:{starts})[^`]*)`", prose(page))
    commands = [command for line in lines for command in re.sub(r"\s+#.*", "", line).split(" && ")]
    return list(dict.fromkeys(command.strip() for command in commands if command.strip()))


def script_of(command: str) -> tuple[str, list[str]] | None:
    """The script that a command runs, and its arguments; launchers run it in one process here."""
    if match := re.match(r"(?:hf-detr |accelerate launch -m hf_detr\.commands\.)([\w-]+)(.*)", command):
        script = CLI_COMMANDS.get(match[1], (match[1],))[0]
        return f"examples/{script}.py", shlex.split(match[2])
    match = re.search(r"(?:^|\s)(examples/\S+\.py)(.*)", command)
    return (match[1], shlex.split(match[2])) if match else None


def generic(command: str) -> str:
    """The same for commands that differ only in the launcher and in the names that pages have for the same files."""
    if found := script_of(command):
        command = " ".join([found[0], *found[1]])
    return re.sub(r"(?<!\S)(MODEL|runs/shapes-1)(?!\S)", "CHECKPOINT", command).replace("DATASET", "FOLDER")


COMMANDS = {page: commands_of(page) for page in PAGES}
ALL_COMMANDS = list(dict.fromkeys(command for commands in COMMANDS.values() for command in commands))


# Where they run ------------------------------------------------------------------------------------------------------


class Workplace:
    """A folder for each page, and the Hub."""

    def __init__(self, folder: Path, hub: HubServer, clients: HubClients, proxy: str) -> None:
        self.folder, self.hub, self.clients, self.proxy = folder, hub, clients, proxy
        self.base = folder / "base"
        self.base.mkdir()
        (self.base / "examples").symlink_to(ROOT / "examples")
        self.done: set[str] = set()

    def run(self, work: str, cwd: Path) -> tuple[int, str]:
        """Exit code and output of Python code."""
        code = RUN.format(proxy=self.proxy, work=textwrap.indent(work, "    "))
        output, _, status = self.clients.run(code, self.folder / "home", "hf_me", cwd=cwd).rpartition("EXIT")
        return int(status), output

    def run_script(self, script: str, *arguments: str, cwd: Path, before: str = "") -> tuple[int, str]:
        argv = [script, *arguments]
        return self.run(f"{before}\nsys.argv = {argv!r}\nrunpy.run_path({script!r}, run_name='__main__')", cwd)

    def run_command(self, command: str, cwd: Path) -> str:
        """Run a command, shortened if it trains or exports; return what is wrong with it."""
        script, arguments = script_of(command) or ("", [])
        assert script, f"{command} is neither a script of examples/ nor in the table of what is not run"
        if "--resume" in arguments:
            arguments += ["--epochs", "2"]
        elif script in ("examples/finetune.py", "examples/by_feature/own_augmentation.py"):
            arguments += SHORT_TRAINING
            arguments += SMALL_IMAGES if {"--dataset", "--train"} & {*arguments} else ()
            arguments += SMALL_MODEL if "--model" not in arguments else ()
        before = SHORT_EXPORT if script == "examples/export.py" else ""
        before += REUSE_GRAPH if "--int8" in arguments and (cwd / "exports" / "r50").exists() else ""
        code, output = self.run_script(script, *arguments, cwd=cwd, before=before)
        if command == OVERFIT:
            return "" if code == 1 and "Overfit: NO, AP50" in output else output
        if code:
            return f"exit code {code}\n{output[-1500:]}"
        self.done.add(generic(command))
        return ""

    def run_blocks(self, page: str, blocks: list[Block], cwd: Path) -> tuple[int, str]:
        """Run Python blocks as one program; lines in tracebacks are those of the page."""
        before, after = AROUND.get(page, ("", ""))
        parts = [(before, "before the blocks"), *(("\n" * b.line + b.text, page) for b in blocks)]
        parts.append((after, "after the blocks"))
        return self.run(
            f"scope = {{}}\nfor text, name in {parts!r}:\n    exec(compile(text, name, 'exec'), scope)", cwd
        )

    def prepare(self, page: str) -> Path:
        """A folder in which the placeholders of a page exist."""
        cwd = self.folder / page.replace("/", "-")
        shutil.copytree(self.base, cwd, symlinks=True)
        checkpoint, data = self.base / "runs" / "shapes-1", self.base / "data" / "shapes"
        places = {"CHECKPOINT": checkpoint, "MODEL": checkpoint, "FOLDER": data, "DATASET": data}
        places |= {"IMAGES": data / "val", "IMAGE_OR_FOLDER": data / "val"}
        if page == "docs/fine-tuning.md":
            places["DIR"] = checkpoint
            repo = timm.get_pretrained_cfg("convnext_tiny").hf_hub_id
            (cwd / "convnext_tiny.safetensors").write_bytes(self.hub.blobs_of(repo)["model.safetensors"])
        elif page == "examples/push_to_hub.py":
            places["FOLDER"] = checkpoint
        elif page == "examples/detr_in_50_lines.py":
            places["CHECKPOINT"] = self.fine_tuned
        elif page in ("docs/interop.md", "examples/convert.py"):
            places["CHECKPOINT"] = self.fine_tuned
            write_original_checkpoints(cwd)
        elif page == "docs/layouts.md":
            places["pictures"] = data
            for name, split in (("a", "train"), ("b", "val")):
                (cwd / name).mkdir()
                shutil.copy(data / "annotations" / f"instances_{split}.json", cwd / name / "boxes.json")
        elif page == "docs/data.md":
            for split, name in (("train", "train"), ("val", "validation")):
                rows = contents(load_detection_dataset(data, split, cache_dir=cwd / "cache", progress=False))
                write_parquet(cwd / "SHARDS", name, rows, [len(rows)])
        elif page == "docs/masks.md":
            draw_shapes_dataset(cwd / "FOLDER", num_train=8, num_val=4, masks=True, progress=False)
            del places["FOLDER"]
        for name, source in places.items():
            shutil.copytree(source, cwd / name)
        return cwd

    @cached_property
    def fine_tuned(self) -> Path:
        """A checkpoint with learned queries, as README.md makes it from a published one."""
        shutil.copytree(self.base / "data" / "shapes", self.base / "FOLDER")
        command = "accelerate launch examples/finetune.py --dataset FOLDER --model facebook/detr-resnet-50"
        assert self.run_command(command, self.base) == ""
        shutil.rmtree(self.base / "FOLDER")
        return Path(shutil.move(self.base / "runs" / "FOLDER-1", self.folder / "fine-tuned"))


def write_original_checkpoints(folder: Path) -> None:
    """Files of the paper's repository under the names that the pages have for them, with small transformers."""
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    names = ["cat", "collar"]
    save_original(their_model("resnet18", num_labels=len(coco_labels()), **heads), folder / "detr-r50-e632da11.pth")
    save_original(their_model("resnet50", num_labels=len(names), **heads), folder / "detr-r101-dc5.pth")
    (folder / "names.json").write_text(json.dumps(names))


class _Picture(BaseHTTPRequestHandler):
    """A proxy that has a picture at every address."""

    def do_GET(self) -> None:
        content = BytesIO()
        Image.new("RGB", (64, 48), "green").save(content, "JPEG")
        self.send_response(200)
        self.send_header("Content-Length", str(len(content.getvalue())))
        self.end_headers()
        self.wfile.write(content.getvalue())

    def log_message(self, *args: object) -> None:
        pass


def save_small(kind: str, folder: Path, names: dict[int, str]) -> None:
    """A small model of a kind, as the Hub has it, with its processor."""
    if kind == "rt_detr":
        save_other(kind, folder)
        return
    label2id = {name: index for index, name in names.items()}
    save_v4(their_model(kind=kind, num_labels=len(names), id2label=names, label2id=label2id), folder)
    size = {"shortest_edge": 64, "longest_edge": 96}
    transformers.ConditionalDetrImageProcessor(size=size).save_pretrained(folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """The Hub with the models that the pages name: a small published DETR, and timm's networks with random weights."""
    folder = tmp_path_factory.mktemp("published")
    names = coco_labels()
    label2id = {name: index for index, name in names.items()}
    theirs = their_model(num_labels=len(names), num_queries=100, id2label=names, label2id=label2id)
    save_v4(theirs, folder)
    transformers.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    with HubServer({"ME": "hf_me"}) as server:
        server.add_repo("facebook/detr-resnet-50", {path.name: path.read_bytes() for path in folder.iterdir()})
        for kind, repo in (
            ("conditional", "microsoft/conditional-detr-resnet-50"),
            ("rt_detr", "PekingU/rtdetr_r50vd"),
        ):
            save_small(kind, folder / kind, names)
            server.add_repo(repo, {path.name: path.read_bytes() for path in (folder / kind).iterdir()})
        for network in ("resnet50", "convnext_tiny"):
            weights = save(timm.create_model(network).state_dict())
            server.add_repo(timm.get_pretrained_cfg(network).hf_hub_id, {"model.safetensors": weights})
        yield server
        assert server.errors == []


@pytest.fixture(scope="module")
def workplace(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("pages")
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Picture)
    threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
    with HubClients(hub, IMPORTS) as clients:
        place = Workplace(folder, hub, clients, f"http://127.0.0.1:{proxy.server_port}")
        assert place.run_command(MAIN_JOB, place.base) == ""
        draw_shapes_dataset(place.base / "data" / "shapes", num_train=8, num_val=4, progress=False)
        shutil.copy(place.base / "data" / "shapes" / "val" / "000000.jpg", place.base / "image.jpg")
        make_clip(place.base / "clip.mp4", frames=4)
        yield place
    proxy.shutdown()
    proxy.server_close()


# Tests ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if COMMANDS[page] or fenced(page, "python")])
def test_commands_and_blocks_run(page: str, workplace: Workplace):
    if page in TESTED_ELSEWHERE:
        pytest.skip(TESTED_ELSEWHERE[page])
    commands = [
        command for command in COMMANDS[page] if command not in NOT_RUN and generic(command) not in workplace.done
    ]
    blocks = fenced(page, "python")
    if not commands and not blocks:
        return
    cwd = workplace.prepare(page)
    problems = {}
    for command in commands:
        for output in ("OUT", "predictions") if page in SCRIPTS else ("OUT",):  # a script's commands are alternatives
            shutil.rmtree(cwd / output, ignore_errors=True)
        if problem := workplace.run_command(command, cwd):
            problems[command] = problem
    if blocks:
        code, output = workplace.run_blocks(page, blocks, cwd)
        if code:
            problems[f"the Python blocks of {page}"] = output
    assert not problems, "\n\n".join(f"{what}\n{problem}" for what, problem in problems.items())


def test_all_that_is_not_run_is_in_the_documentation():
    assert [command for command in NOT_RUN if command not in ALL_COMMANDS] == []
    assert [page for page in TESTED_ELSEWHERE if not fenced(page, "python")] == []


def test_no_block_is_in_a_language_that_is_not_run():
    """What shows the content of a file is in the languages of files."""
    languages = {"bash", "python", "text", "json", "xml", "yaml", ""}
    found = {match for page in PAGES for match in re.findall(r"^ *```(\w+)", (ROOT / page).read_text(), re.MULTILINE)}
    assert found <= languages


@pytest.mark.parametrize("command", [command for command in NOT_RUN if "examples/finetune.py" in command])
def test_arguments_of_training_that_is_not_run_are_read(command: str):
    _, arguments = script_of(command)
    parse_finetune_args(None, arguments)


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [(ROOT / page).read_text() for page in PAGES]
    named = {name for text in texts for names in re.findall(r"\.\[([\w,]+)\]\"", text) for name in names.split(",")}
    assert {"train", "test", "onnx"} <= named <= extras.keys()


def test_options_exist(workplace: Workplace):
    """Each option in a code span or a block is one of a script."""
    helps = {}
    for script in SCRIPTS:
        code, helps[script] = workplace.run_script(script, "--help", cwd=workplace.base)
        assert code == 0, helps[script]
    known = set(re.findall(r"--[a-z][\w-]*", " ".join(helps.values()))) | NOT_IN_HELP
    for page in [page for page in PAGES if page.endswith(".md")]:
        spans = re.findall(r"`([^`\n]+)`", prose(page)) + COMMANDS[page]
        named = {option for span in spans for option in re.findall(r"(?<!\S)--[a-z][\w-]*", span)}
        assert named <= known, page
