"""`hf-detr`: the scripts of `examples/` after `pip install hf_detr` alone."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import hf_detr
from hf_detr.cli import COMMANDS, main, symptoms

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-detr"])


def test_help_fits_a_screen_and_lists_every_command(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 100
    assert all(f"  {name} " in text for name in (*COMMANDS, "env"))
    main([])
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_the_script_of_the_same_source(command, capsys):
    script = COMMANDS[command][0]
    found = importlib.util.find_spec(f"hf_detr.commands.{script}")
    assert Path(found.origin).read_bytes() == (EXAMPLES / f"{script}.py").read_bytes()
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"hf-detr {command}" in capsys.readouterr().out


def test_every_script_of_the_examples_is_a_command():
    not_commands = {"detr_in_50_lines", "finetune_trainer"}  # to be read
    assert {file.stem for file in EXAMPLES.glob("*.py")} == not_commands | {script for script, _ in COMMANDS.values()}


def test_errors_end_with_a_sentence():
    with pytest.raises(SystemExit, match="no command 'fintune'"):
        main(["fintune"])
    with pytest.raises(SystemExit, match=r"There is no \./runs/none"):
        main(["describe", "./runs/none"])


def test_versions_and_devices_are_printed_for_a_bug_report(capsys):
    main(["env"])
    lines = capsys.readouterr().out.splitlines()
    assert f"hf_detr {hf_detr.__version__}" in lines
    assert any(line.startswith("torch 2.") for line in lines)
    assert lines[-1].startswith("GPUs: ")


def test_every_message_points_to_a_symptom_and_every_symptom_has_a_message(capsys):
    sources = (Path(hf_detr.__file__).parent).rglob("*.py")
    text = "".join(file.read_text() for file in sources)
    named = set(re.findall(r"more_about\(['\"]([\w-]+)['\"]\)", text))
    named |= {name for name in symptoms() if f'"{name}",\n' in text}  # of training_advice
    assert named == set(symptoms())
    main(["troubleshoot"])
    listed = capsys.readouterr().out
    for name, section in symptoms().items():
        assert f"  {name} " in listed
        main(["troubleshoot", name])
        said = capsys.readouterr().out
        assert said.startswith(section.partition("\n")[0])
        assert "](" not in said, "links of the page are no use in a terminal"
    main(["troubleshoot", "ap-is-0"])
    said = capsys.readouterr().out
    assert "See boxes are shifted (hf-detr troubleshoot boxes-are-shifted)." in said
    assert "what to expect (docs/recipes.md#what-to-expect)" in said
    with pytest.raises(SystemExit, match="Unknown symptom 'slow'"):
        main(["troubleshoot", "slow"])


def test_symptoms_have_the_anchors_of_the_page():
    page = (EXAMPLES.parent / "docs" / "troubleshooting.md").read_text()
    linked = set(re.findall(r"\]\(#([\w-]+)\)", page))
    assert linked
    assert linked <= set(symptoms())
