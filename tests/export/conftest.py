"""Finished runs of every family, and their exports."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import fastalign as fa
from fastalign import train
from fastalign.export.__main__ import main
from tests.export.helpers import FAMILIES, small


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Finished runs, a cap of 0.5 so that tiny models feel it, every weight moved."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(family: str, softcap: float | None = 0.5, *overrides: str) -> Path:
        key = (family, softcap, overrides)
        if key in made:
            return made[key]
        folder = root / f"{len(made)}"
        torch.manual_seed(1)
        vit = fa.create_backbone(FAMILIES[family], **small(family))
        for parameter in vit.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        torch.save(vit.state_dict(), root / f"{family}.pth")
        options = [
            f"output={folder}",
            f"student.name={FAMILIES[family]}",
            f"student.weights={root / family}.pth",
        ]
        options += [f"student.kwargs={small(family)}", f"student.softcap={json.dumps(softcap)}"]
        options += ["data.train=synthetic:24", "data.val=synthetic:4"]
        options += ["optim.batch_size=8", "optim.epochs=1", "optim.lr=0.05"]
        with torch.enable_grad():
            assert train.main([*options, *overrides]) == 0
        made[key] = folder
        return folder

    return run


@pytest.fixture
def exported(runs, tmp_path):
    """Exports a run of a family and returns the folder."""

    def export(family: str, target: str, *options: str, softcap: float | None = 0.5) -> Path:
        output = tmp_path / "export"
        assert main([str(runs(family, softcap)), "--to", target, "--output", str(output), *options]) == 0
        return output

    return export


@pytest.fixture
def damaged(runs, tmp_path):
    """A copy of a run, to be damaged."""
    return shutil.copytree(runs("clip"), tmp_path / "damaged", ignore=shutil.ignore_patterns("exports"))
