"""Labels of images: a table `labels.csv` in a folder; members `.cls` in tar shards, as WebDataset writes them."""

import csv
import os
import re
from pathlib import Path

from fastalign.data.tars import Damaged, members
from fastalign.utils.errors import UserError

_LONGEST = 4096


def stem(name: str) -> str:
    """A name without its suffix."""
    return name.rpartition(".")[0]


def _key(name: str) -> str:
    """What WebDataset takes for the name of a sample: folder and name up to the first dot of the latter."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.split(".", 1)[0])  # noqa: PTH118, a member's name is no path


def class_of(image: str, classes: dict[str, str]) -> str | None:
    """The class of an image: what its own name has, else what its key has.

    Names with dots are common (`IMG_2020.01.05.jpg`), and then many images have one key.

    Args:
        image: a member's name.
        classes: of its shard, from `read_classes`.
    """
    return classes.get(stem(image), classes.get(_key(image)))


def read_classes(shard: str) -> dict[str, str]:
    """The classes in a shard: the name of each `.cls` without that suffix -> its text.

    Args:
        shard: path of a tar file.

    Raises:
        UserError: a `.cls` that is no short line of text, two of one name that differ, or a shard that changed.
    """
    found: dict[str, str] = {}
    try:
        with open(shard, "rb", buffering=0) as file:  # noqa: PTH123
            for member in members(shard):
                if not member.isreg() or not member.name.endswith(".cls"):
                    continue
                where = f"{shard}:{member.name}"
                if not 0 < member.size <= _LONGEST:
                    raise UserError(f"{where} has {member.size} bytes; a class is a line of text")
                text = os.pread(file.fileno(), member.size, member.offset_data).decode().strip()
                if (other := found.setdefault(stem(member.name), text)) != text:
                    raise UserError(
                        f"{where} is in the shard twice and says {other!r} and {text!r}; remove one"
                    )
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8; a class is a line of text") from error
    except (Damaged, OSError) as error:
        raise UserError(f"cannot read the labels of {shard}: {error}; fetch it again") from error
    return found


def read_table(path: Path) -> dict[str, int]:
    """The labels in a `labels.csv`: name of an image, relative to the file's folder -> label.

    Raises:
        UserError: no header `name,label`, a label that is no integer, or two of one image.
    """
    labels: dict[str, int] = {}
    # Spreadsheets begin a UTF-8 file with a byte order mark.
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            if reader.fieldnames != ["name", "label"]:
                raise UserError(f"{path} has no header `name,label`; its first line must be that")
            for row in reader:
                if not re.fullmatch(r"\s*[+-]?\d+\s*", row["label"] or ""):
                    label = row["label"] or ""
                    raise UserError(
                        f"{path} line {reader.line_num}: {row['name']} has the label {label!r}; write an integer"
                    )
                label = int(row["label"])
                if (other := labels.setdefault(row["name"], label)) != label:
                    raise UserError(
                        f"{path} line {reader.line_num}: {row['name']} is {label}, and {other} in a line before; "
                        "remove one of them"
                    )
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error.reason}); save it in that encoding") from error
        except csv.Error as error:
            raise UserError(f"{path} line {reader.line_num}: {error}; mend that line") from error
    return labels
