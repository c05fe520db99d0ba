"""From a batch of images to a loss: MaskEmbed (locality alignment), and masked image modeling.

Shapes as in `fastalign.ops.reference`, with D the teacher's width; mode drop has packed rows [L, D].
"""

import torch
from torch import Tensor, nn

from fastalign import ops
from fastalign.backbones.blocks import Attention, Block
from fastalign.method.student import MaskEmbedStudent, MIMStudent
from fastalign.method.teacher import MaskedTeacher
from fastalign.ops.attention import Case
from fastalign.ops.reference import Packing
from fastalign.utils.errors import UserError


class Objective(nn.Module):
    """The base class of both: a frozen teacher, a student, masks, a loss and the scale of the targets."""

    prefix_visible: bool  # whether prefix tokens count as visible in the loss
    packed_parts: tuple[str, ...]  # the transformers that read packed sequences in mode drop

    def __init__(self, teacher: MaskedTeacher, student: nn.Module, masks, loss: str, masking: str):
        super().__init__()
        tokens = [(spec.grid, spec.prefix) for spec in (teacher.spec, student.encoder.spec)]
        if tokens[0] != tokens[1]:
            raise UserError(
                f"teacher and student have different patch grids or prefix tokens, {tokens[0]} and {tokens[1]}: "
                "choose backbones or img_size values that agree"
            )
        self.teacher, self.student, self.masks, self.loss = teacher, student, masks, loss
        self.masking = masking  # zero or drop
        self.register_buffer("target_scale", torch.ones(()))

    @property
    def fixed_lengths(self) -> bool:
        """Whether every batch has the same number of tokens, whatever the masks."""
        return self.masking == "zero" or getattr(self.masks, "complement", False)

    def draw(self, images: Tensor, sample_ids: Tensor, epoch: int) -> tuple[Tensor, Packing | None]:
        """The masks of a batch, [B, M, N] bool, and in mode drop the packing of their visible tokens.

        Varying lengths are computed on the device of `sample_ids`; with ids on the host nothing waits for a GPU.
        """
        device, spec = images.device, self.teacher.spec
        if self.fixed_lengths:
            sample_ids = sample_ids.to(device, non_blocking=True)
        if self.masking == "zero":
            return self.masks(sample_ids, spec.grid, epoch), None
        if hasattr(self.masks, "packed"):
            visible, packing = self.masks.packed(sample_ids, spec.grid, spec.prefix, epoch)
        else:
            visible = self.masks(sample_ids, spec.grid, epoch)
            packing = ops.pack_masks(visible, spec.prefix)
        if visible.is_cpu and not images.is_cpu:
            # A copy of more than 64 KB from memory that is not pinned waits for the GPU.
            parts = visible, *packing
            visible, *packing = (part.pin_memory().to(device, non_blocking=True) for part in parts)
        return visible, Packing(*packing)

    def forward(self, images: Tensor, sample_ids: Tensor, epoch: int = 0) -> Tensor:
        """The loss of a batch, scalar, fp32.

        Args:
            images: [B, C, height, width], normalized.
            sample_ids: [B] int64, on the host or the device; with `epoch` and the masks' seed they decide the masks.
            epoch: the training epoch, or `fastalign.utils.random.EVAL_EPOCH`.
        """
        visible, packing = self.draw(images, sample_ids, epoch)
        return ops.reconstruction_loss(
            self.student(images, visible, packing),  # [B, M, T, D]; packed [L, D]
            self.targets(images, visible, packing),
            visible,
            loss=self.loss,
            scale=self.target_scale,
            prefix_visible=self.prefix_visible,
            packing=packing,
        )

    @torch.no_grad()
    def target_moments(self, images: Tensor, sample_ids: Tensor, epoch: int) -> Tensor:
        """[3] float64: number, sum and sum of squares of the unscaled targets of a batch."""
        visible, packing = self.draw(images, sample_ids, epoch)
        targets = self.targets(images, visible, packing).double()
        if packing is not None and targets.dim() == 2:
            targets = targets[packing.indices >= 0]
        count = targets.new_tensor(float(targets.numel()))
        return torch.stack([count, targets.sum(), targets.square().sum()])

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

    def attention_cases(self, device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
        """The attention of teacher, student and decoder in a training step that computes in `dtype`."""
        cases, length = {}, self.teacher.spec.prefix + self.teacher.spec.patches
        parts = {"teacher": self.teacher, "student": self.student.encoder}
        parts["decoder"] = getattr(self.student, "decoder", nn.Identity())
        for name, part in parts.items():
            packed = self.masking == "drop" and name in self.packed_parts
            gradient = any(parameter.requires_grad for parameter in part.parameters())
            for module in part.modules():  # the blocks of one transformer are alike; a decoder may have none
                if isinstance(module, Attention):
                    capped, width = module.spec.softcap is not None, module.spec.width // module.spec.heads
                    cases[name] = Case(
                        device.type, dtype, capped, module.biased, packed, length, width, gradient
                    )
        return cases

    def set_attention(self, backend: str) -> None:
        """Select the implementation of attention: one of `fastalign.ops.attention.BACKENDS`, or "auto"."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def compile(self, *, blocks: bool = False, **options) -> None:
        """torch.compile the student and the teacher without a graph break.

        With `blocks`, compile each transformer block separately: equal blocks share a graph, so the first step starts
        sooner, but operations between blocks are not fused.
        """
        modules = [self.teacher, self.student]
        if blocks:
            modules = [module for module in self.modules() if isinstance(module, Block)]
            # Each kind of block and each rate of stochastic depth has a graph for training, for validation and for
            # the last batch of validation; the default limit is eight.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 8 + 4 * len(modules))
        # With dynamic=False the smaller last batch of validation gets graphs of its own. Otherwise torch would
        # replace the graphs of training by slower ones for any shape.
        dynamic = False if self.fixed_lengths else None
        for module in modules:
            module.compile(fullgraph=True, dynamic=dynamic, **options)


class MaskEmbed(Objective):
    """Locality alignment: predict the teacher's output for a masked image from the student's masked tokens.

    >>> vit = fa.create_backbone("vit_tiny_patch16_224", depth=2)
    >>> step = fa.MaskEmbed(fa.MaskedTeacher(vit), fa.MaskEmbedStudent.from_backbone(vit), fa.UniformMasks())
    >>> step(torch.randn(2, 3, 224, 224), sample_ids=torch.tensor([7, 8])).shape
    torch.Size([])

    Args:
        teacher: `MaskedTeacher`; its masking mode also applies to the decoder.
        student: `MaskEmbedStudent`.
        masks: a distribution of `fastalign.method.masks`, or a function (sample_ids [B], (rows, columns), epoch) ->
            [B, M, rows * columns] bool, True = visible, with M of your choice.
        loss: mse | cosine | l1 | masked_mse | unmasked_mse.
    """

    prefix_visible, packed_parts = False, ("teacher", "decoder")

    def __init__(self, teacher: MaskedTeacher, student: MaskEmbedStudent, masks, loss: str = "mse"):
        super().__init__(teacher, student, masks, loss, teacher.masking)
        if teacher.prefix_only != student.decoder.prefix_only:
            raise ValueError("prefix_only must be the same for the teacher and the student")
        if student.decoder.head.out_features != teacher.embed_dim:
            raise ValueError(
                f"the student predicts {student.decoder.head.out_features} channels, the teacher has "
                f"{teacher.embed_dim}: give MaskEmbedStudent.from_backbone target_dim={teacher.embed_dim}"
            )

    def targets(self, images: Tensor, visible: Tensor, packing: Packing | None = None) -> Tensor:
        """The teacher's output for each masked image, unscaled: [B, M, T, D]; packed [L, D]."""
        return self.teacher(images, visible, packing)


class MaskedImageModeling(Objective):
    """The student sees the masked image and predicts the teacher's tokens of the unmasked image. No decoder.

    >>> vit = fa.create_backbone("vit_tiny_patch16_224", depth=2)
    >>> teacher, student = fa.MaskedTeacher(vit, skip_blocks=0), fa.MIMStudent.from_backbone(vit)
    >>> step = fa.MaskedImageModeling(teacher, student, fa.UniformMasks())
    >>> step(torch.randn(2, 3, 224, 224), sample_ids=torch.tensor([7, 8])).shape
    torch.Size([])

    Args:
        teacher: `MaskedTeacher`, usually with ``skip_blocks=0``.
        student: `MIMStudent`.
        masks, loss: as for `MaskEmbed`. Prefix tokens, never masked here, count as visible.
    """

    prefix_visible, packed_parts = True, ("student",)

    def __init__(self, teacher: MaskedTeacher, student: MIMStudent, masks, loss: str = "mse"):
        super().__init__(teacher, student, masks, loss, student.masking)
        if teacher.prefix_only:
            raise ValueError(
                "masked image modeling predicts every token: the teacher must not be prefix_only"
            )

    def targets(self, images: Tensor, visible: Tensor, packing: Packing | None = None) -> Tensor:
        """The teacher's tokens of each whole image, unscaled: [B, 1, T, D]; for packed predictions [B, T, D]."""
        targets = self.teacher(images)
        return targets if packing is None else targets.squeeze(1)
