"""What mkdocs cannot do by itself: pages and links that leave docs/.

Pages of docs/ link to files of the repository by relative paths, which work where it is read.
Here a picture becomes a file of the site, ``bench/FINDINGS.md`` and ``CHANGELOG.md`` its pages, and
any other file a link to the repository.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
# Files of the repository that are pages here.
PAGES = {"CHANGELOG.md": "changelog.md", "bench/FINDINGS.md": "findings.md"}
LINK = re.compile(r"(?<!\\)(!?\[(?:[^\[\]]|\[[^\[\]]*\]|!\[[^\]]*\]\([^)]*\))*\])\(([^)\s]+)\)")
PICTURES = (".png", ".svg", ".jpg")
# Docstrings name things as Sphinx has it; a name in code is enough here.
ROLE = re.compile(r":?\b(?:attr|class|data|func|meth|mod):(?=<)")


def _source(uri: str) -> str:
    """The file of the repository that a page is made of."""
    return next((path for path, page in PAGES.items() if page == uri), f"docs/{uri}")


def on_files(files, config):
    """Add the pages and pictures that lie outside docs/."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    wanted: set[str] = set()
    for file in list(files.documentation_pages()):
        text = (ROOT / _source(file.src_uri)).read_text()
        folder = posixpath.dirname(_source(file.src_uri))
        for _, target in LINK.findall(text):
            path = posixpath.normpath(posixpath.join(folder, target))
            if path.endswith(PICTURES) and "://" not in target and not path.startswith("docs/"):
                wanted.add(path)
    for path in sorted(wanted):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links that leave docs/ into links of the site, or of the repository."""
    uri = page.file.src_uri
    folder = posixpath.dirname(_source(uri))

    def moved(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if not os.path.exists(ROOT / path):
            raise PluginError(f"{_source(uri)}: {target} leads nowhere")
        if path in PAGES:
            place = PAGES[path]
        elif path.endswith(PICTURES):
            place = path.removeprefix("docs/")
        elif path.startswith("docs/") and path.endswith(".md"):
            place = path.removeprefix("docs/")
        else:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            return f"{text}({config['repo_url']}/{kind}/main/{path})"
        here = posixpath.relpath(place, posixpath.dirname(uri) or ".")
        return f"{text}({here}{mark}{anchor})"

    return LINK.sub(moved, markdown)


def on_page_content(html, page, config, files):
    """Leave the roles of docstrings out."""
    return ROLE.sub("", html)
