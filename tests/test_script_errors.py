"""What goes wrong in a script is one sentence and an exit code, before anything is computed; outputs are not lost."""

import ast
import json
from pathlib import Path

import pytest
from conftest import save_tiny_checkpoint
from script_runner import run_script

from hf_detr.data import draw_shapes_dataset
from hf_detr.runtime import prepare_output, require_source

pytestmark = pytest.mark.xdist_group("script errors")
EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = {0: "rectangle", 1: "ellipse", 2: "triangle"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a checkpoint in `runs/shapes-1`."""
    folder = tmp_path_factory.mktemp("place")
    draw_shapes_dataset(folder / "data", num_train=6, num_val=3, progress=False)
    (folder / "runs").mkdir()
    save_tiny_checkpoint(folder / "runs" / "shapes-1", NAMES)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("finetune.py", "--dataset", "data/none"),
        ("finetune.py", "--dataset", "data", "--model", "runs/shapes-2"),
        ("evaluate.py", "--model", "runs/shapes-2", "--dataset", "data"),
        ("evaluate.py", "--model", "runs/shapes-1", "--dataset", "data/none"),
        ("predict.py", "data/val", "--model", "runs/shapes-2"),
        ("export.py", "runs/shapes-2"),
        ("export.py", "./shapes"),
        ("convert.py", "runs/shapes-2", "out"),
        ("check_dataset.py", "data/none"),
    ],
    ids=" ".join,
)
def test_a_mistyped_path_is_no_id_of_the_hub(place, command):
    script, *arguments = command
    code, output = run_script(EXAMPLES / script, *arguments, cwd=place)
    assert code == (2 if script == "check_dataset.py" else 1)
    assert "There is no " in output
    assert "Traceback" not in output
    if "runs/shapes-2" in command:
        assert "In runs are shapes-1." in output


def test_debug_shows_the_traceback(place):
    code, output = run_script(EXAMPLES / "export.py", "runs/shapes-2", "--debug", cwd=place)
    assert code == 1
    assert "Traceback" in output
    assert "FileNotFoundError: There is no runs/shapes-2." in output


@pytest.mark.parametrize(
    ("source", "is_path"),
    [("facebook/detr-resnet-50", False), ("detr", False), ("./x", True), ("/x/y", True), ("a/b/c", True),
     ("~/x", True), ("../x", True), ("https://example.org/x.pth", False)],
)  # fmt: skip
def test_what_is_a_path_and_what_an_id(source, is_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if is_path:
        with pytest.raises(FileNotFoundError, match="There is no"):
            require_source(source)
    else:
        require_source(source)


def test_outputs_go_into_folders_that_are_made(place, tmp_path):
    found = tmp_path / "not" / "there" / "metrics.json"
    code, output = run_script(
        EXAMPLES / "evaluate.py", "--model", "runs/shapes-1", "--dataset", "data", "--output", found,
        "--num_workers", "0", "--report", tmp_path / "a" / "report", cwd=place,
    )  # fmt: skip
    assert code == 0, output
    assert json.loads(found.read_text())["AP"] >= 0
    assert (tmp_path / "a" / "report" / "report.html").is_file()
    code, output = run_script(
        EXAMPLES / "check_dataset.py", "data", "--json", tmp_path / "b" / "x.json",
        "--report", tmp_path / "c" / "x.html", cwd=place,
    )  # fmt: skip
    assert code == 0, output
    assert (tmp_path / "b" / "x.json").is_file()


def test_outputs_that_cannot_be_written_are_told_before_anything_is_computed(place, tmp_path):
    (tmp_path / "file").write_text("")
    command = ["--model", "runs/shapes-1", "--dataset", "data", "--output", tmp_path / "file" / "x.json"]
    code, output = run_script(EXAMPLES / "evaluate.py", *command, cwd=place)
    assert code == 1
    assert "x.json cannot be written" in output
    assert "Evaluating" not in output
    with pytest.raises(IsADirectoryError, match="is a folder"):
        prepare_output(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--learning_rate=-1e-4",), "--learning_rate must be"),
        (("--backbone_learning_rate", "nan"), "--backbone_learning_rate must be"),
        (("--weight_decay", "inf"), "--weight_decay must be"),
        (("--seed", "-1"), "--seed must not be negative"),
        (("--save_minutes", "nan"), "--save_minutes must be"),
        (("--model", "runs/shapes-1", "--backbone", "resnet18"), "give one of them"),
        (("--freeze_backbone", "--backbone_weights", "none"), "would keep the random weights"),
        (("--freeze_backbone", "--backbone_learning_rate", "1e-5"), "for a backbone that trains"),
        (("--freeze_backbone", "--lora_rank", "2", "--model", "runs/shapes-1"), "omit --freeze_backbone"),
        (("--model", "runs/shapes-1", "--backbone_weights", "none"), "give one of them"),
        (("--model", "runs/shapes-1", "--set", "d_model=64"), "changes the weights of --model"),
        (("--model", "runs/shapes-1", "--set", "query_type=anchor"), "changes the weights of --model"),
    ],
)
def test_arguments_that_contradict_are_refused_before_data_are_read(place, arguments, message):
    code, output = run_script(EXAMPLES / "finetune.py", "--dataset", "none/at/all", *arguments, cwd=place)
    assert code == 2
    assert message in output


@pytest.mark.parametrize("threshold", ["50", "nan", "-0.1"])
def test_thresholds_are_scores(place, threshold):
    command = ["data/val", "--model", "runs/shapes-1", "--threshold", threshold]
    code, output = run_script(EXAMPLES / "predict.py", *command, cwd=place)
    assert code == 2
    assert "between 0 and 1" in output


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_objects_is_told_before_training(place, tmp_path, split):
    draw_shapes_dataset(tmp_path / "data", num_train=4, num_val=2, progress=False)
    file = tmp_path / "data" / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text()) | {"annotations": []}
    file.write_text(json.dumps(content))
    options = ["--backbone", "test_resnet", "--backbone_weights", "none", "--epochs", "1"]
    code, output = run_script(EXAMPLES / "finetune.py", "--dataset", "data", *options, cwd=tmp_path)
    assert code == 1
    assert ("images has an object" if split == "val" else "annotations are expected") in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


def test_quick_takes_other_epochs(tmp_path):
    code, output = run_script(EXAMPLES / "finetune.py", "--quick", "--epochs", "1", "--output_dir", "out", cwd=tmp_path)
    assert code == 0, output
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_every_option_has_a_text_in_the_help(script):
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    options = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument"]
    assert [ast.unparse(c.args[0]) for c in options if "help" not in {k.arg for k in c.keywords}] == []


def test_an_image_that_a_worker_of_the_loader_cannot_read_is_one_sentence(tmp_path):
    """And not the traceback that PyTorch puts into the message."""
    data = draw_shapes_dataset(tmp_path / "data", num_train=6, num_val=3, progress=False)
    file = data / "train" / "000003.jpg"
    file.write_bytes(file.read_bytes()[:-300])
    code, said = run_script(
        EXAMPLES / "finetune.py", "--dataset", "data", "--backbone", "test_resnet", "--backbone_weights", "none",
        "--image_size", "64", "--num_workers", "1", "--epochs", "1", "--batch_size", "2", "--set", "encoder_layers=1",
        "decoder_layers=1", "num_queries=6", cwd=tmp_path,
    )  # fmt: skip
    assert code == 1
    assert "Traceback" not in said
    assert "truncated" in said
