"""What `make gpu` needs and does not fetch: ``python -m benchmarks.needs``. Exit code 2 and a line if any lacks."""

import sys
from importlib.metadata import PackageNotFoundError, version

NEEDS = (
    *("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "pyyaml", "pydantic", "rich"),
    *("pytest", "hypothesis", "setuptools"),
)
SETUPTOOLS = 77
"""The first that reads our pyproject.toml; a build without isolation takes whichever there is."""


def missing() -> list[str]:
    """The packages that are not installed, or too old to build with."""
    found = [name for name in NEEDS if installed(name) is None]
    old = "setuptools" not in found and int(installed("setuptools").split(".")[0]) < SETUPTOOLS
    return found + [f"setuptools>={SETUPTOOLS}"] * old


def installed(name: str) -> str | None:
    """The version of a package; None = it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> int:
    """Say what is missing; the exit code."""
    if not (found := missing()):
        return 0
    print(f"missing: {', '.join(found)}; install them first, make gpu works offline", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
