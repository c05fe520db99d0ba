#!/usr/bin/env bash
# Fetch COCO 2017 or ADE20K for the patch probe:
#
#   bash examples/download.sh coco|coco-panoptic|ade20k ROOT
#
# Run it again to continue an interrupted download. Archives are verified with digests that several projects record;
# COCO-Stuff has none, so the CRCs of its members are checked. Zip files stay in ROOT/archives; you can delete them
# once the probe runs.
# BASE_URL selects a mirror (https or file) with the same file names.
# Needs curl and python3; 20 GB for COCO's images and as much again to unpack them.
set -euo pipefail
data=${1:-} root=${2:-}
case "$data" in
  coco | coco-panoptic | ade20k) ;;
  *) echo "usage: bash examples/download.sh coco|coco-panoptic|ade20k ROOT" >&2; exit 2 ;;
esac
[ -n "$root" ] || { echo "download.sh: give the folder to write" >&2; exit 2; }
mkdir -p "$root/archives"

fetch() { # URL DIGEST FOLDER: download, check, unpack; a digest is sha1, sha256 or "crc"
  local zip="$root/archives/${1##*/}" url=$1
  [ -e "$zip.unpacked" ] && return
  [ -n "${BASE_URL:-}" ] && url="${BASE_URL%/}/${1##*/}"
  if [ ! -e "$zip" ]; then
    curl --fail --location --retry 5 --continue-at - --output "$zip.part" "$url" || {
      echo "download.sh: $url failed; run the command again to continue, or delete $zip.part to start over" >&2
      exit 1
    }
    mv "$zip.part" "$zip"
  fi
  if [ "$2" != crc ]; then
    local tool=sha256sum
    [ ${#2} -eq 40 ] && tool=sha1sum
    echo "$2  $zip" | $tool --check --quiet || {
      rm "$zip"
      echo "download.sh: $zip was not the published file and is deleted; run the command again" >&2
      exit 1
    }
  fi
  unpack "$zip" "$3"
  touch "$zip.unpacked"
}

unpack() { # ZIP FOLDER; Python checks the CRC of every member
  echo "unpacking ${1##*/}"
  mkdir -p "$2"
  python3 -m zipfile -e "$1" "$2" || {
    rm "$1"
    echo "download.sh: $1 was damaged and is deleted; run the command again" >&2
    exit 1
  }
}

if [ "$data" = ade20k ]; then
  fetch http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip \
    219e1696abb36c8ba3a3afe7fb2f4b4606a897c7 "$root"
else
  fetch http://images.cocodataset.org/zips/train2017.zip \
    69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929 "$root/images"
  fetch http://images.cocodataset.org/zips/val2017.zip \
    4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05 "$root/images"
fi
if [ "$data" = coco ]; then
  fetch https://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip \
    crc "$root/annotations"
elif [ "$data" = coco-panoptic ]; then
  fetch http://images.cocodataset.org/annotations/panoptic_annotations_trainval2017.zip \
    c05f76d2129b6b561eb70efe16e7006df62f73fb92889132d373b9d90e31a370 "$root"
  for split in train val; do
    [ -d "$root/annotations/panoptic_${split}2017" ] ||
      unpack "$root/annotations/panoptic_${split}2017.zip" "$root/annotations"
  done
fi
echo "ready: $data:$root"
