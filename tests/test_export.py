"""Exports, loaded back by each library's own classes, against timm's model with capped attention in float64."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import fastalign as fa
from benchmarks import export as benchmark
from fastalign import train
from fastalign.export import convert, hf, load_decoder, measure, targets
from fastalign.export.__main__ import main
from tests.numerics import randomise, relative_error
from tests.truth import CappedAttention, StudentTruth

rows = benchmark.measure
FAMILIES = {
    "clip": "vit_base_patch16_clip_quickgelu_224.openai",
    "openclip": "vit_base_patch16_clip_224.laion2b",
    "siglip": "vit_base_patch16_siglip_224.webli",
    "dinov2": "vit_base_patch14_dinov2.lvd142m",
    "registers": "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
}
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
STOCK = {
    "hf-clip": "CLIPVisionModel",
    "hf-siglip": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
    "registers": "Dinov2WithRegistersModel",
    "vit": "Dinov2Model",
}
CASES = [
    (family, target, softcap)
    for family, fitting in {
        "clip": ("timm", "hf-clip", "open-clip", "prismatic"),
        "openclip": ("timm", "hf-clip", "open-clip", "prismatic"),
        "siglip": ("timm", "hf-siglip", "prismatic"),
        "dinov2": ("timm", "hf-dinov2", "prismatic"),
        "registers": ("timm", "hf-dinov2", "prismatic"),
        "vit": ("timm", "hf-dinov2", "prismatic"),
    }.items()
    for target in fitting
    for softcap in ("applied", "dropped", *(["none"] if family in ("clip", "siglip") else []))
]


def small(family: str) -> dict:
    return {**SMALL, "img_size": 28 if "patch14" in FAMILIES[family] else 32}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs, a cap of 0.5 so that tiny models feel it, every weight moved."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(family: str, softcap: float | None = 0.5, *overrides: str) -> Path:
        key = (family, softcap, overrides)
        if key in made:
            return made[key]
        folder = root / f"{len(made)}"
        torch.manual_seed(1)
        vit = fa.create_backbone(FAMILIES[family], **small(family))
        for parameter in vit.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        torch.save(vit.state_dict(), root / f"{family}.pth")
        recipe = {
            "output": str(folder),
            "student": {
                "name": FAMILIES[family],
                "weights": str(root / f"{family}.pth"),
                "kwargs": small(family),
                "softcap": softcap,
            },
            "data": {"train": "synthetic:24", "val": "synthetic:4"},
            "optim": {"batch_size": 8, "epochs": 1, "lr": 0.05},
        }
        (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        with torch.enable_grad():
            assert train.main([str(root / "recipe.yaml"), *overrides]) == 0
        made[key] = folder
        return folder

    return run


@pytest.fixture
def damaged(runs, tmp_path):
    """A copy of a run, to be damaged."""
    source, copy = runs("clip"), tmp_path / "damaged"
    for path in source.rglob("*"):
        if path.is_file() and "exports" not in path.parts:
            (copy / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(source)).write_bytes(path.read_bytes())
    return copy


def truth(folder: Path, family: str, cap: float | None) -> torch.nn.Module:
    """timm's model with the run's weights, capped, in float64."""
    kwargs = json.loads((folder / "backbone.json").read_text())["kwargs"]
    model = timm.create_model(FAMILIES[family], **kwargs)
    model.load_state_dict(load_file(folder / "backbone.safetensors"))
    if cap is not None:
        for block in model.blocks:
            block.attn = CappedAttention(block.attn, cap)
    return model.double().eval()


def images(family: str, count: int = 2) -> torch.Tensor:
    size = small(family)["img_size"]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def tokens(folder: Path, family: str, cap: float | None) -> torch.Tensor:
    with torch.no_grad():
        return truth(folder, family, cap).forward_features(images(family).double())


def facts(folder: Path) -> dict:
    return json.loads((folder / "fastalign.json").read_text())


def by_timm(folder: Path, x: torch.Tensor, family: str) -> torch.Tensor:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features(x)


def by_prismatic(folder: Path, x: torch.Tensor, family: str) -> torch.Tensor:
    """Prismatic's own lines, but for the layer; it leaves the prefix out."""
    featurizer = timm.create_model(
        f"local-dir:{folder}", pretrained=True, num_classes=0, img_size=x.shape[-1]
    )
    assert isinstance(featurizer, timm.models.VisionTransformer)
    featurizer.eval()
    featurizer.forward = partial(
        featurizer.get_intermediate_layers, n={len(featurizer.blocks) - 1}, norm=True
    )
    return featurizer(x)[0]


def by_transformers(folder: Path, x: torch.Tensor, family: str) -> torch.Tensor:
    """transformers' own class where the export names it; its CLIP does not norm its tokens."""
    target = facts(folder)["target"]
    if facts(folder)["softcap"]["applied"]:
        out = transformers.AutoModel.from_pretrained(folder).eval()(x, output_hidden_states=True)
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        return out.last_hidden_state
    model = getattr(transformers, STOCK.get(target) or STOCK[family]).from_pretrained(folder).eval()
    assert type(transformers.AutoModel.from_pretrained(folder)) is type(model)
    last = model(x).last_hidden_state
    return model.post_layernorm(last) if target == "hf-clip" else last


def by_open_clip(folder: Path, x: torch.Tensor, family: str) -> torch.Tensor:
    config = json.loads((folder / "visual.json").read_text())
    visual = open_clip.CLIP(**config, text_cfg=open_clip.CLIPTextCfg(width=64, heads=1, layers=1)).visual
    visual.load_state_dict(load_file(folder / "visual.safetensors"))
    first, patches = visual.eval()(x)
    return torch.cat([first[:, None], patches], 1)


LOADERS = {"timm": by_timm, "prismatic": by_prismatic, "open-clip": by_open_clip}


@pytest.mark.parametrize(("family", "target", "softcap"), CASES, ids=["-".join(case) for case in CASES])
@torch.no_grad()
def test_each_library_gives_our_features(runs, tmp_path, capsys, family, target, softcap):
    folder, output = runs(family, None if softcap == "none" else 0.5), tmp_path / "export"
    options = ["--drop-softcap"] if softcap == "dropped" else []
    code = main([str(folder), "--to", target, "--output", str(output), *options])
    if target == "open-clip" and softcap == "applied":
        error = capsys.readouterr().err
        assert code == 2
        assert "cannot apply the soft-cap of 0.5" in error
        assert "--drop-softcap" in error
        assert not output.exists()
        return
    assert code == 0
    wanted = tokens(folder, family, 0.5 if softcap == "applied" else None)
    found = LOADERS.get(target, by_transformers)(output, images(family), family)
    prefix = facts(output)["read"]["prefix_tokens"]
    assert relative_error(found, wanted[:, prefix:] if target == "prismatic" else wanted) < 1e-5
    assert 0 <= facts(output)["parity"]["largest_relative_error"] < 1e-5
    assert "largest relative error" in capsys.readouterr().out
    assert f"for `{target}`" in (output / "README.md").read_text()


def test_the_file_alone_for_timm(runs, tmp_path):
    """As vlm code names a local file: `pretrained_cfg_overlay`."""
    folder, output = runs("clip", None), tmp_path / "export"
    assert main([str(folder), "--to", "prismatic", "--output", str(output)]) == 0
    model = timm.create_model(
        FAMILIES["clip"],
        pretrained=True,
        num_classes=0,
        pretrained_cfg_overlay={"file": str(output / "model.safetensors")},
        **small("clip"),
    )
    with torch.no_grad():
        found = model.eval().forward_features(images("clip"))
    assert relative_error(found, tokens(folder, "clip", None)) < 1e-5


def test_what_dropping_the_cap_changes(runs, tmp_path, capsys):
    folder, output = runs("clip"), tmp_path / "export"
    assert main([str(folder), "--to", "hf-clip", "--drop-softcap", "--output", str(output)]) == 0
    noise = measure.noise(fa.load_backbone(folder)).double()
    with torch.no_grad():
        plain, capped = (truth(folder, "clip", cap).forward_features(noise) for cap in (None, 0.5))
    found = facts(output)["softcap"]
    assert (found["value"], found["applied"]) == (0.5, False)
    assert found["dropped"]["noise"]["relative_change"] == pytest.approx(
        relative_error(plain, capped), rel=1e-4
    )
    cosine = torch.cosine_similarity(plain, capped, dim=-1).min().item()
    assert found["dropped"]["noise"]["lowest_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert found["dropped"]["noise"]["relative_change"] > 0.02
    assert "soft-cap dropped: features on noise change by" in capsys.readouterr().out


def evaluation_transform(family: str):
    data = timm.data.resolve_data_config({}, model=timm.create_model(FAMILIES[family], **small(family)))
    size = small(family)["img_size"]
    return timm.data.create_transform(**{**data, "input_size": (3, size, size)})


@pytest.fixture
def pictures(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for index in range(3):
        picture = Image.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8))
        (tmp_path / "pictures").mkdir(exist_ok=True)
        picture.resize((72, 48), Image.Resampling.BICUBIC).save(tmp_path / "pictures" / f"{index}.png")
    return tmp_path / "pictures"


def test_mean_and_std_of_the_features(runs, tmp_path, pictures):
    folder, output = runs("clip"), tmp_path / "export"
    assert main([str(folder), "--to", "timm", "--output", str(output), "--images", str(pictures)]) == 0
    transform = evaluation_transform("clip")
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(pictures.iterdir())])
    with torch.no_grad():
        patches = truth(folder, "clip", 0.5).forward_features(batch.double())[:, 1:].flatten(0, 1)
    found = facts(output)["features"]
    assert found["images"] == 3
    assert relative_error(torch.tensor(found["mean"]), patches.mean(0)) < 1e-4
    assert relative_error(torch.tensor(found["std"]), patches.std(0, correction=0)) < 1e-4


def test_without_images_nothing_is_measured_and_it_says_so(damaged, tmp_path, capsys):
    recipe = yaml.safe_load((damaged / "config.yaml").read_text())
    recipe["data"]["val"] = "/gone/val"
    (damaged / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert main([str(damaged), "--to", "timm"]) == 0
    assert facts(damaged / "exports" / "timm")["features"]["mean"] is None
    assert "give --images FOLDER" in capsys.readouterr().out


def test_what_must_be_known_is_written(runs, tmp_path, monkeypatch):
    folder, output = runs("clip"), tmp_path / "export"
    (folder / "probe.json").write_text('{"recall": 0.5}')
    assert main([str(folder), "--to", "hf-clip", "--output", str(output)]) == 0
    (folder / "probe.json").unlink()
    found = facts(output)
    assert found["source"]["name"] == FAMILIES["clip"]
    assert found["source"]["licence"] is None, "weights from a file: nobody knows"
    assert found["recipe"]["optim"]["lr"] == 0.05
    assert found["data"] == {"train": "synthetic:24", "val": "synthetic:4"}
    assert found["probe"] == {"recall": 0.5}
    assert found["softcap"] == {"value": 0.5, "applied": True}
    assert found["read"] == {
        "layer": -1,
        "normed": True,
        "prefix_tokens": 1,
        "patch_grid": [2, 2],
        "width": 48,
    }
    assert len(found["features"]["mean"]) == 48
    card = (output / "README.md").read_text()
    for words in ("license: unknown", "0.5, applied by the import", "{'recall': 0.5}", "load_tower"):
        assert words in card


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("vit_base_patch16_224.mae", "cc-by-nc-4.0"),
        ("vit_base_patch16_mocov3_224", "cc-by-nc-4.0"),
        ("eva02_base_patch16_clip_224.merged2b", "mit"),
        ("vit_base_patch16_224.dino", "apache-2.0"),
    ],
)
def test_the_licence_of_published_weights(tmp_path, name, licence):
    from fastalign.config import Config
    from fastalign.export.source import Run

    run = Run(tmp_path, None, {"name": name}, Config())
    assert run.source() == {"name": name, "weights": "pretrained", "licence": licence}


@pytest.mark.parametrize("options", [(), ("student.head=mlp", "decoder.layers=1"), ("optim.ema=0.5",)])
@torch.no_grad()
def test_the_decoder_predicts_what_the_student_predicts(runs, tmp_path, options):
    folder, output = runs("clip", 0.5, *options), tmp_path / "export"
    assert main([str(folder), "--to", "hf-clip", "--output", str(output)]) == 0
    state = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
    shape = {"head": "mlp", "layers": 1} if options[:1] == ("student.head=mlp",) else {}
    student = StudentTruth(FAMILIES["clip"], cap=0.5, target_dim=48, **shape, **small("clip"))
    student.load_state_dict(state["average"] or state["student"])
    wanted = student.double().eval()(images("clip").double(), torch.ones(2, 1, 4, dtype=torch.bool))[:, 0]
    features = hf.load_tower(output).eval()(images("clip")).last_hidden_state
    assert relative_error(load_decoder(output).eval()(features), wanted) < 1e-5


def test_without_a_checkpoint_there_is_no_decoder(damaged, tmp_path, capsys):
    for path in (damaged / "checkpoints").iterdir():
        path.unlink()
    assert main([str(damaged), "--to", "timm"]) == 0
    assert "no decoder" in capsys.readouterr().out
    with pytest.raises(fa.UserError, match=r"no decoder\.safetensors"):
        load_decoder(damaged / "exports" / "timm")


# A VLM that uses the tower


@pytest.fixture
def llava(runs, tmp_path):
    """Exports a run and builds a tiny LLaVA on it."""

    def build(family: str, target: str, softcap: float | None, **kwargs):
        output = tmp_path / "export"
        assert main([str(runs(family, softcap)), "--to", target, "--output", str(output)]) == 0
        text = transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        config = hf.llava_config(output, text, image_token_index=31, **kwargs)
        model = transformers.LlavaForConditionalGeneration(config).eval()
        model.model.vision_tower = hf.load_tower(output).eval()
        return model

    return build


@torch.no_grad()
def seen(model, family: str) -> torch.Tensor:
    """What LLaVA's projector reads in a forward pass with an image in the prompt."""
    inputs = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    count = model.config.image_seq_length
    prompt = torch.tensor([[1, *[31] * count, 2, 3]]).expand(2, -1)
    out = model(input_ids=prompt, pixel_values=images(family))
    hook.remove()
    assert out.logits.shape == (2, count + 3, 32)
    assert torch.isfinite(out.logits).all()
    return inputs[0]


VLMS = [
    ("clip", "hf-clip", 0.5, 1),
    ("clip", "hf-clip", None, 1),
    ("siglip", "hf-siglip", 0.5, 0),
    ("siglip", "hf-siglip", None, 0),
    ("dinov2", "hf-dinov2", 0.5, 1),
    ("registers", "hf-dinov2", 0.5, 0),
]


@pytest.mark.parametrize(("family", "target", "softcap", "skip"), VLMS)
def test_llava_reads_the_aligned_features(runs, llava, tmp_path, family, target, softcap, skip):
    model = llava(family, target, softcap)
    wanted = tokens(runs(family, softcap), family, softcap)[:, skip:]
    assert model.config.vision_feature_layer == -1
    assert relative_error(seen(model, family), wanted) < 1e-5
    model.set_attn_implementation("eager")
    assert relative_error(seen(model, family), wanted) < 1e-5, "the cap survives another attention"
    model.save_pretrained(tmp_path / "vlm")
    again = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "vlm", attn_implementation="sdpa"
    )
    assert relative_error(seen(again.eval(), family), wanted) < 1e-5, "saved and loaded"


def test_the_trap_of_layer_minus_two(runs, llava):
    """LLaVA's default throws the last block away, the one that alignment trains most."""
    assert transformers.LlavaConfig().vision_feature_layer == -2
    wanted = tokens(runs("clip", 0.5), "clip", 0.5)[:, 1:]
    assert relative_error(seen(llava("clip", "hf-clip", 0.5, vision_feature_layer=-2), "clip"), wanted) > 0.1


def test_the_tower_trains(runs, tmp_path):
    """A VLM may tune it: gradients against those of the truth."""
    folder, output = runs("clip"), tmp_path / "export"
    assert main([str(folder), "--to", "hf-clip", "--output", str(output)]) == 0
    tower, model = hf.load_tower(output).train(), truth(folder, "clip", 0.5)
    cotangent = torch.randn(2, 5, 48)
    tower(images("clip")).last_hidden_state.backward(cotangent)
    model.forward_features(images("clip").double()).backward(cotangent.double())
    for ours, theirs in (
        (tower.embeddings.patch_embedding.weight, model.patch_embed.proj.weight),
        (tower.encoder.layers[1].self_attn.v_proj.weight, model.blocks[1].attn.qkv.weight),
    ):
        gradient = theirs.grad if ours.shape == theirs.shape else theirs.grad.chunk(3)[2]
        assert relative_error(ours.grad, gradient) < 1e-4


def test_the_image_processor_is_the_evaluation_transform(runs, tmp_path, pictures):
    output = tmp_path / "export"
    assert main([str(runs("openclip")), "--to", "hf-clip", "--output", str(output)]) == 0
    processor = transformers.AutoImageProcessor.from_pretrained(output)
    picture = Image.open(pictures / "0.png")
    wanted = evaluation_transform("openclip")(picture)
    found = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert relative_error(found, wanted) < 0.02, "the bicubic of two libraries"


# Refusals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        ("hf-clip", "import transformers as t; t.AutoModel.from_pretrained(PATH)", "fastalign_clip"),
        ("timm", "import timm; timm.create_model('local-dir:' + PATH, pretrained=True)", "fastalign_softcap"),
    ],
)
def test_without_the_import_a_capped_export_is_refused(runs, tmp_path, target, code, words):
    output = tmp_path / "export"
    assert main([str(runs("clip")), "--to", target, "--output", str(output)]) == 0
    result = subprocess.run(
        [sys.executable, "-c", f"PATH = {str(output)!r}\n{code}"], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert words in result.stderr


def test_a_model_that_differs_is_not_written(runs, tmp_path, capsys, monkeypatch):
    """A weight that goes astray: the fresh libraries' classes would load it without a word."""
    right = convert.clip_state

    def astray(vit):
        state = right(vit)
        names = [f"vision_model.encoder.layers.1.layer_norm{number}.bias" for number in (1, 2)]
        return state | dict(zip(names, [state[name] for name in reversed(names)], strict=True))

    monkeypatch.setattr(convert, "clip_state", astray)
    assert main([str(runs("clip")), "--to", "hf-clip", "--output", str(tmp_path / "export")]) == 2
    assert "differs from ours by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def not_a_number(path: Path) -> None:
    weights = load_file(path)
    weights["norm.weight"][3] = float("nan")
    save_file(weights, path)


def wider(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["student"] = {k: torch.cat([v, v]) if v.ndim == 1 else v for k, v in state["student"].items()}
    torch.save(state, path)


KWARGS = {**SMALL, "num_classes": 0}
BAD = {
    "no such run": (lambda run: ["/no/such/run", "--to", "timm"], ["/no/such/run", "no such folder"]),
    "no backbone": (lambda run: (run / "backbone.json").unlink(), ["no backbone at", "finished run"]),
    "no weights": (lambda run: (run / "backbone.safetensors").unlink(), ["no weights file at"]),
    "half a backbone": (
        lambda run: half(run / "backbone.safetensors"),
        ["backbone.safetensors", "weights file"],
    ),
    "half of its facts": (lambda run: half(run / "backbone.json"), ["backbone.json is damaged"]),
    "half a checkpoint": (
        lambda run: half(run / "checkpoints" / "step-00000003.pt"),
        ["00003.pt is damaged"],
    ),
    "a checkpoint of another size": (
        lambda run: wider(run / "checkpoints" / "step-00000003.pt"),
        ["00003.pt is a checkpoint of another model or size"],
    ),
    "a backbone of another size": (
        lambda run: edit(run / "backbone.json", kwargs={**KWARGS, "depth": 3}),
        ["another model", "blocks.2"],
    ),
    "not a number": (lambda run: not_a_number(run / "backbone.safetensors"), ["norm.weight is not finite"]),
    "unknown architecture": (
        lambda run: edit(run / "backbone.json", name="vit_bass_patch16_224"),
        ["vit_bass_patch16_224", "nearest"],
    ),
    "an architecture that does not fit": (
        lambda run: [str(run), "--to", "hf-siglip"],
        ["--to hf-siglip", "class_token is True, wanted False", "what fits: timm, hf-clip, open-clip"],
    ),
    "a folder of something else": (
        lambda run: [str(run), "--to", "timm", "--output", str(run / "checkpoints")],
        ["--output", "is not an export"],
    ),
    "no such images": (
        lambda run: [str(run), "--to", "timm", "--images", "/no/such/images"],
        ["/no/such/images"],
    ),
    "a damaged probe": (lambda run: (run / "probe.json").write_text("{"), ["probe.json is damaged"]),
    "output is no folder": (
        lambda run: [str(run), "--to", "timm", "--output", "/dev/null/x"],
        ["/dev/null"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(damaged, capsys, case):
    spoil, words = BAD[case]
    arguments = spoil(damaged)
    assert main(arguments if isinstance(arguments, list) else [str(damaged), "--to", "timm"]) == 2
    error = capsys.readouterr().err.splitlines()
    error = [line for line in error if line.startswith("fastalign:")]
    assert len(error) == 1
    for word in words:
        assert word in error[0]
    assert not (damaged / "exports" / "timm").exists()


def test_a_library_that_is_not_installed(runs, capsys, monkeypatch):
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    assert main([str(runs("clip")), "--to", "hf-clip"]) == 2
    assert "pip install 'fastalign[export]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_base_patch16_clip_224"])
def test_timm_caps_beit_and_eva_too(name, tmp_path):
    """A run's files, made by hand; the truth is our model, whose attention has tests of its own."""
    vit = fa.create_backbone(name, **SMALL)
    randomise(vit, 0.2)
    folder, output = tmp_path / "run", tmp_path / "export"
    folder.mkdir()
    save_file(
        {key: value.clone() for key, value in vit.state_dict().items()}, folder / "backbone.safetensors"
    )
    facts = {"name": name, "kwargs": vit.recipe["kwargs"], "softcap": 0.5}
    (folder / "backbone.json").write_text(json.dumps(facts))
    assert main([str(folder), "--to", "timm", "--output", str(output)]) == 0
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = timm.create_model(f"local-dir:{output}", pretrained=True).eval().forward_features(x)
        wanted = fa.load_backbone(folder).forward_features(x)
    assert relative_error(found, wanted) < 1e-5
    assert relative_error(vit.forward_features(x), wanted) > 1e-3, "the cap is felt"


def test_loading_what_is_no_export(tmp_path):
    with pytest.raises(fa.UserError, match=r"no config\.json"):
        hf.load_tower(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(fa.UserError, match="bert"):
        hf.load_tower(tmp_path)


def test_an_earlier_export_is_replaced(runs, tmp_path):
    output = tmp_path / "export"
    for target in ("hf-clip", "timm"):
        assert main([str(runs("clip")), "--to", target, "--output", str(output)]) == 0
    assert not (output / "preprocessor_config.json").exists()
    assert facts(output)["target"] == "timm"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_the_benchmark_at_a_tiny_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.record, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "TABLE", tmp_path / "export.md")
    monkeypatch.setattr(benchmark, "BACKBONES", [FAMILIES["clip"], FAMILIES["siglip"]])
    monkeypatch.setattr(benchmark, "measure", lambda name, **_: rows(name, **{**SMALL, "depth": 1}))
    (tmp_path / "export.md").write_text("# Export\n\n| backbone | target | old |\n")
    benchmark.main([])
    table = (tmp_path / "export.md").read_text()
    assert table.count("| refused |") == 1
    assert table.startswith("# Export\n\n| backbone | target | with the cap | without |\n|---|")
    found = json.loads((tmp_path / "export.json").read_text())["rows"]
    assert [row["target"] for row in found[-3:]] == ["timm", "hf-siglip", "prismatic"]
    assert all(row["plain"] < 1e-5 for row in found)


def test_push_to_hub(runs, tmp_path, capsys, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, exist_ok):
            if name == "refused":
                raise ValueError("no login\nmore")
            calls.append((name, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    command = [str(runs("clip")), "--to", "timm", "--output", str(tmp_path / "export"), "--push-to-hub"]
    assert main([*command, "me/model"]) == 0
    assert calls[0] == ("me/model", True)
    assert calls[1][1] == [
        "README.md", "config.json", "decoder.safetensors", "fastalign.json", "model.safetensors",
    ]  # fmt: skip
    assert main([*command, "refused"]) == 2
    assert "--push-to-hub refused: no login;" in capsys.readouterr().err
