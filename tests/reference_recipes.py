"""The authors' 52 trainings, written from the facts about their files, as keys of ours."""

import json
import re

import yaml

# file | data | teacher (or our run) | student (= the same, s = soft-capped) | batch x passes | lr | epochs | rest
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
clip-vit-b-mim-aligned-mim | 21k | runs/mim-clip-vit-b-mim-aligned | sCLIP.openai | 256x1 | 3e-4 | 5 (0) |
clip-vit-b-mim-aligned | 21k | runs/clip-vit-b-mim | sCLIP.openai | 256x1 | 3e-4 | 5 (0) |
clip-vit-b-mim | 21k | runs/mim-clip-vit-b | sCLIP.openai | 256x1 | 3e-4 | 5 (0) |
clip-vit-b | 21k | CLIP.openai | s | 256x1 | 3e-4 | 5 (0) |
clip-vit-l-336 | 21k | vit_large_patch14_clip_quickgelu_336.openai | s | 32x8 | 2e-4 | 5 (0) |
clip-vit-l | 21k | vit_large_patch14_clip_quickgelu_224.openai | s | 128x2 | 2e-4 | 5 (0) |
dfn-vit-b | 21k | vit_base_patch16_clip_224.dfn2b | s | 256x1 | 3e-4 | 5 (0) |
dino-vit-b | 1k | vit_base_patch16_224.dino | s | 256x1 | 3e-4 | 50 (1) |
dinov2-vit-b | 21k | vit_base_patch14_reg4_dinov2.lvd142m | s | 256x1 | 3e-4 | 5 (0) | SIZE
eva02-vit-b | 21k | eva02_base_patch16_clip_224.merged2b | = | 256x1 | 3e-4 | 5 (0) | BIAS
in1k-vit-b-autoaug | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | data.randaugment: rand-m9-mstd0.5-inc1
in1k-vit-b-bernoulli25 | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | BERNOULLI: 0.25, ONE
in1k-vit-b-bernoulli50 | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | BERNOULLI: 0.5, ONE
in1k-vit-b-bernoulli75 | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | BERNOULLI: 0.75, ONE
in1k-vit-b-block | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | masks.distribution: blockwise, masks.ratio: 0.4, ONE
in1k-vit-b-cls | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | teacher.prefix_only: true, teacher.skip_blocks: 0
in1k-vit-b-cosine | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | loss.name: cosine
in1k-vit-b-cutmix | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | data.cutmix: 1.0
in1k-vit-b-e10 | 1k | IN1K | = | 256x1 | 3e-4 | 10 (1) |
in1k-vit-b-e100 | 1k | IN1K | s | 256x1 | 3e-4 | 100 (1) |
in1k-vit-b-e2 | 1k | IN1K | = | 256x1 | 3e-4 | 2 (0) |
in1k-vit-b-e50 | 1k | IN1K | s | 256x1 | 3e-4 | 50 (1) |
in1k-vit-b-embed-final | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | teacher.skip_blocks: 0
in1k-vit-b-embed | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) |
in1k-vit-b-in21k-e1 | 21k | IN1K | s | 256x1 | 3e-4 | 1 (0) |
in1k-vit-b-in21k-e10 | 21k | IN1K | s | 256x1 | 3e-4 | 10 (0) |
in1k-vit-b-in21k-e5 | 21k | IN1K | s | 256x1 | 3e-4 | 5 (0) |
in1k-vit-b-mixup | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | data.mixup: 0.5
in1k-vit-b-uniform-antithetical | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | PAIR
in1k-vit-b-uniform | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | ONE
in1k-vit-b | 21k | IN1K | s | 256x1 | 3e-4 | 5 (0) |
in1k-vit-l | 21k | vit_large_patch16_224.augreg_in21k_ft_in1k | s | 128x2 | 2e-4 | 5 (0) |
in1k-vit-s | 21k | vit_small_patch16_224.augreg_in21k_ft_in1k | s | 256x1 | 3e-4 | 5 (0) |
in1k-vit-t | 21k | vit_tiny_patch16_224.augreg_in21k_ft_in1k | s | 256x1 | 3e-4 | 5 (0) |
mae-vit-b | 1k | vit_base_patch16_224.mae | s | 256x1 | 3e-4 | 50 (1) |
moco-vit-b | 1k | vit_base_patch16_mocov3_224 | s | 256x1 | 3e-4 | 50 (1) |
openclip-vit-b | 21k | vit_base_patch16_clip_224.laion2b | s | 256x1 | 3e-4 | 5 (0) |
siglip-vit-b | 21k | vit_base_patch16_siglip_224.webli | s | 256x1 | 3e-4 | 5 (0) |
siglip-vit-so400m-384 | 21k | vit_so400m_patch14_siglip_384.webli | s | 16x16 | 2e-4 | 5 (0) |
siglip-vit-so400m | 21k | vit_so400m_patch14_siglip_224.webli | s | 64x4 | 2e-4 | 5 (0) |
configs-mim/clip-vit-b-mim-aligned | 21k | runs/clip-vit-b-mim | sCLIP.openai | 256x1 | 3e-4 | 5 (0) |
configs-mim/clip-vit-b | 21k | CLIP.openai | s | 256x1 | 3e-4 | 5 (0) |
"""
SHORT = {
    "CLIP": "vit_base_patch16_clip_quickgelu_224",
    "IN1K": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "BERNOULLI": "masks.distribution: bernoulli, masks.ratio",
    "SIZE": "student.kwargs: {img_size: 224}",
    "BIAS": "decoder.kwargs.qkv_bias: true, decoder.kwargs.qk_norm: false",
    "PAIR": "masks.complement: true, masks.full: false",
    "ONE": "masks.complement: false, masks.full: false",
}
COMMON = """
{student.weights: pretrained, student.head: linear, student.freeze: false, teacher.skip_blocks: 1,
teacher.prefix_only: false, decoder.layers: 2, loss.name: mse,
decoder.kwargs: {width: null, heads: null, qk_norm: null, qkv_bias: null, init_values: 0.000001},
masks: {distribution: uniform, ratio: null, complement: true, full: true},
data.crop: rkrc, data.scale: [0.08, 1.0], data.ratio: [0.75, 1.3333333333333333], data.hflip: 0.5,
data.color_jitter: 0, data.randaugment: "", data.mixup: 0, data.cutmix: 0,
optim.weight_decay: 0.01, optim.betas: [0.9, 0.95], optim.clip: 1.0, optim.ema: null}
"""
"""In every file, or the default of the authors' scripts."""
FILES = {row.split(" |")[0]: [cell.strip() for cell in row.split("|")] for row in ROWS.strip().splitlines()}


def reference_keys(file: str) -> list[str]:
    """Our keys, "key=value" each, with the values of one of the authors' files."""
    _, _, teacher, student, batch, lr, epochs, rest = FILES[file]
    for short, text in SHORT.items():
        rest = re.sub(rf"\b{short}\b", text, rest)
    name = {"=": teacher, "s": f"s{teacher}"}.get(student, student)
    capped = name.startswith("s")  # all their names without a soft-cap begin with vit, beit or eva
    for short in ("CLIP", "IN1K"):
        name = name.replace(short, SHORT[short])
    mim = file.startswith("configs-mim/")
    size, passes = map(int, batch.split("x"))
    length, warm_up = re.findall(r"\d+", epochs)
    keys = yaml.safe_load(COMMON) | {
        "objective": "mim" if mim else "maskembed",
        "student.name": name.removeprefix("s") if capped else name,
        "student.softcap": 30.0 if capped else None,
        "teacher.weights": teacher if teacher.startswith("runs/") else None,
        "optim.batch_size": 4 * size * passes,  # on their four GPUs
        "optim.accumulate": passes,
        "optim.lr": float(lr),
        "optim.min_lr": float(lr.replace("e-4", "e-5")),
        "optim.epochs": int(length),
        "optim.warmup_epochs": int(warm_up),
    }
    keys |= {"teacher.skip_blocks": 0} if mim else {}  # their mim.py reads all blocks of the teacher
    keys |= yaml.safe_load(f"{{{rest}}}")
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]
