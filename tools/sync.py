"""Carry the address in settings.ini to the notebooks and nbs/nbdev.yml, and make README.md from nbs/index.ipynb.

All of it is derived: `nbs/nbdev.yml`; the Colab badge and the Colab install cell behind the title of index.ipynb and of
every numbered notebook; README.md and its figures, nbs/images/readme_<n>.png. README.md needs no Quarto. Files are
replaced in one step, and left alone where nothing changes.
"""

import argparse
import base64
import json
import os
import posixpath
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import yaml
from nbconvert import MarkdownExporter
from nbdev.quarto import _nbdev_yml  # nbdev's own template (the version is pinned): it would write the same file
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
BADGE_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
COLAB_GUARD = "! [ -e /content ] &&"


def read_settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def colab_badge(cfg, notebook):
    "The badge that opens `notebook` on Colab"
    url = f"https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/nbs/{notebook}"
    return f"[![Open in Colab]({BADGE_IMAGE})]({url})"


def is_colab(cell):
    source = "".join(cell["source"])
    return COLAB_GUARD in source if cell["cell_type"] == "code" else BADGE_IMAGE in source


def with_colab_cells(nb, name, cfg):
    "The notebook with its badge and its install cell, found by what they hold, right behind the title"
    badge = {"cell_type": "markdown", "id": "colab-badge", "metadata": {}, "source": [colab_badge(cfg, name)]}
    lines = ["#| hide\n", "#| eval: false\n", f"{COLAB_GUARD} pip install -qU fastcore git+{cfg['git_url']}"]
    install = {"cell_type": "code", "id": "colab-install", "metadata": {}, "source": lines}
    install |= {"execution_count": None, "outputs": []}
    title, *rest = nb["cells"]
    if title["cell_type"] != "markdown" or not "".join(title["source"]).startswith("# "):
        sys.exit(f"nbs/{name}: the first cell must be Markdown that starts with '# Title'")
    rest = [cell for cell in rest if not is_colab(cell)]
    for cell in [title, *rest]:
        if f"{cfg['user']}/{cfg['repo']}" in "".join(cell["source"]):
            sys.exit(f"nbs/{name}: cell {cell.get('id')} spells out the address; it stands in settings.ini alone")
    return nb | {"cells": [title, badge, install, *rest]}


def directives(source):
    "Split a code cell into its `#|` directives and the rest"
    found, rest = {}, []
    for line in source.splitlines():
        match = re.match(r"#\|\s*([\w-]+):?\s*(.*)", line)
        if match:
            found[match[1]] = match[2].strip().strip("\"'")
        else:
            rest.append(line)
    return found, "\n".join(rest).strip()


def for_github(markdown, site):
    "Markdown without Quarto's additions, its relative links seen from the top of the repository"

    def link(match):
        if re.match(r"[a-z]+:|[/#]", match[2]):
            return match[0]
        return match[1] + posixpath.normpath(posixpath.join("nbs", match[2]))

    def prose(text):
        text = re.sub(r"^:{3,}.*\n?", "", text, flags=re.M)  # the fences of call-outs
        text = re.sub(r"[ \t]*\{[#.][A-Za-z][^{}\n]*\}", "", text)  # {#fig-name}, {.class}
        text = re.sub(r"\{\{< meta website\.([\w-]+) >\}\}", lambda m: site[m[1]], text)
        reference = re.search(r"(?<![\w/.@])@\w[\w-]*", text)
        if reference:
            sys.exit(f"nbs/index.ipynb: {reference[0]} would address a person in README.md; link to it instead")
        return re.sub(r"(\]\(|\b(?:src|href)=\")([^)\"\s]+)", link, text)

    parts = re.split(r"(^```.*?^```[ \t]*$|`[^`\n]+`)", markdown, flags=re.M | re.S)
    return "".join(part if i % 2 else prose(part) for i, part in enumerate(parts))


def readme(index, cfg, site):
    "README.md and its figures: {path: content}"
    badges = [
        f"[![Tests]({cfg['git_url']}/actions/workflows/test.yml/badge.svg)]({cfg['git_url']}/actions/workflows/test.yml)",
        f"[![Site]({cfg['git_url']}/actions/workflows/docs.yml/badge.svg)]({cfg['doc_host']}{cfg['doc_baseurl']})",
        colab_badge(cfg, "index.ipynb"),
    ]
    nb, cells, files = nbformat.reads(json.dumps(index), as_version=4), [], {}
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = "\n".join(badges) if is_colab(cell) else for_github(cell.source, site)
            cells.append(cell)
        elif cell.cell_type == "code":
            found, cell.source = directives(cell.source)
            if "hide" in found or found.get("include") == "false":
                continue
            if found.get("echo") == "false":
                cell.metadata.tags = ["no-source"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    path = NBS / "images" / f"readme_{len(files) + 1}.png"
                    files[path] = base64.b64decode(output.data["image/png"])
                    caption = for_github(found.get("fig-cap", ""), site)
                    figure = f"![{found.get('fig-alt', caption)}]({path.relative_to(ROOT).as_posix()})\n\n{caption}"
                    output.data = {"text/markdown": figure}
            cells.append(cell)
    nb.cells, nb.metadata.language_info = cells, {"name": "python"}  # nbdev_clean drops the language
    tags = {"enabled": True, "remove_input_tags": {"no-source"}}
    text, extra = MarkdownExporter(config=Config(TagRemovePreprocessor=tags)).from_notebook_node(nb)
    if extra.get("outputs"):
        sys.exit(f"nbs/index.ipynb: README.md takes PNG figures only, not {', '.join(extra['outputs'])}")
    text = re.sub(r"\n([ \t]*\n){2,}", "\n\n", text).strip()
    note = "<!-- Made from nbs/index.ipynb by tools/sync.py: change it there. -->"
    return files | {ROOT / "README.md": f"{note}\n\n{text}\n".encode()}


def derive():
    "What every derived file should hold: {path: content}, None for a figure that no longer exists"
    cfg = read_settings()
    keys = ["title", "description", "branch", "git_url", "doc_host", "doc_baseurl"]
    site_yml = _nbdev_yml.format(doc_path=Path(cfg["doc_path"]).name, **{key: cfg[key] for key in keys})
    files = {NBS / "nbdev.yml": site_yml.encode()}
    for path in [*sorted(NBS.glob("[0-9]*.ipynb")), NBS / "index.ipynb"]:
        old = json.loads(path.read_text(encoding="utf-8"))
        new = with_colab_cells(old, path.name, cfg)
        if new != old:  # nbdev_clean writes notebooks in this very form
            files[path] = (json.dumps(new, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()
    files |= dict.fromkeys((NBS / "images").glob("readme_*.png"))
    return files | readme(new, cfg, yaml.safe_load(site_yml)["website"])  # the last notebook is the index


def replace(path, content):
    "Write, or delete where `content` is None, in one step"
    if content is None:
        return path.unlink()
    path.parent.mkdir(exist_ok=True)
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_bytes(content)
    os.replace(scratch, path)


def write(check=False):
    "Bring what is derived up to date, or with `check` only name what is not; how many files that concerns"
    stale = {p: c for p, c in derive().items() if c != (p.read_bytes() if p.exists() else None)}
    for path, content in stale.items():
        if not check:
            replace(path, content)
        print("out of sync:" if check else "wrote" if content is not None else "deleted", path.relative_to(ROOT))
    return len(stale)


def main():
    about, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=about, epilog=details)
    parser.add_argument("--check", action="store_true", help="write nothing; name what is out of sync and exit with 1")
    check = parser.parse_args().check
    if write(check) and check:
        sys.exit("Run `python tools/sync.py` and commit what it writes.")


if __name__ == "__main__":
    main()
