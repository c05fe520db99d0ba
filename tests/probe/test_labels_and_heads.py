"""The probe's labels, heads and metrics, against scikit-learn, PIL, timm and hand-worked cases."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn import metrics as sklearn_metrics
from torch import nn

from fastalign.evaluation.heads import TokenShape, make_head
from fastalign.evaluation.metrics import MultiClassCounts, MultiLabelCounts
from fastalign.evaluation.patch_labels import VOID, crop_and_resize, patch_labels

SHAPE = TokenShape(patches=9, prefix=2, width=24, heads=3)


def test_a_label_map_is_cropped_and_resized_as_pil_does():
    rng = np.random.default_rng(0)
    for height, width, size in ((37, 61, 24), (61, 37, 24), (24, 24, 24), (16, 40, 48), (333, 500, 224)):
        labels = rng.integers(0, 200, (height, width)).astype(np.uint8)
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        wanted = Image.fromarray(labels).crop((left, top, left + side, top + side))
        wanted = np.asarray(wanted.resize((size, size), Image.Resampling.NEAREST))
        assert np.array_equal(crop_and_resize(labels, (size, size)), wanted)


def test_a_rectangular_input_takes_the_largest_crop_of_its_shape():
    labels = np.arange(8 * 12).reshape(8, 12)
    assert np.array_equal(
        crop_and_resize(labels, (4, 8)), labels[np.ix_((1, 3, 4, 6), (0, 2, 3, 5, 6, 8, 9, 11))]
    )


def test_patch_labels_of_a_map_worked_by_hand():
    labels = np.array(
        [
            [0, 0, 1, 1],
            [0, 2, 1, 1],
            [0, 0, VOID, VOID],
            [0, 0, VOID, VOID],
        ],
        np.int16,
    )
    found = patch_labels(labels, size=(4, 4), patch=(2, 2), classes=4)
    assert found.union.tolist() == [
        [True, False, True, False],
        [False, True, False, False],
        [True, False, False, False],
        [False] * 4,
    ]
    assert found.majority.tolist() == [0, 1, 0, VOID]
    assert found.whole.tolist() == [True, True, True, False]


def test_unlabeled_counts_only_where_a_patch_has_nothing_else():
    labels = np.array([[0, 3, 0, 0], [0, 0, 0, 0]], np.int16)
    found = patch_labels(labels, size=(2, 4), patch=(2, 2), classes=4, unlabeled=0)
    assert found.union.tolist() == [[False, False, False, True], [True, False, False, False]]
    assert found.majority.tolist() == [0, 0]
    assert found.whole.tolist() == [True, False, False, True]


def test_a_tie_goes_to_the_lowest_id_and_a_remainder_is_left_out():
    labels = np.array([[2, 1, 0], [1, 2, 0], [0, 0, 0]], np.int16)
    assert patch_labels(labels, size=(3, 3), patch=(2, 2), classes=3).majority.tolist() == [1]


def scores(classes=5, images=40, patches=9, seed=0):
    """Logits with ties and, for the last class, no positive."""
    rng = np.random.default_rng(seed)
    targets = rng.random((images, patches, classes)) < np.array([0.5, 0.2, 0.05, 0.6, 0.0])
    logits = np.round(rng.normal(size=targets.shape) + 1.5 * targets - 0.7, 2)
    logits[..., 2] = -4.0  # never predicted
    return torch.from_numpy(logits), torch.from_numpy(targets)


def test_multi_label_metrics_agree_with_scikit_learn():
    logits, targets = scores()
    counts = MultiLabelCounts(5)
    for part in range(0, 40, 15):
        counts.add(logits[part : part + 15], targets[part : part + 15])
    found = counts.results()
    truth, guess = targets.flatten(0, 1).numpy(), (logits.flatten(0, 1) > 0).numpy()
    present = truth.any(0)
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(truth, guess, zero_division=0)
    accuracy = (truth == guess).mean(0)
    for name, wanted in (("recall", recall), ("precision", precision), ("f1", f1), ("accuracy", accuracy)):
        assert found[f"macro_{name}"] == pytest.approx(wanted[present].mean(), abs=1e-12)
        listed = found["per_class"][name]
        assert listed[:4] == pytest.approx(wanted[:4].tolist(), abs=1e-12)
        assert listed[4] is None
    assert found["accuracy"] == pytest.approx((truth == guess).mean(), abs=1e-12)
    assert found["per_class"]["positives"] == truth.sum(0).tolist()
    every = [
        sklearn_metrics.average_precision_score(truth[:, c], logits.flatten(0, 1)[:, c]) for c in range(4)
    ]
    # Scores are counted in bins of 1/128; these have two decimals, so that no bin holds two different ones.
    assert found["per_class"]["average_precision"][:4] == pytest.approx(every, abs=1e-12)
    assert found["map"] == pytest.approx(np.mean(every), abs=1e-12)


def test_recall_by_size_follows_the_definition():
    logits, targets = scores(seed=1)
    counts = MultiLabelCounts(5)
    counts.add(logits, targets)
    found = counts.results()["by_size"]
    hits, positives = np.zeros(10, int), np.zeros(10, int)
    for image in range(40):
        for c in range(5):
            count = int(targets[image, :, c].sum())
            if count:
                bucket = -(-count * 10 // 9) - 1  # (0, 0.1], (0.1, 0.2]... of nine patches
                positives[bucket] += count
                hits[bucket] += int(((logits[image, :, c] > 0) & targets[image, :, c]).sum())
    assert found["positives"] == positives.tolist()
    for got, hit, whole in zip(found["recall"], hits, positives, strict=True):
        assert got is None if whole == 0 else got == pytest.approx(hit / whole)


def test_multi_class_metrics_agree_with_scikit_learn_and_leave_void_out():
    rng = np.random.default_rng(2)
    targets = rng.integers(-1, 4, (30, 9))
    logits = rng.normal(size=(30, 9, 5)) + 2 * np.eye(5)[targets.clip(0)]
    logits[..., 3] = -9  # never predicted
    counts = MultiClassCounts(5)
    for part in (slice(0, 7), slice(7, 30)):
        counts.add(torch.from_numpy(logits[part]), torch.from_numpy(targets[part]))
    found = counts.results()
    kept = targets >= 0
    truth, guess = targets[kept], logits.argmax(-1)[kept]
    names = range(5)
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
        truth, guess, labels=names, zero_division=0
    )
    for name, wanted in (("recall", recall), ("precision", precision), ("f1", f1)):
        assert found[f"macro_{name}"] == pytest.approx(wanted[:4].mean(), abs=1e-12)
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, guess), abs=1e-12)
    wrong = [((truth == c) == (guess == c)).mean() for c in names]
    assert found["macro_accuracy"] == pytest.approx(np.mean(wrong[:4]), abs=1e-12)
    assert found["per_class"]["recall"][4] is None


def timm_head(classes, *, latent=0, layers=2):
    """The transformer head, written with timm's blocks."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(latent or SHAPE.patches + SHAPE.prefix, SHAPE.width))
            self.norm_pre, self.norm = nn.LayerNorm(SHAPE.width), nn.LayerNorm(SHAPE.width)
            block = timm.models.vision_transformer.Block
            self.blocks = nn.Sequential(
                *(
                    block(SHAPE.width, SHAPE.heads, init_values=0.01, norm_layer=nn.LayerNorm)
                    for _ in range(layers)
                )
            )
            self.head = nn.Linear(SHAPE.width, classes)

        def forward(self, x):
            extra = self.pos_embed.expand(len(x), -1, -1)
            x = torch.cat([x, extra], 1) if latent else x + extra
            return self.head(self.norm(self.blocks(self.norm_pre(x))))

    return Head()


@pytest.mark.parametrize(
    ("name", "labels", "take"),
    [
        ("transformer", "union", lambda x: x[:, 2:]),
        ("transformer", "majority", lambda x: x[:, 2:]),
        ("transformer", "global-union", lambda x: x[:, :2].mean(1, keepdim=True)),
        ("latent", "union", lambda x: x[:, -9:]),
        ("latent-global", "union", lambda x: x[:, -9:]),
    ],
)
def test_transformer_heads_equal_timms_blocks(name, labels, take):
    torch.manual_seed(0)
    head = make_head(name, labels, SHAPE, 4).double()
    theirs = timm_head(4, latent=9 if "latent" in name else 0).double()
    theirs.load_state_dict(head[1].state_dict())
    tokens = torch.randn(3, 11, 24, dtype=torch.float64)
    seen = tokens[:, :2].mean(1, keepdim=True) if name == "latent-global" else tokens
    torch.testing.assert_close(head(tokens), take(theirs(seen)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_simple_heads_read_the_right_tokens(name):
    torch.manual_seed(0)
    tokens = torch.randn(3, 11, 24)
    for labels, seen in (
        ("union", tokens[:, 2:]),
        ("global-in-patch", tokens[:, 2:]),
        ("global-union", tokens[:, :2].mean(1, keepdim=True)),
    ):
        head = make_head(name, labels, SHAPE, 4, hidden=16)
        assert torch.equal(head(tokens), head[1](seen))
    bare = SHAPE._replace(prefix=0)
    head = make_head(name, "global-union", bare, 4)
    assert torch.equal(head(tokens), head[1](tokens.mean(1, keepdim=True)))


def test_without_a_prefix_the_transformer_averages_its_answers():
    torch.manual_seed(0)
    head = make_head("transformer", "global-union", SHAPE._replace(prefix=0, patches=11), 4).double()
    theirs = timm_head(4).double()
    theirs.load_state_dict(head[1].state_dict())
    tokens = torch.randn(3, 11, 24, dtype=torch.float64)
    torch.testing.assert_close(head(tokens), theirs(tokens).mean(1, keepdim=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "labels", "word"),
    [
        ("conv", "union", "unknown head"),
        ("linear", "unions", "unknown labels"),
        ("latent", "global-union", "does not go"),
        ("transformer", "global-in-patch", "does not go"),
    ],
)
def test_heads_that_make_no_sense_are_refused(name, labels, word):
    with pytest.raises(ValueError, match=word):
        make_head(name, labels, SHAPE, 4)
