"""The package: what `import fastalign` needs, the wheel, the editable install, `fastalign` and `fa.align`."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from setuptools import build_meta

import fastalign as fa
from fastalign import __main__, __version__, train
from tests.run_helpers import MODEL

ROOT = Path(__file__).parents[1]

ALONE = """
import sys
if sys.argv[1] == "without":
    sys.modules["triton"] = None
import torch
import fastalign as fa
print(list(fa.masks.UniformMasks(seed=0)(torch.arange(2), 4).shape))
q = torch.randn(1, 2, 5, 8)
print(list(fa.ops.softcap_attention(q, q, q, softcap=3.0).shape))
try:
    print(fa.kernels.pack.pack.__module__)
except AttributeError as error:
    print(f"AttributeError: {error}")
print([name for name in sys.modules if name.startswith(("nvidia.dali", "timm"))])
try:
    fa.kernels.softcap_attention.softcap_attention(q, q, q)
except (AttributeError, ValueError) as error:
    print(error)
"""


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    """What a new Python prints."""
    command, environment = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.check_output(command, cwd=cwd, env=environment, text=True)


@pytest.mark.parametrize("triton", ["with", "without"])
def test_kernels_and_masks_alone(triton):
    """On the CPU and without Triton's interpreter, where a kernel names the function to call instead."""
    printed = python("-c", ALONE, triton, TRITON_INTERPRET="0")
    masks, attention, pack, heavy, refusal = printed.splitlines()
    assert (masks, attention, heavy) == ("[2, 3, 4]", "[1, 2, 5, 8]", "[]")
    assert pack.startswith("fastalign.kernels.pack" if triton == "with" else "AttributeError")
    assert triton == "without" or "fastalign.ops" in refusal


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tracked files, because a build writes into its folder."""
    folder = tmp_path_factory.mktemp("clone") / "fastalign"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    return folder


def build(source, kind, out, monkeypatch) -> Path:
    monkeypatch.chdir(source)
    monkeypatch.setenv("FASTALIGN_BUILD_EXT", "0")
    return out / getattr(build_meta, f"build_{kind}")(str(out))


def test_the_wheel_works_away_from_the_clone(source, tmp_path, monkeypatch):
    wheel = build(source, "wheel", tmp_path, monkeypatch)
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
        assert "fastalign/py.typed" in file.namelist()
        scripts = next(name for name in file.namelist() if name.endswith("entry_points.txt"))
        assert "fastalign = fastalign.__main__:main" in file.read(scripts).decode()
    for arguments in (["recipes"], ["train", "clip-vit-b", "data.train=/data", "--print-config"]):
        site = {"PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "120"}
        printed = python("-m", "fastalign", *arguments, cwd=tmp_path, **site)
        assert "vit_base_patch16_clip_quickgelu_224.openai" in printed


def test_a_script_beside_an_editable_clone_imports_it(source, tmp_path, monkeypatch):
    """Python finds the folder of the clone first, as a namespace package: only a path entry takes precedence."""
    with zipfile.ZipFile(build(source, "editable", tmp_path, monkeypatch)) as wheel:
        (entry,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        path = wheel.read(entry).decode().strip()
    assert path == str(source)
    others = [place for place in sys.path if not Path(place, "fastalign/__init__.py").exists()]
    code = f"import sys; sys.path += {[*others, path]!r}; import fastalign; print(fastalign.__file__)"
    printed = python("-S", "-c", code, cwd=source.parent, PYTHONPATH="")
    assert printed.strip() == str(source / "fastalign/__init__.py")


@pytest.mark.parametrize("arguments", [["recipes"], ["train", "in1k-vit-t", "--print-config"]])
def test_a_reader_that_has_ended_ends_the_command(arguments):
    """As in `fastalign recipes | head`."""
    command, pipe = [sys.executable, "-u", "-m", "fastalign", *arguments], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()
        assert process.stderr.read().startswith("fastalign: stopped: the process that reads the output")
    assert process.returncode == 141


def test_the_command(capsys):
    assert __main__.main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["fastalign", __version__]
    assert __main__.main(["trian"]) == 2
    assert "train" in capsys.readouterr().err
    for command in __main__.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            __main__.main([command, "--help"])
        assert stop.value.code == 0
        assert f"usage: fastalign {command}" in capsys.readouterr().out


def test_align_is_the_command(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    tree = {"student": MODEL, "optim": {"batch_size": 4}, "data": {"threads": 1}, "max_steps": 2}
    recipe.write_text(yaml.safe_dump(tree))
    keys = {"optim.lr": 1e-4, "optim.betas": (0.9, 0.99), "student.softcap": None}
    vit = fa.align(recipe, data="synthetic:16", output=tmp_path / "python", **keys)
    command = ["data.train=synthetic:16", f"output={tmp_path / 'shell'}", "optim.lr=1.0e-4"]
    assert train.main([str(recipe), *command, "optim.betas=[0.9, 0.99]", "student.softcap=null"]) == 0
    images = torch.randn(2, 3, 32, 32)
    expected = fa.load_backbone(tmp_path / "shell").forward_features(images)
    assert torch.equal(vit.forward_features(images), expected)
    again = fa.align(recipe, data="synthetic:16", output=tmp_path / "python", **keys)
    assert torch.equal(again.forward_features(images), expected)
