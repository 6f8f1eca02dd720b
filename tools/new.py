"""Make a notebook from the house's template, and enter it wherever notebooks are listed.

    python tools/new.py 14_name "Title" "One-line description"

writes nbs/14_name.ipynb and adds it to the sidebar in _quarto.yml, to CONTRIBUTING.md's table, to the index and so to
README.md. All that is refused is refused before anything is written. The first digit decides the room: 0 the model and
what every task needs, 1 the tasks, 2 what goes further.
"""

import argparse
import json
import keyword
import re
import sys

import sync

ROOT, NBS = sync.ROOT, sync.NBS
LIBRARY = sync.read_settings()["lib_name"]

TEMPLATE = """\
%% markdown title
# {title}

> {description}
%% markdown opening
At the end of this notebook you can ... (what the reader could not do before, and how one knows that it is right).
%% code module
#| default_exp {module}
%% code imports
#| export
from torch import Tensor

from {library}.attention import check_number
%% code test-imports
#| hide
import torch
from fastcore.test import test_eq, test_fail
%% markdown first-section
## The naive way, and where it fails

One sentence says why the next definition exists; the test right after it says what it does.
%% code example
#| exports
def scaled(
    x: Tensor, # of any shape
    factor: float, # what each element is multiplied by
) -> Tensor: # of the same shape
    "Multiply a tensor by a number."
    return x*check_number('factor', factor)
%% code example-test
test_eq(scaled(torch.arange(3.), 2), torch.tensor([0., 2., 4.]))
%% markdown refused
## What is refused
%% code refused-test
refused = [
    (lambda: scaled(torch.arange(3.), 'twice'), "factor must be a number, got 'twice'"),
]
for call, message in refused: test_fail(call, contains=message, exc=(TypeError, ValueError))
%% markdown exercises
## Try it

1. A question that this notebook's code answers when it is changed a little.
2. A question that it does not answer.
"""


def parse_arguments():
    about, details = __doc__.split("\n\n", 1)
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=details, formatter_class=plain)
    parser.add_argument("name", help="two digits, an underscore and the module's name, such as 14_name")
    parser.add_argument("title", help="what it is called, without a full stop")
    parser.add_argument("description", help="one line: becomes the subtitle and the module's docstring")
    return parser, parser.parse_args()


def refusal(name, title, description):
    "Why there can be no such notebook, or None"
    if not re.fullmatch(r"[0-2]\d_[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        return f"the name must be two digits from 00 to 29 and a module in lower case, such as 14_name, got {name!r}"
    number, _, module = name.partition("_")
    if keyword.iskeyword(module):
        return f"{module!r} is a word of Python's own and cannot name a module"
    for path in NBS.glob("[0-9]*.ipynb"):
        if path.stem.partition("_")[0] == number:
            return f"number {number} is taken by nbs/{path.name}"
        if path.stem.partition("_")[2] == module:
            return f"the module {module!r} is made by nbs/{path.name}"
    if (ROOT / LIBRARY / f"{module}.py").exists() or (ROOT / LIBRARY / module).exists():
        return f"the module {module!r} exists in {LIBRARY}"
    for what, text in [("title", title), ("description", description)]:
        if not text.strip() or re.search(r"[\n|]", text):
            return f"the {what} must be one line of text without '|', got {text!r}"


def notebook(**values):
    "The template as a notebook; ids of cells are their names in the template"
    cells = []
    for part in re.split(r"^%% ", TEMPLATE, flags=re.M)[1:]:
        head, source = part.rstrip("\n").split("\n", 1)
        kind, name = head.split()
        for key, value in values.items():
            source = source.replace(f"{{{key}}}", value)
        cell = {"cell_type": kind, "id": name, "metadata": {}, "source": source.splitlines(keepends=True)}
        cells.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def insert(text, rows, name, entry):
    "Put `entry` behind the last row of a smaller notebook, or before the first of all rows"
    rows = list(re.finditer(rows, text, re.M))
    smaller = [row.end() for row in rows if row[1] < name]
    at = smaller[-1] if smaller else rows[0].start()
    return text[:at] + entry + text[at:]


def in_sidebar(text, name, label):
    "_quarto.yml with the notebook in its room"
    entry = f"          - href: {name}.ipynb\n            text: {json.dumps(label, ensure_ascii=False)}\n"
    rows = rf"^          - (?:href: )?({name[0]}\d_\w+)\.ipynb\n(?:            \S.*\n)*"
    if not re.search(rows, text, re.M):
        sys.exit(f"_quarto.yml has no section with a notebook {name[0]}x; enter the first one by hand")
    return insert(text, rows, name, entry)


def in_index(name, description):
    "nbs/index.ipynb with a row for the notebook"
    index = json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))
    rows = r"^\| \[(\d\w+)\]\(.*\n"
    for cell in index["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and re.search(rows, source, re.M):
            source = insert(source, rows, name, f"| [{name}]({name}.ipynb) | {description} |\n")
            cell["source"] = source.splitlines(keepends=True)
    return index


def as_json(nb):
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"  # as nbdev_clean writes it


def main():
    parser, args = parse_arguments()
    name, title, description = args.name, args.title.strip(), args.description.strip()
    if problem := refusal(name, title, description):
        parser.error(problem)
    module, short = name.partition("_")[2], description.rstrip(".")
    sidebar, contributing = ROOT / "_quarto.yml", ROOT / "CONTRIBUTING.md"
    row = f"| `{name}` | `{module}` | {short} |\n"
    new = {
        NBS / f"{name}.ipynb": as_json(notebook(title=title, description=description, module=module, library=LIBRARY)),
        sidebar: in_sidebar(sidebar.read_text(encoding="utf-8"), name, f"{title}: {short}"),
        contributing: insert(contributing.read_text(encoding="utf-8"), r"^\| `(\d\w+)` \|.*\n", name, row),
        NBS / "index.ipynb": as_json(in_index(name, short)),
    }
    for path, text in new.items():
        sync.replace(path, text.encode())
        print("wrote", path.relative_to(ROOT))
    sync.write()
    print(f"Now: jupyter lab nbs/{name}.ipynb")


if __name__ == "__main__":
    main()
