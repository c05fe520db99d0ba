"""The command: ``python -m fastalign.export RUN --to TARGET``."""

import argparse
import sys
from pathlib import Path

from fastalign.export.targets import TARGETS
from fastalign.export.write import export
from fastalign.training.command import run_command
from fastalign.utils.errors import UserError, first_line
from fastalign.utils.paths import path_argument


def push(folder: Path, name: str) -> None:
    """Upload an export to the model hub, with the credentials that its client finds."""
    try:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:  # the package, the network, the credentials, the name: no common class
        raise UserError(
            f"--push-to-hub {name}: {first_line(error)}; the export is in {folder}: check the name, the network, "
            "the login, and that huggingface_hub is installed"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="fastalign export", description="Export an aligned backbone.")
    parser.add_argument("run", type=path_argument, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--to", required=True, choices=TARGETS, help="the library")
    parser.add_argument(
        "--output", type=path_argument, help="the folder to write; default RUN/exports/TARGET"
    )
    parser.add_argument(
        "--drop-softcap", action="store_true", help="export without the cap, and measure the effect"
    )
    parser.add_argument(
        "--images",
        type=path_argument,
        help="image folder or tar shards to measure features on; default validation data",
    )
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload it to the model hub")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(**vars(options)))


def _run(run: str, to: str, push_to_hub: str | None, **options) -> None:
    folder, facts = export(run, to, **options)
    parity = facts["parity"]
    print(f"parity: largest relative error {parity['largest_relative_error']:.1e} of {parity['of']}")
    for name, change in facts["softcap"].get("dropped", {}).items():
        print(
            f"soft-cap dropped: features on {name} change by {100 * change['relative_change']:.3g}%, "
            f"lowest cosine of a token {change['lowest_cosine']:.4f}"
        )
    if facts["features"]["mean"] is None:
        print(f"feature mean and std {facts['features']['of']}")
    print("\n".join([*facts["notes"], f"exported: {folder}"]))
    if push_to_hub:
        push(folder, push_to_hub)
        print(f"uploaded: {push_to_hub}")


if __name__ == "__main__":
    sys.exit(main())
