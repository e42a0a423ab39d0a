"""Where a file lives: `model/` is what travels with a pushed checkpoint, the toolbox is everything else."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_detr"
MODEL = PACKAGE / "model"
TRAVELLING = sorted(path.stem for path in MODEL.glob("*.py") if path.stem != "__init__")
# what transformers saves with a checkpoint: the files of the registered classes
PUSHED = ("configuration_hf_detr", "modeling_hf_detr", "segmentation", "image_processing_hf_detr")


def imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]


def exports_of(init: Path) -> set[str]:
    """The names that a package takes from its modules."""
    own = [node for node in imports(init) if isinstance(node, ast.ImportFrom) and node.level]
    return {alias.asname or alias.name for node in own for alias in node.names}


def relative_imports(name: str) -> set[str]:
    nodes = imports(MODEL / f"{name}.py")
    return {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level}


def test_everything_in_model_is_pushed_and_nothing_else_is():
    closure, waiting = set(), list(PUSHED)
    while waiting:
        name = waiting.pop()
        if name not in closure:
            closure.add(name)
            waiting += relative_imports(name)
    assert closure == set(TRAVELLING)
    assert not [path for path in MODEL.iterdir() if path.is_dir() and path.name != "__pycache__"], "model/ is flat"


@pytest.mark.parametrize("name", TRAVELLING)
def test_model_files_import_each_other_only_as_from_dot_name(name):
    for node in imports(MODEL / f"{name}.py"):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("hf_detr") for alias in node.names)
        elif node.level:
            assert node.level == 1, "from ..x does not travel, and is the toolbox"
            assert node.module, "from . import x saves silently and fails on load"
            assert node.module in TRAVELLING, f"{name} imports {node.module}, which is not in model/"
        else:
            assert not (node.module or "").startswith("hf_detr"), "from hf_detr.x is not copied"
    real = {node.lineno for node in imports(MODEL / f"{name}.py")}
    for number, line in enumerate((MODEL / f"{name}.py").read_text().splitlines(), start=1):
        if re.match(r"\s*(from|import)\s+\.", line):
            assert number in real, f"{name}.py:{number}: transformers would take this line for an import"


def test_model_files_import_each_other_without_circles():
    done: set[str] = set()
    while len(done) < len(TRAVELLING):
        ready = {name for name in TRAVELLING if name not in done and relative_imports(name) <= done}
        assert ready, f"a circle among {sorted(set(TRAVELLING) - done)}"
        done |= ready


def test_the_toolbox_uses_relative_imports():
    for path in PACKAGE.rglob("*.py"):
        for node in imports(path):
            if isinstance(node, ast.Import) or not node.level:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                own = path.is_relative_to(PACKAGE / "evaluation" / "coco_detection")  # runs outside the package
                assert own or not any(name.split(".")[0] == "hf_detr" for name in names), path


def test_module_names_are_unique_and_no_module_shadows_the_standard_library():
    stems = [path.stem for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    assert sorted(stems) == sorted(set(stems))
    assert not set(TRAVELLING) & set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda p: p.name)
def test_examples_use_public_names(path):
    public = {"hf_detr"} | {f"hf_detr.{d.name}" for d in PACKAGE.iterdir() if (d / "__init__.py").exists()}
    for node in imports(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_detr"):
            assert node.module in public - {"hf_detr.model"}, f"{path.name} imports from {node.module}"
            assert not any(alias.name.startswith("_") for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda p: p.parent.name)
def test_packages_list_their_names(path):
    tree = ast.parse(path.read_text())
    imported = exports_of(path)
    listed = [n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"]
    assert imported == (set(ast.literal_eval(listed[0])) if listed else set())


def test_every_export_of_a_package_is_used_by_an_example_a_benchmark_the_docs_or_another_package():
    documented = set().union(*(re.findall(r"\w+", path.read_text()) for path in (ROOT / "docs").glob("*.md")))
    sources = [
        path for name in ("examples", "benchmarks", "model_cards", "src") for path in (ROOT / name).rglob("*.py")
    ]
    for init in PACKAGE.glob("*/__init__.py"):
        exports = exports_of(init)
        used: set[str] = set()
        for path in sources:
            if not path.is_relative_to(init.parent):
                used |= {alias.name for node in imports(path) for alias in node.names}
                # imported when it is needed
                if re.search(r"import_(module|interop|hub|visualization)\(", path.read_text()):
                    used |= set(re.findall(r"\w+", path.read_text()))
        assert not exports - used - documented, (
            f"{init.parent.name} exports {sorted(exports - used)}, which nobody uses"
        )


def test_the_table_of_contents_names_every_module_of_the_model_and_every_package():
    text = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text())) or ""
    packages = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    missing = [name for name in (*TRAVELLING, *packages) if not re.search(rf"\b{name}\b", text)]
    assert not missing
