"""The structure: imports go downwards, the table in CONTRIBUTING is true, files and functions stay short."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastalign"
FILES = sorted([*PACKAGE.rglob("*.py"), *PACKAGE.glob("kernels/*.py")])  # rglob does not follow links

# Each package may import from the packages after it, and from itself.
LAYERS = [
    {"__main__", "api"},
    {"train"},
    {"probe", "classify", "report", "doctor", "scan", "recipes"},
    {"compat", "evaluation", "export"},
    {"training"},
    {"config"},
    {"method", "data"},
    {"backbones"},
    {"ops"},
    {"kernels", "utils"},
]
MAX_LINES, MAX_FUNCTION = 300, 60


def layer(name: str) -> int:
    return next(index for index, packages in enumerate(LAYERS) if name in packages)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """The modules of fastalign that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fastalign":
            found |= {f"fastalign.{alias.name}" for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastalign."):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("fastalign.")}
    return found


@pytest.mark.parametrize("path", [p for p in FILES if p != PACKAGE / "__init__.py"], ids=module_of)
def test_imports_go_downwards(path):
    here = module_of(path).split(".")[1]
    for module in imported(path):
        there = module.split(".")[1]
        assert there == here or layer(there) > layer(here), f"{module_of(path)} must not import {module}"


def test_contributing_lists_every_package():
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Architecture")[2].partition("## Rules")[0]
    named = set(re.findall(r"^\| `([^`]+)`", table, re.M))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    packages = set()
    for path in map(Path, tracked.stdout.split()):
        if path.parts[0] == "fastalign" and path.suffix == ".py" and path.name != "__init__.py":
            packages.add("/".join(path.parts[:2]) + ("/" if len(path.parts) > 2 else ""))
        elif len(path.parts) > 1 and path.parts[0] != "fastalign" and not path.parts[0].startswith("."):
            packages.add(path.parts[0] + "/")
    assert named == packages


def test_the_files_that_documents_name_are_there():
    named = r"(?<![\w/.])(?:tests|examples|configs|docs|benchmarks)/[\w./-]+\.\w+"
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("demo/*.md")]:
        text = page.read_text()
        places = {ROOT / name for name in re.findall(named, text) if "NAME" not in name}
        places |= {page.parent / link for link in re.findall(r"\]\((?!http)([^)#]+)\)", text)}
        assert not [place for place in places if not place.exists()], page.name


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_are_short_and_documented(path):
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_LINES
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION, f"{path.name}: {node.name} is long"
            public = node in tree.body and not node.name.startswith("_")
            assert ast.get_docstring(node) or not public, f"{path.name}: {node.name}"


@pytest.mark.parametrize("target", ["install", "demo", "clean"])
def test_make_only_clears_a_virtual_environment(tmp_path, target):
    """`install` recreates the virtual environment when its Python does not start; the fake Python logs its calls."""
    python, calls, venv = tmp_path / "python", tmp_path / "calls", tmp_path / "venv"
    python.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexit 1\n')
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        (tmp_path / name).touch()
    venv.mkdir()
    (venv / "thesis").touch()

    def make(venv: str) -> subprocess.CompletedProcess:
        command = ["make", "-s", target, f"PYTHON={python}", f"FASTALIGN_VENV={venv}"]
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    for spelling in (str(venv), "~/venv", f"{venv} 2"):
        refused = make(spelling)
        assert refused.returncode
        assert f"FASTALIGN_VENV={spelling} " in refused.stderr
        assert "name another" in refused.stderr
    assert (venv / "thesis").exists()
    assert not calls.exists()
    (venv / "pyvenv.cfg").touch()
    make(str(venv))
    if target == "clean":
        assert not venv.exists()
    else:
        assert calls.read_text() == f"-m venv --clear {venv}\n"


# Imported where they are needed: each takes a second, or is optional.
HEAVY = "timm torchvision torch._dynamo torch.distributed.tensor nvidia.dali tensorboard transformers"
HELP = """
import sys
from fastalign.__main__ import main
for command in ("train", "probe", "classify", "scan", "report"):
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0
print(*sys.modules)
"""


def test_help_imports_nothing_heavy():
    printed = subprocess.check_output([sys.executable, "-c", HELP], cwd=ROOT, text=True)
    found = set(printed.splitlines()[-1].split())
    assert "torch" in found
    assert not found & {*HEAVY.split(), "matplotlib"}


def test_no_package_hides_another_projects_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (PACKAGE / "kernels").is_symlink()
    assert (PACKAGE / "kernels").resolve() == ROOT / "kernels"
