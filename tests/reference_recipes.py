"""The authors' 52 recipes, written from the facts about them, as the options in their YAML files."""

import re

import yaml

# file | data | teacher | student (= the same, s = soft-capped) | batch a GPU x passes | lr | epochs (warm-up) | rest
ROWS = """
beit-vit-b | 21k | beit_base_patch16_224.in22k_ft_in22k_in1k | = | 256x1 | 3e-4 | 5 (0) | BIAS
beitv2-vit-b | 21k | beitv2_base_patch16_224.in1k_ft_in22k_in1k | = | 256x1 | 3e-4 | 5 (0) | BIAS
clip-vit-b-in1k-e10 | 1k | CLIP.openai | = | 256x1 | 3e-4 | 10 (1) |
clip-vit-b-in1k-e100 | 1k | CLIP.openai | s | 256x1 | 3e-4 | 100 (1) |
clip-vit-b-in1k-e2 | 1k | CLIP.openai | = | 256x1 | 3e-4 | 2 (1) |
clip-vit-b-in1k-e25 | 1k | CLIP.openai | = | 256x1 | 3e-4 | 25 (1) |
clip-vit-b-in1k-e50 | 1k | CLIP.openai | s | 256x1 | 3e-4 | 50 (1) |
clip-vit-b-in21k-e1 | 21k | CLIP.openai | s | 256x1 | 3e-4 | 1 (0) |
clip-vit-b-in21k-e10 | 21k | CLIP.openai | s | 256x1 | 3e-4 | 10 (0) |
clip-vit-b-in21k-e5 | 21k | CLIP.openai | s | 256x1 | 3e-4 | 5 (0) |
clip-vit-b-mim-aligned-mim | 21k | sCLIP | sCLIP.openai | 256x1 | 3e-4 | 5 (0) | MIM/clip-vit-b-mim-aligned-mim
clip-vit-b-mim-aligned | 21k | sCLIP.openai | = | 256x1 | 3e-4 | 5 (0) | OUT/clip-vit-b-mim-aligned
clip-vit-b-mim | 21k | sCLIP | sCLIP.openai | 256x1 | 3e-4 | 5 (0) | MIM/clip-vit-b-mim
clip-vit-b | 21k | CLIP.openai | s | 256x1 | 3e-4 | 5 (0) |
clip-vit-l-336 | 21k | vit_large_patch14_clip_quickgelu_336.openai | s | 32x8 | 2e-4 | 5 (0) |
clip-vit-l | 21k | vit_large_patch14_clip_quickgelu_224.openai | s | 128x2 | 2e-4 | 5 (0) |
dfn-vit-b | 21k | vit_base_patch16_clip_224.dfn2b | s | 256x1 | 3e-4 | 5 (0) |
dino-vit-b | 1k | vit_base_patch16_224.dino | s | 256x1 | 3e-4 | 50 (1) |
dinov2-vit-b | 21k | vit_base_patch14_reg4_dinov2.lvd142m | s | 256x1 | 3e-4 | 5 (0) | SIZE
eva02-vit-b | 21k | eva02_base_patch16_clip_224.merged2b | = | 256x1 | 3e-4 | 5 (0) | BIAS
in1k-vit-b-autoaug | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | aa: rand-m9-mstd0.5-inc1
in1k-vit-b-bernoulli25 | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | BERNOULLI: 0.25, ONE
in1k-vit-b-bernoulli50 | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | BERNOULLI: 0.5, ONE
in1k-vit-b-bernoulli75 | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | BERNOULLI: 0.75, ONE
in1k-vit-b-block | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | mask_sampling: blockwise, blockwise_mask_ratio: 0.4, ONE
in1k-vit-b-cls | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | prefix_only: true, skip_blocks: 0
in1k-vit-b-cosine | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | loss_function: cosine
in1k-vit-b-cutmix | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | cutmix: 1.0
in1k-vit-b-e10 | 1k | IN1K | = | 256x1 | 3e-4 | 10 (1) |
in1k-vit-b-e100 | 1k | IN1K | s | 256x1 | 3e-4 | 100 (1) |
in1k-vit-b-e2 | 1k | IN1K | = | 256x1 | 3e-4 | 2 (0) |
in1k-vit-b-e50 | 1k | IN1K | s | 256x1 | 3e-4 | 50 (1) |
in1k-vit-b-embed-final | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | skip_blocks: 0
in1k-vit-b-embed | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) |
in1k-vit-b-in21k-e1 | 21k | IN1K | s | 256x1 | 3e-4 | 1 (0) |
in1k-vit-b-in21k-e10 | 21k | IN1K | s | 256x1 | 3e-4 | 10 (0) |
in1k-vit-b-in21k-e5 | 21k | IN1K | s | 256x1 | 3e-4 | 5 (0) |
in1k-vit-b-mixup | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | mixup: 0.5
in1k-vit-b-uniform-antithetical | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | UNIFORM, PAIR
in1k-vit-b-uniform | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | mask_sampling: uniform, ONE
in1k-vit-b | 21k | IN1K | s | 256x1 | 3e-4 | 5 (0) |
in1k-vit-l | 21k | vit_large_patch16_224.augreg_in21k_ft_in1k | s | 128x2 | 2e-4 | 5 (0) |
in1k-vit-s | 21k | vit_small_patch16_224.augreg_in21k_ft_in1k | s | 256x1 | 3e-4 | 5 (0) |
in1k-vit-t | 21k | vit_tiny_patch16_224.augreg_in21k_ft_in1k | s | 256x1 | 3e-4 | 5 (0) |
mae-vit-b | 1k | vit_base_patch16_224.mae | s | 256x1 | 3e-4 | 50 (1) |
moco-vit-b | 1k | vit_base_patch16_mocov3_224 | s | 256x1 | 3e-4 | 50 (1) |
openclip-vit-b | 21k | vit_base_patch16_clip_224.laion2b | s | 256x1 | 3e-4 | 5 (0) |
siglip-vit-b | 21k | vit_base_patch16_siglip_224.webli | s | 256x1 | 3e-4 | 5 (0) |
siglip-vit-so400m-384 | 21k | vit_so400m_patch14_siglip_384 | s | 16x16 | 2e-4 | 5 (0) |
siglip-vit-so400m | 21k | vit_so400m_patch14_siglip_224 | s | 64x4 | 2e-4 | 5 (0) |
configs-mim/clip-vit-b-mim-aligned | 21k | sCLIP.openai | = | 256x1 | 3e-4 | 5 (0) | OUT/clip-vit-b-mim-aligned
configs-mim/clip-vit-b | 21k | CLIP.openai | s | 256x1 | 3e-4 | 5 (0) |
"""
SHORT = {
    "CLIP": "vit_base_patch16_clip_quickgelu_224",
    "IN1K": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "BERNOULLI": "mask_sampling: bernoulli, bernoulli_mask_ratio",
    "UNIFORM": "mask_sampling: uniform",
    "SIZE": "img_size: 224, model_kwargs: {img_size: 224}",
    "BIAS": "decoder_qkv_bias: true, decoder_qk_norm: false",
    "PAIR": "antithetical_sampling: true, include_null_mask: false",
    "ONE": "antithetical_sampling: false, include_null_mask: false",
    "MIM": "teacher_pretrained: false, teacher_checkpoint: output_mim",
    "OUT": "teacher_pretrained: false, teacher_checkpoint: output",
}
COMMON = """
{train_split: train, val_split: val, teacher_pretrained: true, student_pretrained: true, amp: true,
amp_dtype: bfloat16, torchcompile: inductor, opt: adamw, weight_decay: 0.01, clip_grad: 1.0,
opt_kwargs: {betas: [0.9, 0.95]}, sched: cosine, sched_on_updates: true, train_crop_mode: rkrc,
color_jitter: null, workers: 24, pin_mem: true, log_wandb: true}
"""
FILES = {row.partition(" |")[0]: row for row in ROWS.strip().splitlines()}
RUNS = {
    "output_mim/clip-vit-b-mim": "runs/mim-clip-vit-b",
    "output_mim/clip-vit-b-mim-aligned-mim": "runs/mim-clip-vit-b-mim-aligned",
    "output/clip-vit-b-mim-aligned": "runs/clip-vit-b-mim",
}
"""Where the teachers of a chain are, in the authors' files and in ours."""


def reference_options(name: str) -> dict:
    """The options in a file of the authors, with numbers as YAML reads theirs: 3e-4 is a text."""
    cells = [cell.strip() for cell in FILES[name].split("|")]
    for short, text in SHORT.items():
        cells = [re.sub(rf"\b(s?){short}\b", rf"\g<1>{text}", cell) for cell in cells]
    file, data, teacher, student, batch, lr, epochs, others = cells
    size, passes = map(int, batch.split("x"))
    lowest = lr.replace("e-4", "e-5")
    others = yaml.safe_load(f"{{{others}}}")
    if "teacher_checkpoint" in others:
        others["teacher_checkpoint"] += "/model_best.pth.tar"
    epochs, warmup = map(int, re.findall(r"\d+", epochs))
    return {
        **yaml.safe_load(COMMON),
        "data_dir": "data/imagenet" if data == "1k" else "data/imagenet21k",
        "teacher_model": teacher,
        "student_model": {"=": teacher, "s": f"s{teacher}"}.get(student, student),
        **{"batch_size": size, "validation_batch_size": size, "grad_accum_steps": passes},
        **{"lr": lr, "min_lr": lowest, "warmup_lr": lowest, "epochs": epochs, "warmup_epochs": warmup},
        "output": "output_mim" if file.startswith("configs-mim/") else "output",
        "experiment": file.rpartition("/")[2],
        "project": "locality-alignment",
        **others,
    }
