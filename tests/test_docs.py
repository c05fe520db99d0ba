"""The documentation: its site builds without a broken link, and its code runs, commands at a tiny size.

A block after the comment `<!-- not run: REASON -->` is left out.
"""

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import fastalign as fa
from demo import mosaics
from fastalign.__main__ import main
from fastalign.config import kinds

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?^(?:> )?```(\w*)\n(.*?)^(?:> )?```", re.S | re.M)
TINY_RUN = ["student.weights=random", "student.kwargs={depth: 2}", "optim.batch_size=2", "max_steps=1"]
TINY_RUN += ["data.threads=1", "efficiency.precision=fp32"]
TINY_NAME = ["--weights", "random", "--kwargs", "{depth: 2}"]
FOLDERS = {"/data/imagenet/": "images/", "/data/": "images/", "photos": "images/train"}
LABELLED = ("coco:/data/coco", "ade20k:/data/ade20k", "demo/data")


def blocks(language: str) -> dict[Path, list[str]]:
    """The blocks to run, by page."""
    found = {}
    for page in PAGES:
        for skipped, kind, text in BLOCK.findall(page.read_text()):
            if kind == language and not skipped:
                found.setdefault(page, []).append(text)
    return found


def commands() -> list[str]:
    """The arguments of `fastalign` in every shell block, as text; torchrun's are of `fastalign train`."""
    found = []
    for text in (text for texts in blocks("").values() for text in texts):
        for line in text.replace("\\\n", " ").splitlines():
            if match := re.match(r"(?:> )?fastalign (.+)|torchrun .*-m fastalign\.(train .+)", line):
                found.append((match[1] or match[2]).partition("  #")[0].strip())
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def world(tmp_path_factory, images):
    """A folder with everything that the documents name, tiny."""
    folder = tmp_path_factory.mktemp("world")
    mosaics.render(folder / "labelled", mosaics.Settings(train=16, val=8, test=8, size=32), workers=1)
    (folder / "images").symlink_to(images)
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "runs").mkdir()
    (folder / "runs/demo").symlink_to("clip-vit-b")
    name = "vit_large_patch14_clip_quickgelu_336.openai"
    torch.save(fa.create_backbone(name, depth=2).state_dict(), folder / "model_best.pth.tar")
    return folder


def adapted(text: str, labelled: Path) -> list[str]:
    """A command's arguments at a tiny size."""
    words = shlex.split(text.partition(" > ")[0])
    name, *rest = [word for word in words if word not in ("key.sub=value", "...")]
    for index, word in enumerate(rest):
        for original in LABELLED:
            word = word.replace(original, str(labelled))
        for original, ours in FOLDERS.items():
            word = word.replace(original, ours) if "photos/" not in word and "runs/" not in word else word
        rest[index] = word.replace("images/imagenet", "images")
    if name == "train":
        return [name, *rest, *TINY_RUN]
    if name in ("probe", "classify"):
        run = any(word.startswith("runs/") for word in rest)
        fewer = ["--epochs", "1", "--seeds", "0", "--batch-size", "4"]
        return [name, *rest, *fewer, *([] if run else TINY_NAME)]
    if name == "export" and "--weights" in rest:
        return [name, *rest, "--kwargs", "{depth: 2}"]
    return [name, *rest]


def test_commands(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    found = commands()
    assert {text.split()[0] for text in found} >= {"train", "probe", "classify", "export", "report"}
    runs = [text for text in found if text.startswith("train")]
    for text in runs + [text for text in found if text not in runs]:
        more = [f"output=runs/{runs.index(text)}"] if text in runs[1:] and " output=" not in text else []
        assert main([*adapted(text, world / "labelled"), *more]) == 0, (text, capsys.readouterr().err)


def test_the_table_of_the_authors_options_names_our_keys():
    table = (ROOT / "docs/compat.md").read_text().partition("| key |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([a-z]+\.[\w.]+)", table))
    assert len(named) > 30
    assert named <= set(kinds())


def names() -> dict:
    """What blocks of Python use without defining it."""
    images, ids = torch.randn(2, 3, 224, 224), torch.arange(2)
    q, k, v = torch.randn(3, 2, 3, 197, 64)
    student = fa.MaskEmbedStudent.from_backbone(fa.create_backbone("vit_tiny_patch16_224"))
    picture = Image.new("RGB", (300, 200))
    return {
        **{"fa": fa, "torch": torch, "timm": timm, "q": q, "k": k, "v": v},
        **{"images": images, "sample_ids": ids, "batches": [(images, ids)], "student": student, "step": 1},
        **{"picture": picture, "image": picture, "visible": torch.rand(2, 3, 196) < 0.5},
        **{"patches": torch.randn(2, 196, 8), "hidden": torch.randn(8), "prefix": torch.randn(1, 8)},
        **{"position": torch.randn(196, 8), "qkv": lambda rows: torch.randn(3, len(rows), 2, 4)},
    }


def test_python(world, monkeypatch):
    """Models have two blocks and random weights."""
    monkeypatch.chdir(world)
    create = timm.create_model

    def small(name, pretrained=False, **kwargs):
        return create(name, **{"depth": 2, **kwargs})

    monkeypatch.setattr(timm, "create_model", small)
    model = timm.create_model("vit_base_patch16_siglip_224.v2_webli", num_classes=0, img_size=256)
    torch.save(model.state_dict(), "finetuned.pth")
    monkeypatch.setattr("fastalign.api.train", lambda config, ranks: None)  # the run of the first command
    folder = str(world / "runs/clip-vit-b/exports/hf-clip")
    for page, texts in blocks("python").items():
        space = names()
        for text in texts:
            text = text.replace("FOLDER", folder).replace("demo/data", "images")
            text = text.replace("epochs=10", "epochs=1, batch_size=4")
            exec(compile(text, f"{page.name}: {text[:60]}", "exec"), space)  # noqa: S102


def test_site(tmp_path):
    """Public names are documented; recipes, which lie outside docs/, are part of the site."""
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    api, recipes = ((tmp_path / page / "index.html").read_text() for page in ("api", "recipes"))
    names = re.findall(r'id="fastalign\.(?:ops\.reference\.)?(\w+)"', api)
    assert set(fa.__all__) - {"kernels", "masks", "ops", "UserError"} <= set(names)
    targets = re.findall(r'href="([^"#]+\.yaml)"', recipes)
    assert targets
    assert all((tmp_path / "recipes" / target).is_file() for target in targets)
    for page in tmp_path.rglob("index.html"):
        swallowed = re.search(r"<p>(?:(?!</p>).)*\n(?:- |\* |\d+\. |\|)", page.read_text(), re.S)
        assert not swallowed, f"{page}: a list or table needs an empty line before it"


CLASSES = [name for name in fa.__all__ if isinstance(getattr(fa, name), type) and name != "UserError"]


@pytest.mark.parametrize("name", [*CLASSES, "ops.softcap_attention"])
def test_examples_in_docstrings(name):
    found = fa
    for part in name.split("."):
        found = getattr(found, part)
    (test,) = doctest.DocTestFinder(recurse=False).find(found, name, globs={"fa": fa, "torch": torch})
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


def test_dir_shows_public_names():
    assert dir(fa) == sorted(fa.__all__)
    assert dir(fa.ops) == sorted(fa.ops.__all__)
