"""The kernels at the shapes of training, for `benchmarks.kernels`, `benchmarks.attention` and `benchmarks.aot`.

A case has inputs, the kernel and its reference (both called with the inputs as keyword arguments), and the least
bytes and operations of a forward and a backward pass, from the formulas in the kernel's file. Dtypes are those of
training under autocast: activations in bf16; parameters, targets and the residual stream in fp32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module

import torch
from torch import Tensor

from fastalign.ops import reference

MODELS = {
    "B/16-224": {"batch": 256, "patches": 196, "prefix": 1, "width": 768, "heads": 12},
    "L/14-336": {"batch": 32, "patches": 576, "prefix": 1, "width": 1024, "heads": 16},
    "SO400M/14-384": {"batch": 16, "patches": 729, "prefix": 0, "width": 1152, "heads": 16},
}
COPIES = 3


@dataclass
class Case:
    """One operation at one shape."""

    name: str
    label: str
    batch: int
    inputs: Callable[[int, str], dict]
    """(batch, device) -> the keyword arguments."""
    leaves: tuple[str, ...]
    """The inputs with a gradient."""
    bytes: Callable[[int], tuple[int, int]]
    """batch -> the least bytes moved forward and backward."""
    operations: Callable[[int], tuple[int, int]] = lambda batch: (0, 0)
    compiles: bool = True
    """torch.compile makes one graph of the reference."""
    options: dict = field(default_factory=dict)
    """For other implementations: the cap, the packing, the length."""
    kernel: Callable | None = None

    def __post_init__(self):
        self.reference = getattr(reference, self.name)
        self.kernel = self.kernel or getattr(import_module(f"fastalign.kernels.{self.name}"), self.name)

    def build(self, device: str, batch: int = 2) -> dict:
        """Inputs on a device."""
        inputs = self.inputs(batch, device)
        for name in self.leaves:
            inputs[name].requires_grad_()
        return inputs

    def backward(self, inputs: dict, outputs: Tensor, cotangents: list[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of the leaves."""
        return torch.autograd.grad([outputs], [inputs[name] for name in self.leaves], cotangents)

    def run(self, device: str, batch: int = 2) -> None:
        """One forward and backward pass of the kernel, with cotangents of ones."""
        inputs = self.build(device, batch)
        outputs = self.kernel(**inputs)
        self.backward(inputs, outputs, [torch.ones_like(outputs)])


def _random(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _visible(batch: int, patches: int, device: str) -> Tensor:
    sample = torch.rand(batch, patches, device=device) < torch.rand(batch, 1, device=device)
    return torch.stack([sample, ~sample, torch.ones_like(sample)], 1)


def _row_cases(model: str, batch: int, patches: int, prefix: int, width: int, heads: int) -> Iterator[Case]:
    """The operations on tokens, and the loss."""
    tokens, present = prefix + patches, 2 * patches + 3 * prefix

    def masked(b: int, device: str) -> dict:
        return {
            "patches": _random(b, patches, width, device=device),
            "hidden": _random(width, device=device),
            "visible": _visible(b, patches, device),
            "prefix": _random(prefix, width, device=device, dtype=torch.float32) if prefix else None,
            "position": _random(patches, width, device=device, dtype=torch.float32),
        }

    def expanded(b: int, device: str) -> dict:
        return {
            "tokens": _random(b, tokens, width, device=device),
            "visible": _visible(b, patches, device),
            "position": _random(1, tokens, width, device=device, dtype=torch.float32),
        }

    def packed(b: int, device: str) -> dict:
        inputs = masked(b, device)
        inputs["packing"] = reference.pack_masks(inputs.pop("visible"), prefix, b * present)
        inputs.pop("hidden")
        return inputs

    def unpacked(b: int, device: str) -> dict:
        packing = packed(b, device)["packing"]
        return {"packed": _random(b * present, width, device=device), "packing": packing}

    def compared(loss: str) -> Callable[[int, str], dict]:
        return lambda b, device: {
            "prediction": _random(b, COPIES, tokens, width, device=device),
            "target": _random(b, COPIES, tokens, width, device=device, dtype=torch.float32),
            "visible": _visible(b, patches, device),
            "loss": loss,
            "scale": torch.full((), 0.7, device=device),
        }

    def moved(rows: int) -> Callable[[int], tuple[int, int]]:
        return lambda b: (b * width * (2 * patches + 4 * rows),) * 2

    def of_unpack(b: int) -> tuple[int, int]:
        return 2 * b * width * (present + COPIES * tokens), 4 * b * width * present

    def of_loss(b: int) -> tuple[int, int]:  # forward writes the gradient; backward has nothing left to do
        return 8 * b * COPIES * tokens * width, 0

    yield Case("mask_tokens", model, batch, masked, ("patches", "position"), moved(COPIES * tokens))
    yield Case("expand_masked", model, batch, expanded, ("tokens", "position"), moved(COPIES * tokens))
    yield Case("pack", model, batch, packed, ("patches", "position"), moved(present))
    yield Case("unpack", model, batch, unpacked, ("packed",), of_unpack)
    for loss in ("mse", "cosine", "masked_mse"):
        label, inputs = f"{model} {loss}", compared(loss)
        yield Case("reconstruction_loss", label, batch, inputs, ("prediction",), of_loss)


def attention_case(
    label: str, batch: int, length: int, heads: int, width: int, softcap: float | None,
    packed: bool = False, dtype: torch.dtype = torch.bfloat16,
) -> Case:  # fmt: skip
    """Attention over [batch, heads, length, width], with q, k and v in the layout of the projection."""

    def inputs(b: int, device: str) -> dict:
        q, k, v = _random(b, length, 3, heads, width, device=device, dtype=dtype).permute(2, 0, 3, 1, 4)
        q.mul_(4)  # logits up to about 20, so that a missing cap is detected
        options = {"softcap": softcap}
        if packed:  # each sequence is cut in two, as a mask and its complement cut an image
            starts = length * torch.arange(b, device=device)
            cuts = starts + torch.randint(0, length + 1, (b,), device=device)
            bounds = torch.stack([starts, cuts], 1).flatten()
            bounds = torch.nn.functional.pad(bounds, (0, 1), value=b * length).int()
            options |= {"cu_seqlens": bounds, "max_seqlen": length}
            q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        return {"q": q.detach(), "k": k.detach(), "v": v.detach(), **options}

    # Two random parts of a sequence of length T have 2/3 of its squared length.
    share = 2 / 3 if packed else 1.0
    square = share * heads * width * length * length
    kind = ("cap" if softcap else "plain") + (" packed" if packed else "")
    return Case(
        "softcap_attention", f"{label} T {length} d {width} {kind}".lstrip(), batch, inputs, ("q", "k", "v"),
        # q, k, v and out; then those, the gradient of out and the three of q, k and v.
        bytes=lambda b: tuple(n * dtype.itemsize * b * heads * length * width for n in (4, 8)),
        operations=lambda b: (int(4 * b * square), int(10 * b * square)),
        compiles=not packed,  # a loop over sequences whose lengths are data
        options={"softcap": softcap, "packed": packed, "length": length, "width": width},
    )  # fmt: skip


def _cases() -> Iterator[Case]:
    for model, shape in MODELS.items():
        yield from _row_cases(model, **shape)
    for model, shape in MODELS.items():
        length, width = shape["prefix"] + shape["patches"], shape["width"] // shape["heads"]
        for softcap in (30.0, None):
            yield attention_case(model, shape["batch"], length, shape["heads"], width, softcap)
    for softcap in (30.0, None):
        yield attention_case("B/14-224", 128, 257, 12, 64, softcap)
        yield attention_case("B/16-224", 512, 197, 12, 64, softcap, packed=True)
        yield attention_case("L/14-336", 64, 577, 16, 64, softcap, packed=True)
    for width in (32, 80, 96, 128):
        for softcap in (30.0, None):
            yield attention_case("other widths", 64, 257, 12, width, softcap)
    for width in (64, 80, 96, 128):
        yield attention_case("fp32", 64, 257, 12, width, 30.0, dtype=torch.float32)
    yield attention_case("fp16", 64, 257, 12, 64, 30.0, dtype=torch.float16)


CASES = list(_cases())

TINY_CASES = [
    *_row_cases("tiny", batch=2, patches=5, prefix=1, width=24, heads=2),
    attention_case("tiny", 2, 18, 2, 16, 30.0),
    attention_case("tiny", 2, 18, 2, 16, None, packed=True),
]
"""Every operation at a tiny size, for checks without a GPU."""


def _one_row(b: int, device: str) -> dict:
    row = {name: _random(1, 1, 1, 8, device=device) for name in ("prediction", "target")}
    return row | {"visible": torch.ones(1, 1, 1, dtype=torch.bool, device=device)}


DEGENERATE_CASES = [
    *_row_cases("one", batch=1, patches=1, prefix=0, width=1, heads=1),
    attention_case("one", 1, 1, 1, 1, 30.0),
    attention_case("one", 1, 1, 1, 1, None, packed=True),
    Case("reconstruction_loss", "one row", 1, _one_row, ("prediction",), lambda b: (0, 0)),
]
"""Sizes of one, which Triton compiles as constants, for `benchmarks.aot`."""
