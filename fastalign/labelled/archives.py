"""Where COCO 2017 and ADE20K are published, and what the probes take from each archive.

COCO's digests are those of the sites' files that several projects have published; COCO-Stuff's maps have none.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A folder or file of an archive that is used."""

    split: str
    """the published split that it belongs to, "train" or "val" """
    inside: str
    """its path in the archive; a folder ends in /"""
    to: str
    """its path below ROOT"""
    inner: str = ""
    """the folder to take where `inside` is an archive itself"""


@dataclass(frozen=True)
class Archive:
    """A zip file and what is taken from it."""

    url: str
    digest: str | None
    """"algorithm:hex" as published; None where nobody has"""
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


def _images(split: str, digest: str) -> Archive:
    piece = Piece(split, f"{split}2017/", f"images/{split}2017")
    return Archive(f"http://images.cocodataset.org/zips/{split}2017.zip", digest, (piece,))


COCO_IMAGES = (
    _images("train", "sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
    _images("val", "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
)
COCO_STUFF = Archive(
    "https://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip",
    None,
    tuple(Piece(split, f"{split}2017/", f"annotations/{split}2017") for split in ("train", "val")),
)
COCO_PANOPTIC = Archive(
    "http://images.cocodataset.org/annotations/panoptic_annotations_trainval2017.zip",
    "sha256:c05f76d2129b6b561eb70efe16e7006df62f73fb92889132d373b9d90e31a370",
    tuple(
        piece
        for split in ("train", "val")
        for name in [f"annotations/panoptic_{split}2017"]
        for piece in (
            Piece(split, f"{name}.zip", name, f"panoptic_{split}2017/"),
            Piece(split, f"{name}.json", f"{name}.json"),
        )
    ),
)
ADE20K = Archive(
    "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
    "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
    tuple(
        Piece(split, f"ADEChallengeData2016/{kind}/{part}/", f"{kind}/{part}")
        for split, part in (("train", "training"), ("val", "validation"))
        for kind in ("images", "annotations")
    ),
)


def archives(data: str, panoptic: bool) -> tuple[Archive, ...]:
    """What a data set consists of; the images come before their maps, so that a half-unpacked set is noticed."""
    if data == "ade20k":
        return (ADE20K,)
    return (*COCO_IMAGES, COCO_PANOPTIC if panoptic else COCO_STUFF)
