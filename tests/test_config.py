"""The configuration: types, nearest keys, bases, the frozen list of keys."""

import pytest
import yaml

from fastalign.config import Config, kinds, load_config, to_yaml
from fastalign.utils.errors import UserError
from fastalign.utils.sections import Kind, fields

KEYS = """
output resume seed max_steps objective
student.name student.weights student.kwargs student.softcap student.head student.freeze
teacher.name teacher.weights teacher.kwargs teacher.skip_blocks teacher.prefix_only
decoder.layers decoder.kwargs.width decoder.kwargs.heads decoder.kwargs.qk_norm decoder.kwargs.qkv_bias
decoder.kwargs.init_values
masks.distribution masks.ratio masks.complement masks.full masks.mode
loss.name loss.target_scale
data.train data.val data.crop data.scale data.ratio data.hflip data.color_jitter data.randaugment data.mixup
data.cutmix data.threads data.hw_decoder_load
optim.batch_size optim.accumulate optim.micro_batch optim.epochs optim.lr optim.min_lr optim.warmup_epochs
optim.weight_decay optim.betas optim.clip optim.ema
checkpoint.every_steps checkpoint.keep
probe.data probe.every_steps probe.best
export.to log.every_steps log.to
efficiency.precision efficiency.compile efficiency.grad_checkpointing efficiency.attention
faults.bad_samples faults.quarantine faults.nonfinite faults.timeout
"""
FREE = """
output resume export.to data.threads data.hw_decoder_load optim.accumulate optim.micro_batch
checkpoint.every_steps checkpoint.keep log.every_steps log.to
efficiency.compile efficiency.grad_checkpointing efficiency.attention
faults.bad_samples faults.quarantine faults.nonfinite faults.timeout
"""
"""May change when a run resumes. `max_steps` may grow; everything else decides the result."""


def write(tmp_path, text, name="c.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_the_list_of_keys_is_frozen_and_each_has_its_kind():
    wanted = {key: Kind.FREE if key in FREE.split() else Kind.RESULT for key in KEYS.split()}
    assert kinds() == wanted | {"max_steps": Kind.GROWS}, (
        "a key was added or removed: note it in the CHANGELOG"
    )
    assert len(kinds()) == 68


def test_each_key_is_documented_with_its_kind_and_its_values():
    lines = to_yaml(Config(), comments=True).splitlines()
    for _, field, kind in fields(Config):
        found = [line for line in lines if f"  # {field.description}" in line]
        assert found
        assert all(line.endswith(f" ({kind.value})") == (kind is not Kind.RESULT) for line in found)
    (compile,) = (line for line in lines if line.startswith("  compile: false  # torch.compile"))
    assert compile.endswith(" [true | false | blocks] (may change when a run resumes)")


def test_defaults_are_a_published_recipe():
    """Which the tests of recipes compare with the authors'."""
    assert load_config("in1k-vit-b") == load_config(None, ["output=runs/in1k-vit-b", "optim.min_lr=3e-5"])


def test_overrides_are_parsed_by_the_type_of_their_key(tmp_path):
    path = write(tmp_path, "optim: {lr: 1e-4}\nstudent: {kwargs: {img_size: 64}}\n")
    overrides = ["optim.betas=[0.8, 0.9]", "student.kwargs.depth=3", "student.softcap=null", "optim.clip=2e0"]
    overrides += ["efficiency.compile=true", "data.train=a=b", "loss.target_scale=1e-3"]
    overrides += ["student.kwargs.init_values=1e-5"]
    config = load_config(path, overrides)
    assert config.optim.lr == 1e-4
    assert config.optim.betas == (0.8, 0.9)
    assert config.student.kwargs == {"img_size": 64, "depth": 3, "init_values": 1e-5}
    assert config.student.softcap is None
    assert config.efficiency.compile is True
    assert config.optim.clip == 2.0
    assert config.data.train == "a=b"
    assert config.loss.target_scale == 1e-3
    assert load_config(path, ["loss.target_scale=auto:3"]).loss.target_scale == "auto:3"


def test_a_section_keeps_its_other_keys(tmp_path):
    path = write(
        tmp_path, "decoder: {kwargs: {qk_norm: true}}\noptim: {lr: 1e-4}\nstudent: {kwargs: {depth: 2}}"
    )
    whole = load_config(path, ["optim={epochs: 7, clip: null}", "student={kwargs: {img_size: 64}}"])
    assert (whole.optim.lr, whole.optim.epochs, whole.optim.clip) == (1e-4, 7, None)
    assert whole.student.kwargs == {"img_size": 64}  # a value, not a section
    parts = load_config(path, ["decoder.kwargs.init_values=null"]).decoder.kwargs
    assert parts == Config().decoder.kwargs.model_copy(update={"qk_norm": True, "init_values": None})


def test_a_base_is_merged_and_its_own_keys_win(tmp_path):
    write(tmp_path, "seed: 1\noptim: {lr: 1e-3, epochs: 7}\n", "base.yaml")
    config = load_config(write(tmp_path, "base: base.yaml\noptim: {lr: 2e-3}\n"))
    assert (config.seed, config.optim.lr, config.optim.epochs) == (1, 2e-3, 7)


def test_yaml_out_is_yaml_in(tmp_path):
    text = "output: '1e5'\noptim: {ema: 0.99}\nteacher: {kwargs: {a: [1, 2e-7]}}\n"
    config = load_config(write(tmp_path, text))
    for comments in (False, True):
        assert load_config(write(tmp_path, to_yaml(config, comments=comments), "o.yaml")) == config
    assert "# peak learning rate" in to_yaml(config, comments=True)
    assert yaml.safe_load(to_yaml(config))["optim"]["ema"] == 0.99


@pytest.mark.parametrize(
    ("text", "override", "words"),
    [
        ("", "optim.lrr=3", ["command line: unknown key optim.lrr", "nearest is optim.lr"]),
        ("optim: {lr: 1e-4}", "optim.lr=fast", ["command line: optim.lr: ", "number", "fast"]),
        ("optim: {accumulate: 7}", None, ["c.yaml: optim.batch_size 1024"]),
        ("optim: {lrr: 3}", "optim.lr=3", ["c.yaml: unknown key optim.lrr"]),
        ("", "output=off", ["output: YAML reads this value as False, not as text; put it in quotes"]),
        ("", "student.name=", ["student.name: YAML reads this value as None, not as text"]),
        ("", "student.softcap=true", ["command line: student.softcap: give a number, got True"]),
        ("", "output=2026-11-30", ["output: YAML reads this value as datetime.date", "put it in quotes"]),
        ("", "decoder.kwargs.heads=0", ["decoder.kwargs.heads", "greater than 0"]),
        ("", "decoder.kwargs.init_values=.inf", ["decoder.kwargs.init_values", "finite"]),
        ("", "loss.target_scale=auto:0", ["loss.target_scale: ", "valid number", "or: ", "auto:0"]),
        ("", "probe.best=true", ["probe.best", "set probe.data"]),
        ("student: {freeze: true}", "probe.data=a", ["student.freeze", "remove one"]),
        ("", "teacher.kwargs.weights=random", ["teacher.kwargs.weights: write teacher.name and teacher."]),
        ("", "student.kwargs={depth:2}", ["student.kwargs: 'depth:2' is not a name", "{depth: 6}"]),
        ("", "student.name=svit_a.b", ["student.name=svit_a.b: write vit_a.b and student.softcap=30"]),
        ("", "efficiency.compile=x", ["efficiency.compile: ", "valid boolean", "or: ", "'blocks'"]),
        ("", "optim.betas=[0.9, 1]", ["optim.betas: ", "less than 1"]),
        ("", "optim.epochs", ["optim.epochs", "section.key=value"]),
        ("", "optim.accumulate=7", ["command line: optim.batch_size 1024", "optim.accumulate"]),
        ("", "optim.warmup_epochs=9", ["optim.warmup_epochs"]),
        ("", "teacher.prefix_only=true", ["teacher.skip_blocks=0"]),
        ("", "masks.ratio=0.3", ["masks.ratio"]),
        ("masks: {mode: drop}\nteacher: {prefix_only: true, skip_blocks: 0}", None, ["masks.mode=zero"]),
        ("student: {freeze: true}", "export.to=[timm]", ["export.to", "student.freeze"]),
        ("", "log.to=[wandb]", ["log.to: ", "tensorboard|wandb:.+", "got 'wandb'"]),
        ("optim: 3", None, ["optim", "3"]),
        ("false", None, ["mapping", "bool"]),
        ("optim: {}\nseed: 1\noptim: {}", None, ["c.yaml: not YAML: the key optim twice", "line 1"]),
        ("base: none.yaml", None, ["none.yaml"]),
        ("base: c.yaml", None, ["cycle"]),
        ("base: {a: b}", None, ["base must be the path"]),
    ],
)
def test_bad_configuration_is_one_line_that_names_the_key(tmp_path, text, override, words):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text), [override] if override else [])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
