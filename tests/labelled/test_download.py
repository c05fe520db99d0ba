"""The downloader, against a server of this machine that can break off, know no ranges and refuse."""

import hashlib
import io
import json
import re
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from fastalign.labelled import archives, datasets, download, transfer

NAMES = (
    "train2017.zip",
    "val2017.zip",
    "stuffthingmaps_trainval2017.zip",
    "panoptic_annotations_trainval2017.zip",
)


def encoded(kind, value, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (4, 3), value).save(buffer, kind)
    return buffer.getvalue()


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def coco_files():
    """The four archives in small: three training images, one validation image."""
    numbers = {"train": ("000000000009", "000000000025", "000000000030"), "val": ("000000000139",)}
    files, stuff, panoptic = {}, {"train2017/": b""}, {}
    for split, names in numbers.items():
        pictures = {f"{split}2017/": b""} | {
            f"{split}2017/{n}.jpg": encoded("JPEG", (9, 9, 9)) for n in names
        }
        files[f"{split}2017.zip"] = zipped(pictures)
        stuff |= {f"{split}2017/{n}.png": encoded("PNG", 0, "L") for n in names}
        inner = {f"panoptic_{split}2017/{n}.png": encoded("PNG", (7, 0, 0)) for n in names}
        segments = [{"id": 7, "category_id": 1}]
        content = {
            "categories": [{"id": 1, "name": "person"}],
            "annotations": [{"file_name": f"{n}.png", "segments_info": segments} for n in names],
        }
        panoptic[f"annotations/panoptic_{split}2017.zip"] = zipped(inner | {"__MACOSX/._x": b"y"})
        panoptic[f"annotations/panoptic_{split}2017.json"] = json.dumps(content).encode()
    return files | {NAMES[2]: zipped(stuff), NAMES[3]: zipped(panoptic)}


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.cuts` are bytes after which the next answers break off."""

    def do_GET(self):
        server, name = self.server, self.path.rpartition("/")[2]
        asked = self.headers.get("Range")
        server.log.append((name, asked))
        if server.status:
            self.send_error(server.status.pop(0))
            return
        if name not in server.files:
            self.send_error(404)
            return
        data = server.files[name]
        start = int(asked[6:-1]) if asked and server.ranges else 0
        if start >= len(data):
            self.send_response(416)
            if server.says_length:
                self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][: server.cuts.pop(0)] if server.cuts else data[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """The server; its digests are the published ones, and nobody waits between tries."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.log, server.cuts, server.status = coco_files(), [], [], []
    server.ranges = server.says_length = True
    server.url = f"http://127.0.0.1:{server.server_port}/zips"
    publish(server, monkeypatch)
    monkeypatch.setattr(transfer, "PAUSE", 0.0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def publish(server, monkeypatch):
    """Makes the digests of the server's files the published ones."""

    def known(archive):
        if archive.digest is None:
            return archive
        algorithm = archive.digest.partition(":")[0]
        data = server.files.get(archive.name, b"")
        return replace(archive, digest=f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}")

    monkeypatch.setattr(archives, "COCO_IMAGES", tuple(map(known, archives.COCO_IMAGES)))
    monkeypatch.setattr(archives, "COCO_PANOPTIC", known(archives.COCO_PANOPTIC))
    monkeypatch.setattr(archives, "ADE20K", known(archives.ADE20K))


def run(server, root, *options, data="coco"):
    return download.main([data, "--to", str(root), "--base-url", server.url, *options])


def refused(capsys, server, root, *options, data="coco"):
    """The one line with which the command ends."""
    capsys.readouterr()
    assert run(server, root, *options, data=data) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("fastalign: ")
    return message


def listing(root):
    """What lies in the folder, but for the lock (and the package's own cache, which tests keep there)."""
    names = (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return sorted(name for name in names if name != ".download.lock" and not name.startswith("cache/"))


def test_coco_is_fetched_unpacked_and_can_be_opened(server, tmp_path, monkeypatch):
    assert run(server, tmp_path) == 0
    assert listing(tmp_path) == sorted(
        [
            "checksums.json",
            *(f"images/train2017/{n}.jpg" for n in ("000000000009", "000000000025", "000000000030")),
            *(f"annotations/train2017/{n}.png" for n in ("000000000009", "000000000025", "000000000030")),
            "images/val2017/000000000139.jpg",
            "annotations/val2017/000000000139.png",
        ]
    )
    assert [name for name, _ in server.log] == list(NAMES[:3])
    record = json.loads((tmp_path / "checksums.json").read_text())
    for name in NAMES[:3]:
        assert record[name]["sha256"] == hashlib.sha256(server.files[name]).hexdigest()
        assert record[name]["bytes"] == len(server.files[name])
    monkeypatch.setitem(datasets.HELD_OUT, "coco", 1)
    opened = {split: datasets.open_labelled(f"coco:{tmp_path}", split) for split in datasets.SPLITS}
    assert {split: len(images) for split, images in opened.items()} == {"train": 2, "val": 1, "test": 1}
    assert (opened["test"].label_map(0) == 1).all()


def test_panoptic_archives_lie_in_an_archive(server, tmp_path):
    assert run(server, tmp_path, "--panoptic", "--splits", "test") == 0
    assert listing(tmp_path) == [
        "annotations/panoptic_val2017.json",
        "annotations/panoptic_val2017/000000000139.png",
        "checksums.json",
        "images/val2017/000000000139.jpg",
    ]
    assert (datasets.open_labelled(f"coco-panoptic:{tmp_path}", "test").label_map(0) == 1).all()


def test_ade20k_keeps_only_images_and_maps(server, tmp_path, monkeypatch):
    members = {"ADEChallengeData2016/objectInfo150.txt": b"x", "ADEChallengeData2016/images/training/": b""}
    for part, short in (("training", "train"), ("validation", "val")):
        stem = f"ADE_{short}_00000001"
        members[f"ADEChallengeData2016/images/{part}/{stem}.jpg"] = encoded("JPEG", (1, 2, 3))
        members[f"ADEChallengeData2016/annotations/{part}/{stem}.png"] = encoded("PNG", 150, "L")
    server.files["ADEChallengeData2016.zip"] = zipped(members)
    publish(server, monkeypatch)
    assert run(server, tmp_path, "--splits", "test", data="ade20k") == 0
    assert listing(tmp_path) == [
        "annotations/validation/ADE_val_00000001.png",
        "checksums.json",
        "images/validation/ADE_val_00000001.jpg",
    ]
    assert (datasets.open_labelled(f"ade20k:{tmp_path}", "test").label_map(0) == 150).all()
    # More splits later: the archive is fetched again, what is there stays.
    assert run(server, tmp_path, data="ade20k") == 0
    assert len(listing(tmp_path)) == 5


def test_a_second_command_asks_for_nothing(server, tmp_path, capsys):
    assert run(server, tmp_path) == 0
    server.log.clear()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(server, tmp_path, "--splits", "train,val") == 0
    assert server.log == []
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "already unpacked" in capsys.readouterr().out


def test_what_was_deleted_since_is_fetched_again(server, tmp_path):
    assert run(server, tmp_path) == 0
    (tmp_path / "images/train2017/000000000025.jpg").unlink()
    server.log.clear()
    assert run(server, tmp_path) == 0
    assert server.log == [("train2017.zip", None)]
    assert (tmp_path / "images/train2017/000000000025.jpg").exists()


def test_a_transfer_that_breaks_off_goes_on_where_it_was(server, tmp_path):
    server.cuts = [100, 50]
    assert run(server, tmp_path, "--keep-archives") == 0
    assert server.log[:3] == [("train2017.zip", span) for span in (None, "bytes=100-", "bytes=150-")]
    for name in NAMES[:3]:
        assert (tmp_path / name).read_bytes() == server.files[name]


def test_a_transfer_given_up_is_kept_and_the_next_command_goes_on(server, tmp_path, capsys):
    server.cuts = [100] + [0] * transfer.ATTEMPTS
    assert "cut off at 100 of" in refused(capsys, server, tmp_path)
    assert (tmp_path / "train2017.zip.part").stat().st_size == 100
    server.log.clear()
    assert run(server, tmp_path) == 0
    assert server.log[0] == ("train2017.zip", "bytes=100-")


@pytest.mark.parametrize("says_length", [True, False])
def test_a_part_that_is_complete_already_is_taken(server, tmp_path, says_length):
    server.says_length = says_length
    (tmp_path / "train2017.zip.part").write_bytes(server.files["train2017.zip"])
    assert run(server, tmp_path, "--keep-archives") == 0
    assert (tmp_path / "train2017.zip").read_bytes() == server.files["train2017.zip"]
    assert [name for name, _ in server.log].count("train2017.zip") == 1


def test_a_part_longer_than_the_file_begins_anew(server, tmp_path):
    (tmp_path / "train2017.zip.part").write_bytes(server.files["train2017.zip"] + b"more")
    assert run(server, tmp_path, "--keep-archives") == 0
    assert (tmp_path / "train2017.zip").read_bytes() == server.files["train2017.zip"]


def test_a_server_without_ranges_sends_all_of_it_again(server, tmp_path):
    server.ranges = False
    server.cuts = [100]
    assert run(server, tmp_path, "--keep-archives") == 0
    assert (tmp_path / "train2017.zip").read_bytes() == server.files["train2017.zip"]


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.status = [503, 500, 429]
    assert run(server, tmp_path) == 0
    assert [name for name, _ in server.log[:4]] == ["train2017.zip"] * 4


def test_a_file_that_moved_is_one_line(server, tmp_path, capsys):
    del server.files["val2017.zip"]
    assert "404" in refused(capsys, server, tmp_path)
    assert (tmp_path / "images/train2017").is_dir()  # what came before stays


def test_no_server_is_one_line(server, tmp_path, capsys):
    server.url = "http://127.0.0.1:1"  # nothing listens at port 1
    assert "no connection" in refused(capsys, server, tmp_path)
    server.url = "somewhere"
    assert "--base-url" in refused(capsys, server, tmp_path)


def test_an_archive_that_is_not_the_published_one_is_deleted(server, tmp_path, capsys):
    genuine = server.files["train2017.zip"]
    server.files["train2017.zip"] = genuine[:200] + bytes([genuine[200] ^ 1]) + genuine[201:]
    message = refused(capsys, server, tmp_path)
    assert hashlib.sha256(genuine).hexdigest() in message
    assert listing(tmp_path) == []
    server.files["train2017.zip"] = genuine
    assert run(server, tmp_path) == 0


def test_an_archive_without_a_published_digest_is_checked_by_its_crcs(server, tmp_path, capsys):
    genuine = server.files[NAMES[2]]
    at = genuine.index(b"train2017/000000000025.png") + 40  # inside the file's data
    server.files[NAMES[2]] = genuine[:at] + bytes([genuine[at] ^ 255]) + genuine[at + 1 :]
    assert "damaged" in refused(capsys, server, tmp_path)
    assert not (tmp_path / NAMES[2]).exists()
    assert not (tmp_path / "annotations/train2017/000000000025.png").exists()
    assert not list(tmp_path.rglob("*.part"))
    server.files[NAMES[2]] = genuine
    assert run(server, tmp_path) == 0


def test_an_archive_without_a_published_digest_must_stay_what_it_was(server, tmp_path, capsys):
    assert run(server, tmp_path) == 0
    (tmp_path / "annotations/train2017/000000000025.png").unlink()
    server.files[NAMES[2]] = zipped({"train2017/000000000025.png": b"other"})
    message = refused(capsys, server, tmp_path)
    assert "first download" in message
    assert json.loads((tmp_path / "checksums.json").read_text())[NAMES[2]]["sha256"] in message
    assert not (tmp_path / "annotations/train2017/000000000025.png").exists()


def test_something_else_than_an_archive_is_one_line(server, tmp_path, capsys):
    server.files[NAMES[2]] = b"<html>please log in</html>"
    assert "damaged" in refused(capsys, server, tmp_path)
    server.files[NAMES[2]] = zipped({"elsewhere/x.png": b"x"})
    assert "holds no train2017/" in refused(capsys, server, tmp_path)


def test_members_never_leave_their_folder(server, tmp_path):
    server.files[NAMES[2]] = zipped(
        {
            f"{s}2017/{n}": b"x"
            for s in ("train", "val")
            for n in ("a.png", "../../evil.png", "..", "sub/b.png")
        }
    )
    assert run(server, tmp_path / "root") == 0
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == ["a.png", "a.png"]


def test_unpacking_goes_on_and_replaces_torn_files(server, tmp_path):
    (tmp_path / "images/train2017").mkdir(parents=True)
    torn = tmp_path / "images/train2017/000000000009.jpg"
    torn.write_bytes(encoded("JPEG", (9, 9, 9))[:-4] + b"torn")  # the size is right
    kept = tmp_path / "images/train2017/000000000025.jpg"
    kept.write_bytes(encoded("JPEG", (9, 9, 9)))
    stamp = kept.stat().st_ino
    assert run(server, tmp_path) == 0
    assert torn.read_bytes() == encoded("JPEG", (9, 9, 9))
    assert kept.stat().st_ino == stamp  # a new file would have another


def test_a_full_disk_is_one_line_and_nothing_is_lost(server, tmp_path, capsys, monkeypatch):
    usage = transfer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: usage._replace(free=10))
    assert "10 bytes free" in refused(capsys, server, tmp_path)
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer, "PAUSE", 0.0)
    publish(server, monkeypatch)
    monkeypatch.setattr(download.shutil, "copyfileobj", full)
    assert "No space left on device" in refused(capsys, server, tmp_path)
    assert (tmp_path / "train2017.zip").exists()
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    publish(server, monkeypatch)
    server.log.clear()
    assert run(server, tmp_path) == 0
    assert [name for name, _ in server.log] == list(NAMES[1:3])


def test_bad_arguments_are_one_line(server, tmp_path, capsys):
    assert "trian" in refused(capsys, server, tmp_path, "--splits", "trian,val")
    assert "--panoptic" in refused(capsys, server, tmp_path, "--panoptic", data="ade20k")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, server, tmp_path / "file")
    (tmp_path / "checksums.json").write_text("[1")
    assert "checksums.json" in refused(capsys, server, tmp_path)
    with pytest.raises(SystemExit) as caught:
        download.main(["imagenet", "--to", str(tmp_path)])
    assert caught.value.code == 2


def test_two_commands_do_not_write_into_one_folder(server, tmp_path, capsys):
    with download._alone(tmp_path):
        assert "another download" in refused(capsys, server, tmp_path)
    assert run(server, tmp_path) == 0


def test_stopped_by_hand_it_says_so(server, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "fetch", stop)
    assert run(server, tmp_path) == 130
    assert "goes on" in capsys.readouterr().err


def test_published_digests_are_whole():
    lengths = {"sha256": 64, "sha1": 40}
    found = [
        *archives.archives("coco", True),
        *archives.archives("coco", False),
        *archives.archives("ade20k", False),
    ]
    digests = [archive.digest for archive in found if archive.digest]
    assert len(set(digests)) == 4
    for digest in digests:
        algorithm, _, value = digest.partition(":")
        assert re.fullmatch(r"[0-9a-f]+", value)
        assert len(value) == lengths[algorithm]
