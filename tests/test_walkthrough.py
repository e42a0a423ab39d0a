"""`examples/walkthrough.ipynb`: every cell runs, and the repository has no outputs of it."""

import json
from pathlib import Path

NOTEBOOK = json.loads((Path(__file__).parents[1] / "examples" / "walkthrough.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_every_cell_runs(capsys):
    scope: dict = {}
    for number, cell in enumerate(CODE, start=1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), scope)
    printed = capsys.readouterr().out
    assert "B x 3 x H x W: (1, 3, 256, 320)" in printed
    assert "B x 2048 x h x w: (1, 2048, 8, 10)" in printed
    assert "B x hw x d: (1, 80, 256)" in printed
    assert "equal to the model's first encoder layer" in printed
    assert "equal to the model's; with its 5 other layers" in printed
    figures = [scope["as_image"](scope["figure"]), scope["maps"].draw(columns=5)]
    assert figures[0].size == (500, 400)
    assert figures[1].size[0] == 5 * 320


def test_it_has_no_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
