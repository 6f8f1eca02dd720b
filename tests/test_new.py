"""tools/new.py, in a copy of the tree: one command makes a notebook that every other tool accepts."""

import ast
import contextlib
import io
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LISTS = ["CONTRIBUTING.md", "README.md", "_quarto.yml", "nbs/index.ipynb"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree") / "copy"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name, follow_symlinks=False)
    return root


def new(tree, *args):
    "Run the copy of the script in `tree`: what it printed on both channels, and its status"
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["new.py", *args])
        patch.syspath_prepend(tree / "tools")
        patch.delitem(sys.modules, "sync", raising=False)
        try:
            runpy.run_path(str(tree / "tools/new.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code
        sys.modules.pop("sync", None)
    return out.getvalue(), err.getvalue(), status


def run(tree, *command):
    tool = [sys.executable, *command] if command[0].endswith(".py") else [Path(sys.executable).with_name(command[0])]
    done = subprocess.run(tool, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"


def snapshot(tree):
    return {str(path.relative_to(tree)): path.read_bytes() for path in sorted(tree.rglob("*")) if path.is_file() and not path.is_symlink()}


@pytest.fixture(scope="module")
def made(tree):
    "Two new notebooks, each the last of its room; the tree before and after"
    before = snapshot(tree)
    for name, title in [("25_newest", "The newest"), ("19_newer", "Newer: é & more")]:
        out, err, status = new(tree, name, title, "What one can do after it.")
        assert (err, status) == ("", 0) and out.startswith(f"wrote nbs/{name}.ipynb\n")
    return before, snapshot(tree)


def test_it_stands_in_every_list_and_the_rest_is_as_it_was(made):
    before, after = made
    changed = {name for name in after if after[name] != before.get(name) and "__pycache__" not in name}
    assert changed == {*LISTS, "nbs/19_newer.ipynb", "nbs/25_newest.ipynb"}
    sidebar, table = after["_quarto.yml"].decode(), after["CONTRIBUTING.md"].decode()
    newest = '          - href: 25_newest.ipynb\n            text: "The newest: What one can do after it"\n'
    newer = '          - href: 19_newer.ipynb\n            text: "Newer: é & more: What one can do after it"\n'
    assert newer + "      - section: Going further\n        contents:\n          - href: 20_speed.ipynb\n" in sidebar
    assert newest in sidebar and sidebar.index("20_speed") < sidebar.index("25_newest")
    numbers = [line[3:5] for line in table.splitlines() if line.startswith("| `")]
    assert numbers == sorted(numbers) and all(f"| `{name}` | `{name[3:]}` | What one can do" in table for name in ("19_newer", "25_newest"))
    assert "| [19_newer](nbs/19_newer.ipynb) | What one can do after it |\n" in after["README.md"].decode()
    comments = [line for line in before["_quarto.yml"].decode().splitlines() if line.startswith("#")]
    assert comments and all(line in sidebar for line in comments)


def test_its_cells(made, tree):
    cells = json.loads((tree / "nbs/19_newer.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert sources[0] == "# Newer: é & more\n\n> What one can do after it."
    assert "19_newer.ipynb)" in sources[1] and "pip install" in sources[2] and "#| default_exp newer" in sources
    assert all(any(part in source for source in sources) for part in ["At the end of", "## What is refused", "## Try it"])


def test_the_other_tools_accept_it(made, tree):
    run(tree, "tools/check.py")
    run(tree, "tools/sync.py", "--check")
    before = (tree / "nbs/19_newer.ipynb").read_bytes()
    run(tree, "nbdev_clean")
    assert (tree / "nbs/19_newer.ipynb").read_bytes() == before
    run(tree, "nbdev_export")
    module = ast.parse((tree / "transformers_tut/newer.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(module) == "What one can do after it."


REFUSED = [
    (("name",), "the name must be two digits"),
    (("4_name",), "the name must be two digits"),
    (("14-name",), "the name must be two digits"),
    (("14_Name",), "the name must be two digits"),
    (("34_name",), "from 00 to 29"),
    (("14_class",), "'class' is a word of Python's own"),
    (("00_name",), "number 00 is taken by nbs/00_attention.ipynb"),
    (("18_maps",), "the module 'maps' is made by nbs/05_maps.ipynb"),
    (("18_weights",), "the module 'weights' exists in transformers_tut"),
    (("18_name", " "), "the title must be one line"),
    (("18_name", "Title", "two\nlines"), "the description must be one line"),
    (("18_name", "Title", "a | b"), "without '|'"),
]


@pytest.mark.parametrize("given, message", REFUSED, ids=[" ".join(given).replace("\n", " ") for given, _ in REFUSED])
def test_bad_names_are_refused_and_nothing_written(tree, given, message):
    args = [*given, *["Title", "Description"][len(given) - 1 :]]
    before = snapshot(tree)
    out, err, status = new(tree, *args)
    assert (out, status) == ("", 2) and message in " ".join(err.split())
    assert snapshot(tree) == before
