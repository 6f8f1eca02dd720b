"""tools/check.py: the repository as it is, and a small one with an error planted in it."""

import contextlib
import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COLAB = "https://colab.research.google.com/github/someone/something/blob/main/nbs"
LESSON = """The scale of @eq-first is that of @fig-first, as @first1999 and others [see @second2001, p. 3; -@first1999] say.

$$ a_{i} = \\frac{b}{c} $$ {#eq-first}

[Below](#sec-end), [above](#naive-and-refined), [the index](index.ipynb#tables-of-contents), [a site](https://quarto.org/a_(b)).

```bash
pip install git+https://host.xyz/it@main  # [no](link.ipynb), no @key, <b>
```

Mail to someone@quarto.org; `@decorator`, `[x](y)`, $a[i](j)$ and `$$` are code; \\@escaped and 3 < 4 > 2.

::: {.callout-note}
A <b>bold</b> line<br> of HTML. ![alt](images/one.png "title")
:::"""


def notebook(name, *cells):
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({COLAB}/{name})"
    cells = [("markdown", "# Title\n\n> description"), ("markdown", badge), ("code", "! [ -e /content ] && pip install x"), *cells]
    cells = [{"cell_type": kind, "id": f"c{i}", "metadata": {}, "source": text} for i, (kind, text) in enumerate(cells)]
    cells = [cell | ({"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}) for cell in cells]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}, indent=1)


FILES = {
    "nbs/00_first.ipynb": notebook(
        "00_first.ipynb",
        ("code", "#| default_exp first"),
        ("markdown", "## Naive *and* `refined`"),
        ("markdown", LESSON),
        ("code", '#| label: fig-first\n#| fig-cap: "As in @second2001."\n@decorated\ndef f(): return "[x](y) @nobody"'),
        ("markdown", "### The end {#sec-end}"),
    ),
    "nbs/01_second.ipynb": notebook("01_second.ipynb", ("code", "#| default_exp second")),
    "nbs/index.ipynb": notebook(
        "index.ipynb",
        ("markdown", "## Tables of contents\n\n| a |\n|---|\n| [00_first](00_first.ipynb#sec-end) |\n| [01_second](01_second.ipynb) |"),
        ("markdown", "[Repository]({{< meta website.repo-url >}}/blob/main/LICENSE)"),
    ),
    "nbs/references.bib": "@article{first1999,\n  title = {On {B}races},\n  author = {A, B},\n  journal = {J},\n  year = {1999}\n}\n\n"
    "@misc{second2001,\n  title = {T},\n  author = {A, B},\n  year = {2001},\n  url = {https://arxiv.org/abs/1}\n}\n",
    "nbs/images/one.png": "",
    "nbs/nbdev.yml": "website:\n  repo-url: https://github.com/someone/something\n",
    "_quarto.yml": """website:
  image: images/one.png
  sidebar:
    contents:
      - index.ipynb
      - section: All
        contents:
          - href: 00_first.ipynb
            text: First
          - 01_second.ipynb
format:
  html:
    number-sections: false
""",
    ".github/workflows/test.yml": "on:\n  push:\n    branches: [main]\n",
    "README.md": "# Readme\n\n[The first](nbs/00_first.ipynb), thanks to @somebody\n",
    "CONTRIBUTING.md": "# Contributing\n\n| Notebook | Module |\n|---|---|\n| `00_first` | `first` |\n| `01_second` | `second` |\n",
    "CHANGELOG.md": "# Changelog\n\n## 0.1\n\n### Added\n",
    "LICENSE": "",
}


@pytest.fixture
def repo(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/check.py", tmp_path / "tools")
    return tmp_path


def check(repo):
    "The problems that the copy of the script in `repo` reports"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["check.py"])
        runpy.run_path(str(repo / "tools/check.py"), run_name="__main__")
    *problems, summary = printed.getvalue().splitlines()
    assert summary.endswith(f": {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
    assert end.value.code == bool(problems)
    return problems


def plant(repo, name, old, new):
    "Replace text in a file, once; that of a notebook as it stands in its cells"
    path, text = repo / name, FILES[name]
    old, new = (json.dumps(part)[1:-1] if name.endswith(".ipynb") else part for part in (old, new))
    assert text.count(old) == 1, f"{text.count(old)} x {old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_the_repository_has_no_problems():
    assert check(ROOT) == []


def test_nothing_is_wrong_before_something_is_planted(repo):
    assert check(repo) == []


FIRST, SITE, BIB = "nbs/00_first.ipynb", "_quarto.yml", "nbs/references.bib"
PLANTED = [  # file, what stands there, what is put in its place, what the problem says
    (FIRST, "images/one.png", "images/two.png", "cell 6: the link 'images/two.png' leads to no file"),
    (FIRST, "(index.ipynb#", "(00_index.ipynb#", "cell 6: the link '00_index.ipynb#tables-of-contents' leads to no file"),
    (FIRST, "#tables-of", "#table-of", "'index.ipynb#table-of-contents' leads to no section or label of index.ipynb"),
    (FIRST, "(#sec-end)", "(#sec-start)", "the link '#sec-start' leads to no section or label of 00_first.ipynb"),
    (FIRST, "(index.ipynb#tables-of-contents)", "(../LICENSE)", "leads out of nbs"),
    (FIRST, "https://quarto.org", "http://quarto.org", "'http://quarto.org/a_(b)' is not an https address"),
    (FIRST, "https://quarto.org/", "https://quarto.org/ ", "has a space in it"),
    (FIRST, "https://quarto.org/", "https://example.com/", "is a placeholder"),
    (FIRST, "https://quarto.org/a_(b)", "", "the link '' leads nowhere"),
    ("nbs/index.ipynb", "website.repo-url", "website.repo", "has a space in it"),
    ("README.md", "nbs/00_first.ipynb", "nbs/00_last.ipynb", "README.md: the link 'nbs/00_last.ipynb' leads to no file"),
    (FIRST, "@fig-first", "@fig-second", "cell 6: @fig-second has no label in this notebook"),
    (FIRST, "@eq-first", "@eq-second", "@eq-second has no label in this notebook"),
    (FIRST, "@eq-first", "@sec-end", "@sec-end needs number-sections: true"),
    (FIRST, "{#sec-end}", "{#sec-end}\n### Again {#sec-end}", "cell 8: the label sec-end stands 2 times"),
    (FIRST, "$$ {#eq-first}", "$$ (1) {#eq-first}", "eq-first must stand right behind the closing $$"),
    (FIRST, '#| fig-cap: "As in @second2001."\n', "", "cell 7: fig-first has no fig-cap"),
    (FIRST, '"As in @second2001."', "As in: here", "'#| fig-cap: As in: here' is not YAML"),
    (FIRST, "As in @second2001.", "As in @third2003.", "cell 7: @third2003 is not in nbs/references.bib"),
    (FIRST, "-@first1999", "-@third2003", "cell 6: @third2003 is not in nbs/references.bib"),
    (BIB, "  journal = {J},\n", "", "first1999 lacks journal"),
    (BIB, "{On {B}races}", "{On {B}races", "first1999 has unbalanced braces"),
    (BIB, "https://arxiv", "arxiv", "second2001: its url is not an https address"),
    (BIB, "@misc{second2001", "@misc{first1999", "first1999 stands there twice"),
    (BIB, "@misc{", "@book{other,\n  title = {T}, \n}\n\n@misc{", "other lacks author or editor"),
    (BIB, "@misc{", "@misc{other,\n}\n\n@misc{", "other is not cited"),
    (SITE, "          - 01_second.ipynb\n", "", "_quarto.yml: sidebar: 01_second.ipynb is missing"),
    (SITE, "01_second", "02_third", "_quarto.yml: sidebar: there is no notebook 02_third.ipynb"),
    (SITE, "      - index.ipynb\n", "      - 01_second.ipynb\n      - index.ipynb\n", "sidebar: not in reading order"),
    (SITE, "images/one.png", "images/two.png", "_quarto.yml: image: there is no file nbs/images/two.png"),
    (SITE, "website:\n", "website:\n  search: [\n", "_quarto.yml: line"),
    (SITE, "    number-sections: false\n", "    toc: true\n    toc: false\n", "_quarto.yml: line 13: toc stands there twice"),
    (".github/workflows/test.yml", "on:\n", "on:\n  push:\n", ".github/workflows/test.yml: line 2: push stands there twice"),
    ("CONTRIBUTING.md", "| `01_second` | `second` |\n", "", "CONTRIBUTING.md: table: 01_second is missing"),
    ("nbs/index.ipynb", "[01_second](01_second.ipynb)", "second", "nbs/index.ipynb: table: 01_second is missing"),
    (FIRST, "{c} $$", "{c}", "cell 6: an odd number of $$"),
    (FIRST, "a_{i} =", "a_{i} =\n\n", "cell 6: an empty line between $$ and $$ ends the equation"),
    (FIRST, "<b>\n```", "<b>", "cell 6: the code fence ``` is not closed"),
    (FIRST, "bold</b>", "bold", "cell 6: <b> is not closed"),
    (FIRST, "line<br>", "line</i>", "cell 6: </i> closes nothing"),
    (FIRST, '"title")\n:::', '"title")', "cell 6: the fences ::: do not balance"),
    ("nbs/index.ipynb", "## Tables", "### Tables", "cell 4: the heading 'Tables of contents' skips a level"),
    ("CHANGELOG.md", "## 0.1", "# 0.1", "CHANGELOG.md: '0.1' is a second title"),
    (FIRST, "\n\n> description", "", "cell 1: must begin with '# Title'"),
    (FIRST, "nbs/00_first.ipynb)", "nbs/index.ipynb)", "lacks its Colab badge or install cell; run tools/sync.py"),
    (FIRST, "default_exp first", "default_exp last", "must export to the module it is named after, found ['last']"),
]


@pytest.mark.parametrize("name, old, new, message", PLANTED, ids=[message for *_, message in PLANTED])
def test_a_planted_error_is_reported(repo, name, old, new, message):
    plant(repo, name, old, new)
    problems = check(repo)
    assert any(message in problem for problem in problems), problems
