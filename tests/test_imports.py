"""DESIGN.md section 1 and 2: who may import whom, read from the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_detr"
MAY_IMPORT = {
    "boxes": set(),
    "configuration_hf_detr": set(),
    "folding": set(),
    "memory_format": set(),
    "backbone": {"folding", "memory_format"},
    "position_embedding": set(),
    "linear": set(),
    "transformer": {"linear"},
    "heads": set(),
    "anchors": {"heads", "linear", "position_embedding", "transformer"},
    "initialization": {"anchors", "heads", "transformer"},
    "resizing": {"heads", "initialization"},
    "class_loss": set(),
    "denoising": {"boxes"},
    "dense_supervision": {"boxes", "heads", "loss"},
    "matcher": {"boxes", "class_loss"},
    "post_processing": {"boxes"},
    "loss": {"boxes", "class_loss", "denoising", "matcher"},
    "images": set(),
    "image_processing_hf_detr": {"boxes", "images", "post_processing"},
    "outputs": set(),
    "preparation": set(),
    "pretrained": {"configuration_hf_detr"},
    "modeling_hf_detr": {
        "anchors", "backbone", "configuration_hf_detr", "denoising", "dense_supervision", "heads", "initialization",
        "loss", "outputs", "position_embedding", "preparation", "pretrained", "resizing", "transformer",
    },
    "pipeline_hf_detr": {"image_processing_hf_detr", "images", "post_processing"},
}  # fmt: skip
TRAVELLING = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_every_root_file_has_a_rule():
    assert set(TRAVELLING) == set(MAY_IMPORT)


@pytest.mark.parametrize("name", TRAVELLING)
def test_root_files_import_each_other_only_as_from_dot_name(name):
    for node in imports(PACKAGE / f"{name}.py"):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("hf_detr") for alias in node.names)
        elif node.level:
            assert node.level == 1, "from ..x does not travel"
            assert node.module, "from . import x saves silently and fails on load"
            assert "." not in node.module, "from .sub.mod does not travel"
            assert node.module in MAY_IMPORT[name], f"{name} may not import {node.module}"
        else:
            assert not (node.module or "").startswith("hf_detr"), "from hf_detr.x is not copied"


@pytest.mark.parametrize("name", TRAVELLING)
def test_no_docstring_line_looks_like_a_relative_import(name):
    source = (PACKAGE / f"{name}.py").read_text()
    real = {node.lineno for node in imports(PACKAGE / f"{name}.py")}
    for number, line in enumerate(source.splitlines(), start=1):
        if re.match(r"\s*(from|import)\s+\.", line):
            assert number in real, f"{name}.py:{number} would be copied as an import"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/*.py")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_the_toolbox_imports_the_root_by_relative_names(path):
    for node in imports(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level <= 2
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not any(name.startswith("hf_detr") for name in names)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_use_public_names(path):
    public = {"hf_detr"} | {f"hf_detr.{d.name}" for d in PACKAGE.iterdir() if (d / "__init__.py").exists()}
    for node in imports(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_detr"):
            assert node.module in public, f"{path.name} imports from {node.module}"
            assert not any(alias.name.startswith("_") for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda p: p.parent.name)
def test_toolbox_packages_list_their_names(path):
    tree = ast.parse(path.read_text())
    imported = {alias.asname or alias.name for node in imports(path) for alias in node.names}
    listed = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    assert imported == set(ast.literal_eval(listed))
