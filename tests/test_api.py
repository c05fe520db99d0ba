"""`fastalign.align`: the command, from Python."""

import torch
import yaml

import fastalign as fa
from fastalign import train
from tests.run_helpers import MODEL


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
