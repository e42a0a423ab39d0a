"""The scripts of `examples/` as modules, for `hf-detr` and `accelerate launch -m hf_detr.commands.finetune`. A wheel
has copies of them in this folder; in a checkout, they are read from `examples/`."""

from pathlib import Path

if not Path(__file__).with_name("finetune.py").exists():
    __path__.append(str(Path(__file__).parents[3] / "examples"))
