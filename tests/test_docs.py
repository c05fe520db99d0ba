"""The documentation: the site builds without a broken link, and has every public name."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastalign as fa

ROOT = Path(__file__).parents[1]
MODULES = {"kernels", "masks", "ops"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_api_page_has_every_public_name(site):
    ids = set(
        re.findall(r'id="fastalign\.(?:ops\.reference\.)?(\w+)"', (site / "api/index.html").read_text())
    )
    assert set(fa.__all__) - MODULES - {"UserError"} <= ids


def test_pages_link_to_files_of_the_repository(site):
    """Recipes and examples, which lie outside docs/, are part of the site."""
    page = (site / "recipes/index.html").read_text()
    targets = re.findall(r'href="([^"#]+\.yaml)"', page)
    assert targets
    assert all((site / "recipes" / target).is_file() for target in targets)


CLASSES = [name for name in fa.__all__ if isinstance(getattr(fa, name), type) and name != "UserError"]


@pytest.mark.parametrize("name", [*CLASSES, "ops.softcap_attention"])
def test_examples_in_docstrings(name):
    found = fa
    for part in name.split("."):
        found = getattr(found, part)
    (test,) = doctest.DocTestFinder(recurse=False).find(found, name, globs={"fa": fa, "torch": torch})
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


def test_dir_shows_public_names():
    assert dir(fa) == sorted(fa.__all__)
    assert dir(fa.ops) == sorted(fa.ops.__all__)
