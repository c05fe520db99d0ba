"""Everything between a batch of images and a loss: MaskEmbed, and masked image modeling."""

import torch
from torch import Tensor, nn

from fastalign import ops
from fastalign.backbones.blocks import Attention, Block
from fastalign.backbones.spec import ViTSpec
from fastalign.method.student import MaskEmbedStudent, MIMStudent
from fastalign.method.teacher import MaskedTeacher
from fastalign.ops.attention import Case
from fastalign.ops.reference import LOSSES, Packing
from fastalign.utils.errors import UserError


class _Objective(nn.Module):
    """A frozen teacher, a student, a mask distribution and a loss."""

    def __init__(self, teacher: MaskedTeacher, student: nn.Module, masks, loss: str = "mse"):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        check_same_tokens(teacher.spec, student.encoder.spec)
        self.teacher, self.student, self.masks, self.loss = teacher, student, masks, loss
        self.register_buffer("target_scale", torch.ones(()))

    @property
    def num_patches(self) -> tuple[int, int]:
        """The grid of patches, rows and columns."""
        return self.teacher.spec.grid

    @property
    def masking(self) -> str:
        """What becomes of a hidden patch: "zero" or "drop"."""
        raise NotImplementedError

    @property
    def fixed_lengths(self) -> bool:
        """Whether a batch has as many tokens whatever masks are drawn.

        Else their number must be known on the host: give `forward` sample ids there, and nobody waits for the device.
        """
        return self.masking == "zero" or self.masks.complement

    def targets(self, images: Tensor, visible: Tensor, packing: Packing | None = None) -> Tensor:
        """[B, M or 1, T, D], unscaled; with `packing` [L, D] or [B, T, D]."""
        raise NotImplementedError

    def parts(self) -> dict[str, tuple[nn.Module, bool]]:
        """The transformers of a step by name, and whether each reads packed sequences."""
        raise NotImplementedError

    def attention_cases(self, device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
        """The attention of each transformer of a training step that computes in `dtype`."""
        spec, cases = self.teacher.spec, {}
        for name, (part, packed) in self.parts().items():
            for attention in (module for module in part.modules() if isinstance(module, Attention)):
                cases[name] = Case(
                    device=device.type,
                    dtype=dtype,
                    capped=attention.softcap is not None,
                    biased=attention.biased,
                    packed=packed,
                    length=spec.prefix + spec.patches,
                    width=attention.spec.width // attention.spec.heads,
                    gradient=any(parameter.requires_grad for parameter in part.parameters()),
                )
                break  # the blocks of a transformer are alike
        return cases

    def set_attention(self, backend: str) -> None:
        """Ask for an implementation of attention, one of `fastalign.ops.attention.BACKENDS`, or "auto"."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def draw(self, images: Tensor, sample_ids: Tensor, epoch: int) -> tuple[Tensor, Packing | None]:
        """The masks of a batch [B, M, N], and in mode drop how the visible tokens are packed."""
        if self.masking == "zero":
            return self.masks(sample_ids.to(images.device), self.num_patches, epoch), None
        if self.fixed_lengths:
            sample_ids = sample_ids.to(images.device)
        visible, packing = self.masks.packed(sample_ids, self.num_patches, self.teacher.spec.prefix, epoch)
        packing = Packing(*(part.to(images.device, non_blocking=True) for part in packing))
        return visible.to(images.device, non_blocking=True), packing

    def forward(self, images: Tensor, sample_ids: Tensor, epoch: int = 0) -> Tensor:
        """The loss of one batch.

        Args:
            images: [B, C, height, width], normalised.
            sample_ids: [B] int64; with `epoch` and the masks' seed they decide the masks.
            epoch: the training epoch, or `fastalign.utils.random.EVAL_EPOCH`.

        Returns:
            Scalar, fp32.
        """
        visible, packing = self.draw(images, sample_ids, epoch)
        return ops.reconstruction_loss(
            self.student(images, visible, packing),
            self.targets(images, visible, packing),
            visible,
            loss=self.loss,
            scale=self.target_scale,
            prefix_visible=isinstance(self.student, MIMStudent),
            packing=packing,
        )

    @torch.no_grad()
    def target_moments(self, images: Tensor, sample_ids: Tensor, epoch: int) -> Tensor:
        """[3] float64: number, sum and sum of squares of the unscaled targets of a batch."""
        visible, packing = self.draw(images, sample_ids, epoch)
        targets = self.targets(images, visible, packing).double()
        if packing is not None and targets.dim() == 2:
            targets = targets[packing.indices >= 0]
        return torch.stack(
            [targets.new_tensor(float(targets.numel())), targets.sum(), targets.square().sum()]
        )

    def set_target_scale(self, moments: Tensor) -> float:
        """Scale targets to unit variance, given the sum of `target_moments` over the data. Returns the scale."""
        count, total, squares = moments.double().tolist()
        variance = squares / count - (total / count) ** 2
        if not variance > 0:
            raise UserError(
                f"the teacher's targets have variance {variance:g}: nothing to predict; check its weights"
            )
        self.target_scale.fill_(variance**-0.5)
        return self.target_scale.item()

    def compile(self, *, blocks: bool = False, **options) -> None:
        """torch.compile the student and the teacher without a graph break.

        Args:
            blocks: each transformer block apart instead of each model as a whole: blocks of one kind share a graph,
                so that the first step comes sooner; what lies between blocks is not fused.
            **options: of torch.compile.
        """
        modules = [self.teacher, self.student]
        if blocks:
            modules = [module for module in self.modules() if isinstance(module, Block)]
            # A graph for each kind of block and each rate of stochastic depth, in training, in validation and for its
            # last batch; the default allows eight.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 8 + 4 * len(modules))
        # Fixed shapes: the smaller last batch of a validation set gets graphs of its own, where else torch would make
        # the graphs of training fit for any shape, which is slower. Only where lengths vary are they not fixed.
        dynamic = False if self.fixed_lengths else None
        for module in modules:
            module.compile(fullgraph=True, dynamic=dynamic, **options)


class MaskEmbed(_Objective):
    """Locality alignment: predict the teacher's view of the masked image from the student's masked output.

    Args:
        teacher: `MaskedTeacher`.
        student: `MaskEmbedStudent`.
        masks: a distribution of `fastalign.method.masks`.
        loss: mse | cosine | l1 | masked_mse | unmasked_mse.
    """

    def __init__(self, teacher: MaskedTeacher, student: MaskEmbedStudent, masks, loss: str = "mse"):
        super().__init__(teacher, student, masks, loss)
        if teacher.prefix_only != student.decoder.prefix_only:
            raise ValueError("prefix_only must be the same for the teacher and the student")
        if student.decoder.head.out_features != teacher.embed_dim:
            raise ValueError(
                f"the student predicts {student.decoder.head.out_features} channels, the teacher has "
                f"{teacher.embed_dim}: give MaskEmbedStudent.from_backbone target_dim={teacher.embed_dim}"
            )

    @property
    def masking(self) -> str:
        return self.teacher.masking

    def targets(self, images: Tensor, visible: Tensor, packing: Packing | None = None) -> Tensor:
        return self.teacher(images, visible, packing)

    def parts(self) -> dict[str, tuple[nn.Module, bool]]:
        packed = self.masking == "drop"
        return {
            "teacher": (self.teacher, packed),
            "student": (self.student.encoder, False),
            "decoder": (self.student.decoder, packed),
        }


class MaskedImageModeling(_Objective):
    """The student sees the masked image and predicts the teacher's tokens of the unmasked image. No decoder.

    Args:
        teacher: `MaskedTeacher`, usually with ``skip_blocks=0``.
        student: `MIMStudent`.
        masks, loss: as for `MaskEmbed`.
    """

    def __init__(self, teacher: MaskedTeacher, student: MIMStudent, masks, loss: str = "mse"):
        super().__init__(teacher, student, masks, loss)
        if teacher.prefix_only:
            raise ValueError(
                "masked image modeling predicts every token: the teacher must not be prefix_only"
            )

    @property
    def masking(self) -> str:
        return self.student.masking

    def targets(self, images: Tensor, visible: Tensor, packing: Packing | None = None) -> Tensor:
        targets = self.teacher(images)
        return targets if packing is None else targets.squeeze(1)

    def parts(self) -> dict[str, tuple[nn.Module, bool]]:
        return {
            "teacher": (self.teacher, False),
            "student": (self.student.encoder, self.masking == "drop"),
        }


def check_same_tokens(teacher: ViTSpec, student: ViTSpec) -> None:
    """Refuse a teacher and a student whose tokens do not correspond."""
    if teacher.grid != student.grid:
        raise UserError(
            f"teacher and student have different patch grids, {teacher.grid} and {student.grid}: "
            "choose backbones or img_size values with the same grid"
        )
    if teacher.prefix != student.prefix:
        raise UserError(
            f"teacher and student have {teacher.prefix} and {student.prefix} prefix tokens: "
            "choose backbones with the same number"
        )
