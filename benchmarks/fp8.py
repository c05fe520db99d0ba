"""What lower precision does to the teacher's targets: ``python -m benchmarks.fp8 [--backbones NAME ...]``.

Targets with the matrices in bf16 and in FP8 (`MaskedTeacher.store_as`) against fp32, in mode zero and drop: the
relative error in the Euclidean norm, and the mean square error over the variance of the targets, which is what it
adds to a loss that starts at 1.33. The demo's trained teacher on its validation pictures (rendered by ``make
demo``), and backbones with random weights on random images. Writes `benchmarks/results/fp8.json`. On a GPU the FP8
products are its own, elsewhere the reference's.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor

import fastalign as fa
from benchmarks import record
from fastalign.backbones.vit import ViT
from fastalign.config import load_config
from fastalign.training.build import build_backbones, evaluation_loader
from fastalign.training.distributed import World

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "configs" / "demo.yaml"
PRECISIONS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def demo_batch(device: torch.device, images: int) -> tuple[ViT, Tensor]:
    """The demo's trained teacher and pictures of its validation set."""
    config = load_config(
        DEMO, [f"student.weights={ROOT / 'demo' / 'teacher.safetensors'}", f"optim.batch_size={images}"]
    )
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
    # Padding is no target. In mode zero there is none.
    chosen = packing.indices >= 0 if masking == "drop" else slice(None)
    exact, rows = teacher(images, visible, packing)[chosen].double(), []
    for name, dtype in PRECISIONS.items():
        stored = copy.deepcopy(teacher).store_as(dtype)
        with torch.autocast(images.device.type, torch.bfloat16):
            difference = stored(images, visible, packing)[chosen].double() - exact
        rows.append(
            {
                "masking": masking,
                "precision": name,
                "relative_error": (difference.norm() / exact.norm()).item(),
                "error_over_variance": (difference.square().mean() / exact.var()).item(),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8", description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="*", default=["vit_small_patch16_224"], help="timm names")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: checks that it runs")
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
            print(
                f"without the demo's teacher: {error}; python -m demo.mosaics --out demo/data renders its pictures"
            )
    rows = []
    for name, (vit, images) in batches.items():
        for masking in ("zero", "drop"):
            rows += [{"backbone": name, "images": len(images), **row} for row in errors(vit, images, masking)]
    for row in rows:
        print(
            f"{row['backbone']:26} {row['masking']:5} {row['precision']:5} relative error "
            f"{row['relative_error']:.2e}  over variance {row['error_over_variance']:.2e}"
        )
    if not options.tiny:
        record.write("fp8", rows)
    return rows


if __name__ == "__main__":
    main()
