"""`python -m fastalign.compat run`: a script of the authors' kind on our parts."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastalign.compat.__main__ as command

ROOT = Path(__file__).parents[2]

SCRIPT = """
import argparse, timm, torch, yaml
import locality_alignment.backbones.svit
from locality_alignment import MaskEmbedDecoder, MaskEmbedStudent, UniformMaskSampler
from locality_alignment import convert_to_student_model, convert_to_teacher_model
from locality_alignment.loss_utils import UniformMaskSampler as Same

assert Same is UniformMaskSampler
first, parser = argparse.ArgumentParser(), argparse.ArgumentParser()
first.add_argument("--config")
parser.add_argument("--steps", type=int, default=1)
parser.add_argument("--lr", type=float)
parser.add_argument("--model")
parser.add_argument("--model-kwargs")
config, rest = first.parse_known_args()
parser.set_defaults(**yaml.safe_load(open(config.config)))
args = parser.parse_args(rest)
torch.manual_seed(0)
options = dict(num_classes=0, **args.model_kwargs)
teacher = convert_to_teacher_model(timm.create_model(args.model, **options), skip_blocks=1)
encoder = convert_to_student_model(timm.create_model('s' + args.model, **options), output_dim=192)
student = MaskEmbedStudent(encoder, MaskEmbedDecoder(192, 3, 4, 1, 192, 2))
sampler = UniformMaskSampler(4, False, True)
images = torch.randn(2, 3, 32, 32)
optimizer = torch.optim.AdamW(student.parameters(), args.lr)
for _ in range(args.steps):
    mask = sampler(2)
    target = teacher(images.repeat_interleave(len(mask) // 2, 0), mask).detach()
    loss = torch.nn.functional.mse_loss(student(images, mask), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print("loss", len(mask), loss.item())
"""
OPTIONS = """
model: vit_tiny_patch16_224
model_kwargs: {img_size: 32, depth: 2}
lr: 1e-3
steps: 9
"""


@pytest.mark.slow
def test_run_a_script_with_its_yaml_file(tmp_path):
    script, config = tmp_path / "train.py", tmp_path / "their.yaml"
    script.write_text(SCRIPT)
    config.write_text(OPTIONS)
    line = [sys.executable, "-m", "fastalign.compat", "run", script, "--config", config, "--steps", "2"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    losses = [line.split() for line in result.stdout.splitlines() if line.startswith("loss")]
    assert [line[1] for line in losses] == ["4", "4"]
    assert 0 < float(losses[1][2]) < float(losses[0][2]) < 3


LOAD = """
import sys, torch, fastalign.compat.locality_alignment as la
la.load_checkpoint(torch.nn.Linear(1, 1), sys.argv[1])
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "usage"),
        ("walk x.py", "invalid choice: 'walk'"),
        ("run gone.py", "gone.py is not a file"),
        ("run load.py broken.pth", "damaged, cut short or not a weights file"),
        ("run load.py gone.pth", "No such file"),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("load.py").write_text(LOAD)
    Path("broken.pth").write_bytes(b"not a zip file")
    monkeypatch.setattr(command, "install", lambda: None)
    monkeypatch.setattr(sys, "argv", []), monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="2"):
        sys.exit(command.main(arguments.split()))
    assert message in capsys.readouterr().err
