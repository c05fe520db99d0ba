"""List installed packages and kernels, and what would be faster: ``fastalign doctor``.

It ends with a smoke test, a training step on each type of device; the exit code is 1 if one fails.
"""

import argparse
import os
import platform
import sys
from importlib import metadata

import torch

from fastalign import ops
from fastalign.backbones.precision import autocast, compute_dtype, has_bf16
from fastalign.backbones.zoo import create_backbone
from fastalign.method.masks import UniformMasks
from fastalign.method.objectives import MaskEmbed
from fastalign.method.student import MaskEmbedStudent
from fastalign.method.teacher import MaskedTeacher
from fastalign.ops import extension
from fastalign.ops.attention import BACKENDS, Case, choose
from fastalign.training.command import run_command
from fastalign.utils.errors import on_one_line

PARTS = {
    "student, soft-capped": {"capped": True, "packed": False, "gradient": True},
    "student without a cap, decoder": {"capped": False, "packed": False, "gradient": True},
    "teacher": {"capped": False, "packed": False, "gradient": False},
    "decoder, mode drop": {"capped": False, "packed": True, "gradient": True},
    "teacher, mode drop": {"capped": False, "packed": True, "gradient": False},
}
"""The parts of a step whose attention is reported."""

PACKAGES = {
    "torch": "tested with 2.11.0 and 2.14.1",
    "torchvision": "tested with 0.26.0 and 0.29.1",
    "triton": "kernels; tested with 3.6.0 and 3.8.0",
    "timm": "tested with 1.0.31",
    "nvidia-dali-cuda130": "reading images; not the package nvidia-dali; tested with 2.4.0",
    "nvidia-dali-cuda120": "the same for CUDA 12",
    "transformers": "export; tested with 5.23.0 and 5.24.0",
    "tensorboard": "log.to=[tensorboard]",
    "wandb": "log.to=[wandb:PROJECT]",
}
"""What each package is for; the versions are those of constraints.txt and constraints-newest.txt."""


def version(package: str) -> str | None:
    """The installed version of a distribution; None = not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> list[str]:
    """Python and the devices."""
    bf16 = "with" if has_bf16(torch.device("cpu")) else "without"
    cpu = f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads, {bf16} bf16 instructions"
    lines = [f"python {platform.python_version()}", cpu]
    if not torch.cuda.is_available():
        lines.append(f"GPU: none found; torch is built for CUDA {torch.version.cuda}")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        lines.append(f"GPU {index}: {gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}")
    return lines


def packages() -> list[str]:
    """The installed versions, and what each package is for."""
    return [f"{name}: {version(name) or 'not installed'} ({about})" for name, about in PACKAGES.items()]


def operations() -> list[str]:
    """The implementation of each operation on a GPU and on a CPU, with the reason."""
    kernels = "Triton" if version("triton") else "eager PyTorch, slower: triton is not installed"
    kernels = "eager PyTorch: FASTALIGN_KERNELS=0" if ops.MODE == "0" else kernels
    masks = "extension" if extension.available(torch.device("cpu")) else "PyTorch"
    lines = [f"masked copies, decoder input, packing, loss: on a GPU {kernels}, on a CPU eager PyTorch"]
    lines.append(f"masks: {masks} ({extension.status()})")
    if torch.cuda.is_available() and not extension.available(torch.device("cuda")):
        lines.append("  faster: install the CUDA toolkit of torch's version, then fastalign again")
    return lines


def attention() -> list[str]:
    """The implementation of attention in each part of a step, with the reason."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, lines = compute_dtype("auto", torch.device(device)), []
    for part, kind in PARTS.items():
        case = Case(device, dtype, length=577, width=64, biased=False, **kind)
        lines.append("{}: {} ({})".format(part, *choose(case)))
    installed = [name for name, backend in BACKENDS.items() if not backend.missing()]
    lines.append(f"installed: {', '.join(installed)}")
    return lines + [f"{name} {why}" for name, backend in BACKENDS.items() if (why := backend.missing())]


def smoke(device: str) -> str:
    """Run a step of a tiny soft-capped model in both modes; returns the line to print."""
    vit = create_backbone("vit_tiny_patch16_224", img_size=64, depth=2)
    student = MaskEmbedStudent.from_backbone(vit)
    dtype = compute_dtype("auto", torch.device(device))
    for masking in ("zero", "drop"):
        objective = MaskEmbed(MaskedTeacher(vit, masking=masking), student, UniformMasks()).to(device)
        images, ids = torch.randn(2, 3, 64, 64, device=device), torch.arange(2, device=device)
        with autocast(torch.device(device), dtype):
            loss = objective(images, ids)
        loss.backward()
        if not 0 < loss.item() < float("inf"):
            raise ArithmeticError(f"a loss of {loss.item()} in mode {masking}")
    return f"a step on the {device} in {str(dtype).removeprefix('torch.')}: mode zero, mode drop"


def report() -> None:
    """Print the report; exit with code 1 if a smoke test fails."""
    for section in (machine, packages, operations, attention):
        print(f"{section.__name__}\n  " + "\n  ".join(section()))
    print("smoke test")
    code = 0
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        try:
            line = f"ok: {smoke(device)}"
        except Exception as error:  # of any class: the report must be complete
            line, code = f"FAILED on the {device}: {type(error).__name__}: {on_one_line(str(error))}", 1
        print(f"  {line}")
    if code:
        sys.exit(code)


def main(arguments: list[str] | None = None) -> int:
    """The command. Ends with code 1 if a smoke test fails."""
    about = "List installed packages and kernels, and run one training step."
    argparse.ArgumentParser(prog="fastalign doctor", description=about).parse_args(arguments)
    return run_command(report)


if __name__ == "__main__":
    sys.exit(main())
