"""Labels within tar shards: members `KEY.cls`, as WebDataset writes them."""

import os
import tarfile

from fastalign.errors import UserError

_LONGEST = 4096


def sample_key(name: str) -> str:
    """What the members of one sample have in common: folder and name up to the first dot of the latter."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.split(".", 1)[0])  # noqa: PTH118, a member's name is no path


def read_classes(shard: str) -> dict[str, str]:
    """The classes in a shard: sample key -> text of its `.cls`.

    Args:
        shard: path of a tar file.

    Raises:
        UserError: a `.cls` that is no short line of text, or a shard that changed.
    """
    found = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isreg() or not member.name.endswith(".cls"):
                    continue
                if not 0 < member.size <= _LONGEST:
                    raise UserError(
                        f"{shard}:{member.name} has {member.size} bytes; a class is a line of text"
                    )
                found[sample_key(member.name)] = tar.extractfile(member).read().decode().strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{shard}:{member.name} is not UTF-8; a class is a line of text") from error
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"cannot read the labels of {shard}: {error}; fetch it again") from error
    return found
