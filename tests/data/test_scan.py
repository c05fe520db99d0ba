"""The command that checks a data set finds what training finds; its list, summary and exit codes."""

import numpy as np
import torch

from fastalign.data.pipeline import BadSamples, read_list, read_quarantine
from fastalign.data.sources import open_source
from fastalign.scan import main
from tests.data.odd_images import damaged
from tests.data_helpers import EVAL, age, batches_of, needs_dali, small_photos, write_folder, write_tar


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
    assert read_quarantine(output, source) == set(range(101)) - set(
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
        (["synthetic", "--output", str(tmp_path / "new/q.jsonl")], "no file to check"),
        ([str(root), "--workers", "0"], "--workers 0"),
        ([str(root), "--output", str(tmp_path)], "is a directory; name a file"),
        ([str(root), "--output", "/proc/q.jsonl"], "/proc/q.jsonl cannot be written ("),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
