"""Errors of the teacher's targets in lower precision: ``python -m benchmarks.fp8 [--backbones NAME ...]``.

Targets with matrices in bf16 and in FP8 (`MaskedTeacher.store_as`) against fp32, in modes zero and drop: the relative
error in the Euclidean norm, and the mean square error over the variance of the targets, which it adds to a loss that
starts at 1.33. Backbones: the demo's teacher on its validation images (rendered by ``make demo``), and random weights
on random images. Writes `benchmarks/results/fp8.json`. FP8 products are the GPU's own, or the reference's.
"""

import copy

import torch
from torch import Tensor

import fastalign as fa
from benchmarks import record
from fastalign.backbones.vit import ViT
from fastalign.config import load_config
from fastalign.training.build import build_backbones, evaluation_loader
from fastalign.training.distributed import World

ROOT = record.ROOT
DEMO = ROOT / "configs" / "demo.yaml"
PRECISIONS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def demo_batch(device: torch.device, images: int) -> tuple[ViT, Tensor]:
    """The demo's trained teacher and images of its validation set."""
    weights = ROOT / "demo" / "teacher.safetensors"
    config = load_config(DEMO, [f"student.weights={weights}", f"optim.batch_size={images}"])
    backbone, _ = build_backbones(config)
    loader = evaluation_loader(config, World(0, 1, device), backbone, str(ROOT / config.data.val))
    batches = loader.batches()
    pictures = next(batches).images.float().clone()
    batches.close(), loader.close()
    return backbone, pictures


def random_batch(name: str, device: torch.device, images: int, **kwargs) -> tuple[ViT, Tensor]:
    """A backbone with random weights, and random images."""
    torch.manual_seed(0)
    vit = fa.create_backbone(name, **kwargs)
    return vit, torch.randn(images, 3, *vit.spec.image_size, device=device)


def errors(vit: ViT, images: Tensor, masking: str) -> list[dict]:
    """A row for each precision."""
    teacher = fa.MaskedTeacher(vit, masking=masking).to(images.device)
    ids, masks = torch.arange(len(images), device=images.device), fa.UniformMasks(seed=0)
    visible, packing = masks.packed(ids, vit.spec.grid, vit.spec.prefix)
    exact, rows = teacher(images, visible, packing).double(), []  # with complements no row is padding
    for name, dtype in PRECISIONS.items():
        stored = copy.deepcopy(teacher).store_as(dtype)
        with torch.autocast(images.device.type, torch.bfloat16):
            difference = stored(images, visible, packing).double() - exact
        row = {"masking": masking, "precision": name}
        row["relative_error"] = (difference.norm() / exact.norm()).item()
        rows.append(row | {"error_over_variance": (difference.square().mean() / exact.var()).item()})
    return rows


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, write."""
    parser = record.parser("fp8", __doc__, "a tiny model")
    parser.add_argument("--backbones", nargs="*", default=["vit_small_patch16_224"], help="timm names")
    parser.add_argument("--images", type=int, default=32)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False
    if options.tiny:
        batches = {"vit_tiny_patch16_224": random_batch("vit_tiny_patch16_224", device, 2, img_size=32)}
    else:
        batches = {name: random_batch(name, device, options.images) for name in options.backbones}
        try:
            batches["demo/teacher.safetensors"] = demo_batch(device, options.images)
        except fa.UserError as error:
            print(f"skipping the demo's teacher: {error}; python -m demo.mosaics renders its images")
    rows = []
    for name, (vit, images) in batches.items():
        for masking in ("zero", "drop"):
            rows += [{"backbone": name, "images": len(images), **row} for row in errors(vit, images, masking)]
    line = "{backbone:26} {masking:5} {precision:5} relative error {relative_error:.2e}  over variance "
    for row in rows:
        print((line + "{error_over_variance:.2e}").format(**row))
    if not options.tiny:
        record.write("fp8", rows)
    return rows


if __name__ == "__main__":
    main()
