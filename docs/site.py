"""mkdocs hooks: the README is the start page, and files outside docs/ that pages link to become part of the site."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def _in_repository(page: str) -> str:
    """The path in the repository of a page of the site."""
    if page == "index.md":
        return "README.md"
    return page.removeprefix("files/") if page.startswith("files/") else f"docs/{page}"


def _in_site(path: str) -> str:
    """The place in the site of a path in the repository; a folder is its README."""
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def _linked(page: str, text: str) -> set[str]:
    """The existing paths in the repository that a page links to."""
    targets = {match[2] for match in _LINK.finditer(text) if "://" not in match[2]}
    paths = {
        posixpath.normpath(posixpath.join(posixpath.dirname(_in_repository(page)), to)) for to in targets
    }
    return {path for path in paths if (ROOT / path).exists()}


def on_files(files, config):
    """Add the README and, page by page, every file outside docs/ that a page links to."""
    known = {file.src_uri for file in files}
    pages = [(uri, (ROOT / "docs" / uri).read_text()) for uri in known if uri.endswith(".md")]
    pages.append(("index.md", (ROOT / "README.md").read_text()))
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    while pages:
        for path in _linked(*pages.pop()):
            uri, source = _in_site(path), ROOT / path
            source = source / "README.md" if source.is_dir() else source
            if uri not in known and uri != "index.md" and source.is_file():
                known.add(uri)
                files.append(File.generated(config, uri, abs_src_path=str(source)))
                if uri.endswith(".md"):
                    pages.append((uri, source.read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at places in the site; a folder without a README loses its link."""
    here = page.file.src_uri

    def moved(match: re.Match) -> str:
        target = match[2]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(_in_repository(here)), target))
        if "://" in target or not (ROOT / path).exists():
            return match[0]
        uri = _in_site(path)
        if files.get_file_from_path(uri) is None:
            return "](#)" if (ROOT / path).is_dir() else match[0]
        return f"{match[1]}{posixpath.relpath(uri, posixpath.dirname(here) or '.')}{match[3]}"

    return _LINK.sub(moved, markdown)
