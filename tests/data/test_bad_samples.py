"""Bad samples are replaced by a rule, left out of evaluation, listed, and found by `scan`; too many end a run."""

import os

import numpy as np
import pytest
import torch

from fastalign.data import pipeline
from fastalign.data.pipeline import BadSample, BadSamples, DecodeError, Decoder, SampleReader, read_list
from fastalign.data.sources import open_source
from fastalign.scan import main
from fastalign.utils.errors import UserError
from fastalign.utils.random import permutation
from tests.data.odd_images import REFUSED, damaged
from tests.data_helpers import EVAL, TRAIN, age, batches_of, needs_dali, small_photos, write_folder, write_tar

COUNT = 48
TEXT = np.frombuffer(b"text", np.uint8)
BAD = {3: "text", 4: "GIF", 5: "cut", 17: "damaged", 18: "empty", 30: "damaged", 47: "damaged"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """48 good images; the same with seven bad ones among them, three of which only the decoder notices."""
    photos = small_photos(COUNT)
    good = {f"{i:03d}.jpg": p for i, p in enumerate(photos)}
    kinds = {"text": lambda _: TEXT, "GIF": lambda _: REFUSED["begins with b'GIF87a"], "damaged": damaged}
    kinds |= {"empty": lambda _: TEXT[:0], "cut": lambda photo: photo[: len(photo) // 2]}
    bad = good | {f"{index:03d}.jpg": kinds[kind](photos[index]) for index, kind in BAD.items()}
    root = tmp_path_factory.mktemp("bad")
    return [open_source(str(write_folder(root / name, files))) for name, files in (("a", good), ("b", bad))]


def replacement(index: int) -> int:
    while index in BAD:
        index = (index + 1) % COUNT
    return index


@needs_dali
def test_bad_samples_are_replaced_by_the_next_good_one_bit_for_bit(sources):
    """Against the pixels of a clean data set, whatever the ranks, the start and what was known before."""
    clean, dirty = sources
    options, pixels = {"seed": 3, "epoch": 1}, {}
    for batch in batches_of(clean, TRAIN, batch_size=16, **options):
        pixels |= dict(zip(batch.ids.tolist(), batch.images, strict=True))
    expected = [replacement(int(i)) for i in permutation(COUNT, seed=3, epoch=1)]

    def check(start=0, world=1, **other):
        other |= options | {"batch_size": 16 // world, "world_size": world, "start": start}
        loaders = [batches_of(dirty, TRAIN, rank=rank, **other) for rank in range(world)]
        for step, ranks in enumerate(zip(*loaders, strict=True), start):
            ids = expected[step * 16 : step * 16 + 16]
            assert torch.cat([batch.ids for batch in ranks]).tolist() == ids
            assert torch.equal(torch.cat([b.images for b in ranks]), torch.stack([pixels[i] for i in ids]))
        return [{sample for batch in ranks for sample in batch.bad} for ranks in zip(*loaders, strict=True)]

    found = check(bad=(known := BadSamples()))
    assert {sample.id for step in found for sample in step} == set(known.found) == set(BAD)
    for index, reason in {4: "GIF", 18: "zero bytes", 5: "truncated", 30: "cannot decode"}.items():
        assert reason in known.found[index].reason
    # Known already, as in the next epoch or after a resume: the same samples, and the same report.
    assert check(bad=known) == found
    for quarantine in (set(BAD), {3, 17, 47}):
        reported = check(bad=BadSamples(quarantine))
        assert {sample.id for step in reported for sample in step} == set(BAD) - quarantine
    for start, world in ((1, 1), (2, 1), (0, 2), (0, 4)):
        check(start, world, bad=BadSamples())


@needs_dali
def test_evaluation_leaves_bad_samples_out(sources, monkeypatch):
    """Also if a batch fails although its images are good, for example for lack of memory."""
    clean, dirty = sources
    images = torch.cat([b.images for b in batches_of(clean, EVAL, batch_size=16, train=False)])
    collect = Decoder.collect

    def short_of_memory(decoder):
        decoded = collect(decoder)
        if decoded and len(decoded[0][0]) > 7:
            raise DecodeError("out of memory")
        return decoded

    monkeypatch.setattr(Decoder, "collect", short_of_memory)
    for size in (1, 7, 16):
        batches = batches_of(dirty, EVAL, batch_size=size, train=False, bad=(known := BadSamples()))
        ids = torch.cat([b.ids for b in batches]).tolist()
        assert ids == [i for i in range(COUNT) if i not in BAD]
        assert torch.equal(torch.cat([b.images for b in batches]), images[ids])
        assert set(known.found) == set(BAD)
    assert batches_of(dirty, TRAIN, batch_size=1, train=False, bad=BadSamples(range(COUNT))) == []


@needs_dali
def test_a_hundred_bad_samples_in_a_row_are_an_error(tmp_path):
    files = {f"{i:03d}.jpg": small_photos(1)[0] for i in range(4)}
    files |= {f"{i:03d}.jpg": TEXT for i in range(4, 104)}
    source = open_source(str(write_folder(tmp_path / "a", files)))
    for train in (True, False):
        with pytest.raises(UserError, match=r"100 images in a row cannot be used.*'103\.jpg'.*is the disk"):
            batches_of(source, EVAL, batch_size=4, train=train, bad=BadSamples())
        rest = batches_of(source, EVAL, batch_size=4, train=train, bad=BadSamples([50]))
        assert {int(i) for batch in rest for i in batch.ids} == {0, 1, 2, 3}
    few = open_source(str(write_folder(tmp_path / "b", dict(list(files.items())[4:20]))))
    with pytest.raises(UserError, match="none of the 16 images can be used"):
        batches_of(few, TRAIN, batch_size=4, bad=BadSamples())


def test_unreadable_files_are_bad_and_block_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_RETRY_AFTER", ())
    root = write_folder(tmp_path / "a", {f"{i}.jpg": p for i, p in enumerate(small_photos(4))})
    os.mkfifo(root / "4.jpg")
    (root / "5.jpg").symlink_to(root / "nowhere")
    source = open_source(str(root))
    assert len(source) == 6
    for name in ("0.jpg", "1.jpg"):
        (root / name).unlink()
    (root / "1.jpg").mkdir()
    reader = SampleReader(source, (bad := BadSamples()), replace=True)
    assert [reader.read(i).id for i in range(6)] == [2, 2, 2, 3, 2, 2]
    missing, folder, pipe = "No such file or directory", "Is a directory", "not a regular file"
    assert {i: s.reason for i, s in bad.found.items()} == {0: missing, 1: folder, 4: pipe, 5: missing}


def test_a_disk_that_fails_for_a_moment_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_RETRY_AFTER", (0.01, 0.01))
    root = write_folder(tmp_path / "a", {f"{i}.jpg": p for i, p in enumerate(small_photos(2))})
    source, opened, real = open_source(str(root)), [], os.open

    def fails_at_first(path, *arguments):
        opened.append(path)
        if len(opened) <= failures:
            raise OSError(5, "Input/output error")
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", fails_at_first)
    for failures, expected in ((2, 0), (3, 1)):  # noqa: B007, the function reads it
        opened.clear()
        assert SampleReader(source, BadSamples(), replace=True).read(0).id == expected


def test_lists_on_disk(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    a, b, c = BadSample(1, "1.jpg", "GIF"), BadSample(None, "a.tar", "damaged"), BadSample(3, "3.jpg", "cut")
    for samples in ([a], [], [b]):
        pipeline.append_to_list(path, samples)
    for torn in range(1, len(pipeline.to_line(c)) - 1):
        path.write_bytes(pipeline.to_line(a) + pipeline.to_line(b) + pipeline.to_line(c)[:torn])
        assert read_list(path) == [a, b]
        pipeline.append_to_list(path, [c])
        assert read_list(path) == [a, b, c]
    for wrong in (b"text\n", b"[1]\n", b'{"id": 1, "name": [2]}\n', b'{"id": 1}\n'):
        path.write_bytes(pipeline.to_line(a) + wrong + pipeline.to_line(c))
        with pytest.raises(UserError, match=r"line 2 is not .*; remove that line$"):
            read_list(path)
    with pytest.raises(UserError, match=r"cannot read .*nowhere"):
        read_list(tmp_path / "nowhere")


def test_a_list_is_matched_by_name(tmp_path):
    odd = [b"new\nline.jpg", b"not utf-8 \xff\xfe.jpg", "\N{GRINNING FACE}.jpg".encode(), b'"\\.jpg']
    files = dict.fromkeys(["!.jpg", "1.jpg", *map(os.fsdecode, odd)], small_photos(1)[0])
    root = write_folder(tmp_path / "a", files)
    source, path = open_source(str(root)), tmp_path / "q.jsonl"
    bad = [BadSample(i, source.name(i), "GIF") for i in range(1, 6)]
    pipeline.append_to_list(path, [*bad, BadSample(None, "a.tar", "damaged")])
    assert read_list(path)[:-1] == bad
    assert pipeline.read_quarantine(path, source) == set(range(1, 6))
    (root / "!.jpg").unlink()  # every id shifts
    age(root)
    assert pipeline.read_quarantine(path, open_source(str(root))) == set(range(5))
    path.write_bytes(pipeline.to_line(BadSample(0, "else.jpg", "")))
    with pytest.raises(UserError, match=r"faults\.quarantine=.*q\.jsonl: none of its 1 names.*'else\.jpg'"):
        pipeline.read_quarantine(path, source)


def test_how_many_are_too_many():
    stops = ((1, 100, 0.0), (11, 100, 0.01), (12, 1100, 0.01))
    fine = ((0, 100, 0.0), (10, 100, 0.01), (11, 1100, 0.01), (11, 11, 1.0), (500, 50_000, 0.01))
    assert [pipeline.too_many(*case) for case in stops + fine] == [True] * 3 + [False] * 5


@needs_dali
def test_scan_lists_what_training_finds(tmp_path, capsys):
    photos = small_photos(100)  # two tasks
    files = {f"{i:03d}.jpg": p for i, p in enumerate(photos)}
    files |= {"a\nb.jpg": np.frombuffer(b"this is no image", np.uint8)}
    files |= {f"0{i:02d}.jpg": photos[i][:800] for i in (4, 95)}
    files |= {f"0{i}.jpg": damaged(photos[i]) for i in (50, 60, 70)}
    root, output = write_folder(tmp_path / "a", files), tmp_path / "new/q.jsonl"
    (root / "080.jpg").unlink()
    (root / "080.jpg").symlink_to(tmp_path / "not-mounted/080.jpg")
    assert main([str(root), "--output", str(output), "--workers", "1"]) == 0
    output_text, error_text = capsys.readouterr()
    source, known = open_source(str(root)), BadSamples()
    batches = batches_of(source, EVAL, batch_size=16, train=False, bad=known)
    assert [known.found[index] for index in sorted(known.found)] == read_list(output)
    assert pipeline.read_quarantine(output, source) == set(range(101)) - set(
        torch.cat([b.ids for b in batches]).tolist()
    )
    assert output_text.splitlines() == [
        f"{root}: 101 images, 7 bad (6.93%)",
        "  3 x damaged: DALI cannot decode it (such as '050.jpg')",
        "  2 x truncated: a JPEG without its end (such as '004.jpg')",
        "  1 x No such file or directory (such as '080.jpg')",
        "  1 x not a JPEG, PNG or WebP file: it begins with b'this is no i' (such as 'a\\nb.jpg')",
        f"quarantine list: {output}; train with faults.quarantine={output}",
    ]
    assert "100% checked, 7 bad" in error_text


@needs_dali
def test_scan_of_a_damaged_shard(tmp_path, capsys):
    photos = small_photos(2)
    path = write_tar(tmp_path / "t/0.tar", [(f"{i}.jpg", p) for i, p in enumerate(photos)])
    path.write_bytes(path.read_bytes()[: len(photos[0]) + 1024])
    age(path.parent)
    assert main([str(path), "--workers", "1", "--output", str(tmp_path / "q.jsonl")]) == 0
    assert "1 images, 0 bad (0.00%)\n  incomplete: '0.tar', damaged at byte" in capsys.readouterr().out
    (shard,) = read_list(tmp_path / "q.jsonl")
    assert (shard.id, shard.name) == (None, "0.tar")


def test_bad_input_is_refused_before_the_scan_and_the_list(tmp_path, capsys):
    root = write_folder(tmp_path / "a", {"1.jpg": small_photos(1)[0]})
    for arguments, message in (
        ([str(tmp_path / "none")], "no such folder"),
        (["synthetic", "--output", str(tmp_path / "new/q.jsonl")], "no files to check"),
        ([str(root), "--workers", "0"], "--workers 0"),
        ([str(root), "--output", str(tmp_path)], "is a directory; name a file"),
        ([str(root), "--output", "/proc/q.jsonl"], "/proc/q.jsonl cannot be written ("),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
