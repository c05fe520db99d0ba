"""The same batch on 1, 2 and 4 ranks: the same samples, pixels and masks, and losses equal to rounding."""

import functools
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

import fastalign as fa
from fastalign.method import objectives
from fastalign.ops.reference import LOSSES
from fastalign.utils.random import EVAL_EPOCH
from tests.data_helpers import needs_dali
from tests.numerics import randomise, relative_error
from tests.reliability.crash import MODEL, finish, write_recipe
from tests.run_helpers import losses


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("world"))


def record(folder: Path) -> None:
    """A rank records its training batches in order: a line each of samples, pixels and masks."""
    draw, path = objectives.Objective.draw, folder / f"seen-{os.environ['RANK']}.jsonl"
    path.unlink(missing_ok=True)

    def recording(self, images, sample_ids, epoch):
        visible, packing = draw(self, images, sample_ids, epoch)
        if epoch != EVAL_EPOCH:
            rows = zip(sample_ids.tolist(), map(digest, images), map(digest, visible), strict=True)
            with path.open("a") as file:
                file.write(json.dumps([epoch, *rows]) + "\n")
        return visible, packing

    objectives.Objective.draw = recording


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def seen(folder: Path, size: int) -> list[list]:
    """The samples of all ranks at each step, in the order of their ids."""
    ranks = [(folder / f"seen-{rank}.jsonl").read_text().splitlines() for rank in range(size)]
    steps = []
    for lines in zip(*ranks, strict=True):
        parts = [json.loads(line) for line in lines]
        steps.append([parts[0][0], *sorted(row for part in parts for row in part[1:])])
    return steps


@pytest.mark.slow
@needs_dali
@pytest.mark.parametrize("loss", ["mse", "masked_mse"])
def test_one_two_and_four_ranks_have_the_same_samples_masks_and_pixels(recipe, tmp_path, loss):
    """Bit for bit, with losses equal to rounding; also if a run moves from 2 ranks to 4 and then to 1."""
    legs = {"one": [(1, 14)], "two": [(2, 14)], "four": [(4, 14)], "mixed": [(2, 5), (4, 9), (1, 14)]}
    found = {}
    for name, parts in legs.items():
        run, found[name] = tmp_path / name, []
        for size, step in parts:
            arguments = [str(recipe), f"output={run}", f"max_steps={step}", f"loss.name={loss}"]
            finish(arguments, size, folder=tmp_path, prepare=functools.partial(record, tmp_path))
            found[name] += seen(tmp_path, size)
    assert len(found["one"]) == 28
    assert all(len(step) == 5 for step in found["one"])
    for name in legs:
        assert found[name] == found["one"], name
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-6), name


@pytest.mark.parametrize("mode", ["zero", "drop"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_a_batch_is_the_mean_over_its_parts(loss, mode):
    """What ranks and accumulation rely on, for the loss and for its gradient."""
    vit = fa.create_backbone("vit_tiny_patch16_224", **MODEL)
    student = fa.MaskEmbedStudent.from_backbone(vit)
    step = fa.MaskEmbed(fa.MaskedTeacher(vit, masking=mode), student, fa.UniformMasks(), loss).double()
    randomise(step)
    images, ids, found = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.arange(8), {}
    for parts in (1, 2, 4):
        step.zero_grad()
        total = 0.0
        for part in torch.arange(8).chunk(parts):
            value = step(images[part], ids[part]) / parts
            value.backward()
            total += value.item()
        found[parts] = (total, torch.cat([p.grad.flatten() for p in student.parameters()]))
    for parts in (2, 4):
        assert found[parts][0] == pytest.approx(found[1][0], rel=1e-12)
        assert relative_error(found[parts][1], found[1][1]) < 1e-12
