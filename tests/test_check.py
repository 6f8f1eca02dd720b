"""tools/check.py, on a small repository in which one thing after the other is broken."""

import contextlib
import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LESSON = """Fine: [the index](index.ipynb#tables-of-contents), [below](#sec-end), [a page](https://quarto.org/a_(b)).
![Alt](images/one.png "title") as in @fig-first and @eq-first, after [-@first1999; @second2001].

$$ a_{i} = {b}^{c} $$ {#eq-first}

```python
"[x](nowhere.md) @nobody"
```"""


def notebook(*cells):
    "The text of a notebook"
    out = []
    for n, (kind, source) in enumerate(cells):
        cell = {'cell_type': kind, 'id': f'cell-{n}', 'metadata': {}, 'source': source}
        if kind == 'code':
            picture = {'output_type': 'display_data', 'metadata': {}, 'data': {'image/png': ''}}
            outputs = [picture] if 'draw()' in source else []
            cell['metadata'] = {'tags': ['answer'] if 'code-fold' in source else []}
            cell |= {'execution_count': None, 'outputs': outputs}
        out.append(cell)
    return json.dumps({'cells': out, 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5})


FILES = {
    'nbs/00_first.ipynb': notebook(
        ('markdown', '# First\n\n> description'),
        ('code', '#| default_exp first'),
        ('code', '#| export\nfrom transformers_tut.tools import hammer'),
        ('code', '#| exports\ndef one(\n    x,  # a hammer\n):\n    return hammer'),
        ('markdown', '## Naive *and* `refined`'),
        ('markdown', LESSON),
        (
            'code',
            '#| label: fig-first\n#| fig-cap: "As in @second2001."\n#| fig-alt: A line\ndraw()',
        ),
        ('markdown', '### The end {#sec-end}'),
    ),
    'nbs/01_second.ipynb': notebook(
        ('markdown', '# Second\n\n> description'),
        ('code', '#| default_exp second'),
        ('code', 'from transformers_tut.first import hand'),
        ('markdown', '## Try it'),
        ('markdown', '**1.** How many?'),
        ('code', '#| code-fold: true\nassert 1 + 1 == 2'),
    ),
    'nbs/90_tools.ipynb': notebook(
        ('markdown', '# Tools\n\n> description'),
        ('code', '#| default_exp tools'),
        ('code', '#| export\nimport math'),
        ('code', '#| export\ndef hammer():\n    "As `hammer`."'),
    ),
    'nbs/index.ipynb': notebook(
        ('markdown', '# Index\n\n> description'),
        ('markdown', '## Tables of contents'),
        ('markdown', '[Repository]({{< meta repo-url >}}/blob/main/LICENSE)'),
    ),
    'nbs/references.bib': '@article{first1999,\n}\n\n@misc{second2001,\n}\n',
    'nbs/images/one.png': '',
    'nbs/site.yml': 'repo-url: https://github.com/someone/something\n',
    'README.md': '# Readme\n\n[The first](nbs/00_first.ipynb), thanks to @somebody\n',
    'CONTRIBUTING.md': '# Contributing\n',
    'CHANGELOG.md': '# Changelog\n',
    'LICENSE': '',
}


@pytest.fixture
def repo(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding='utf-8')
    (tmp_path / 'tools').mkdir()
    shutil.copy(ROOT / 'tools/check.py', tmp_path / 'tools')
    return tmp_path


def check(repo):
    "The problems that the copy of the script in `repo` reports"
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit) as end,
    ):
        patch.setattr(sys, 'argv', ['check.py'])
        runpy.run_path(str(repo / 'tools/check.py'), run_name='__main__')
    *problems, _ = printed.getvalue().splitlines()
    assert end.value.code == bool(problems)
    return problems


def test_the_repository_has_no_problems():
    assert check(ROOT) == []


def test_nothing_is_wrong_before_something_is_planted(repo):
    assert check(repo) == []


FIRST, INDEX = 'nbs/00_first.ipynb', 'nbs/index.ipynb'
PLANTED = [  # file, what stands there, what is put in its place, what the problem says
    (FIRST, 'images/one.png', 'images/two.png', "'images/two.png' leads to no file"),
    (FIRST, '(index.ipynb#', '(00_index.ipynb#', "'00_index.ipynb#tables-of-contents' leads to no"),
    (FIRST, '#tables-of', '#table-of', 'leads to no section or label of index.ipynb'),
    (FIRST, '(#sec-end)', '(#sec-start)', "'#sec-start' leads to no section or label"),
    (FIRST, '(index.ipynb#tables-of-contents)', '(../LICENSE)', 'leads out of nbs'),
    (FIRST, 'https://quarto', 'http://quarto', "'http://quarto.org/a_(b)' is not an https address"),
    (FIRST, 'https://quarto.org/', 'https://quarto.org/ ', 'is not an address'),
    (FIRST, 'https://quarto.org/a_(b)', '', "the link '' leads nowhere"),
    (INDEX, 'meta repo-url', 'meta website.repo-url', 'is not an address'),
    (
        'README.md',
        '00_first',
        '00_last',
        "README.md: the link 'nbs/00_last.ipynb' leads to no file",
    ),
    (FIRST, '@fig-first', '@fig-second', '@fig-second has no label in this notebook'),
    (FIRST, '@eq-first', '@eq-second', '@eq-second has no label in this notebook'),
    (FIRST, '@eq-first', '@sec-end', '@sec-end needs numbered sections'),
    (FIRST, '{#sec-end}', '{#sec-end}\n### Again {#sec-end}', 'the label sec-end stands 2 times'),
    (FIRST, '#| fig-cap: "As in @second2001."\n', '', 'fig-first has no fig-cap'),
    (FIRST, '#| fig-alt: A line\n', '', 'its figure has no fig-alt'),
    (FIRST, '"As in @second2001."', 'As in: here', "'#| fig-cap: As in: here' is not YAML"),
    (FIRST, 'As in @second2001.', 'As in @third2003.', '@third2003 is not in nbs/references.bib'),
    (FIRST, '\n\n> description', '', "cell 1: must begin with '# Title'"),
    (FIRST, 'default_exp first', 'default_exp last', "module it is named after, found ['last']"),
    (FIRST, 'tut.tools', 'tut.second', '00_first must not import 01_second'),
    ('nbs/90_tools.ipynb', 'import math', 'from transformers_tut import first', 'import 00_first'),
    (
        'nbs/01_second.ipynb',
        'import hand',
        'import hand\nhand()',
        'imports and other code; give the imports a cell of their own',
    ),
    ('nbs/01_second.ipynb', 'answer', 'other', 'there must be a folded cell tagged "answer"'),
    ('nbs/01_second.ipynb', 'code-fold', 'echo', 'there must be a folded cell tagged "answer"'),
    (FIRST, '### The end', '## Try it', 'give each question a cell of its own, and an answer'),
    (FIRST, 'return hammer', 'return hammer\ndef two(): pass', 'defines one and two'),
    (FIRST, '[below]', '[the `hammer` below]', 'write hammer without backticks in the text of a'),
    (FIRST, 'a hammer', 'a `hammer`', 'write hammer without backticks in a comment'),
    (FIRST, '#| exports\n', '#| exports\n' + 'import os\n' * 4, 'imports before the idea'),
]


@pytest.mark.parametrize('name, old, new, message', PLANTED, ids=[p[-1] for p in PLANTED])
def test_a_planted_error_is_reported(repo, name, old, new, message):
    text = FILES[name]
    if name.endswith('.ipynb'):  # as it stands in its cells
        old, new = (json.dumps(part)[1:-1] for part in (old, new))
    assert text.count(old) == 1, f'{text.count(old)} x {old}'
    (repo / name).write_text(text.replace(old, new), encoding='utf-8')
    problems = check(repo)
    assert any(message in problem for problem in problems), problems


def test_a_heavy_notebook_is_reported(repo):
    path = repo / FIRST
    path.write_text(FILES[FIRST] + ' ' * 1_500_000)
    assert check(repo) == ['00_first.ipynb: 1.5 MB, more than a visitor should load']
