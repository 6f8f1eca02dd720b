"""tools/sync.py, on a small repository with a made-up index."""

import base64
import contextlib
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
import zlib
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PNG = base64.b64encode(b'\x89PNG, or so it says').decode()
MADE = [
    'nbs/nbdev.yml',
    'nbs/site.yml',
    'nbs/00_first.ipynb',
    'nbs/90_tools.ipynb',
    'nbs/index.ipynb',
    'nbs/images/readme_1.png',
    'nbs/images/readme_2.svg',
    'README.md',
]
INDEX = """Text with [`first`](00_first.ipynb), [a log](../CHANGELOG.md),
[Quarto](https://quarto.org) and [below](#x).

## A heading {#sec-x .unnumbered}

::: {.callout-note}
Clone <{{< meta repo-url >}}>.
:::

```bash
echo "{#kept} [kept](kept.ipynb) @kept"
```"""


def cell(kind, source):
    name = f'cell-{zlib.crc32(source.encode())}'
    return {
        'cell_type': kind,
        'id': name,
        'metadata': {},
        'source': source.splitlines(keepends=True),
    }


def markdown(source):
    return cell('markdown', source)


def code(source, *outputs):
    return cell('code', source) | {'execution_count': None, 'outputs': list(outputs)}


def write(path, *cells):
    nb = {'cells': list(cells), 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}
    path.write_text(
        json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8'
    )


@pytest.fixture
def repo(tmp_path):
    for name in ['settings.ini', 'tools/sync.py']:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    set_address(tmp_path, 'first-user/first-repo')
    (tmp_path / 'nbs').mkdir()
    figure = {
        'output_type': 'display_data',
        'metadata': {},
        'data': {'image/png': PNG, 'text/plain': '<Figure>'},
    }
    drawn = figure | {'data': {'image/svg+xml': '<svg/>', 'image/png': PNG}}
    page = figure | {'data': {'text/html': '<iframe></iframe>', 'text/plain': 'a view'}}
    printed = {'output_type': 'stream', 'name': 'stdout', 'text': ['a result\n']}
    for name, title in [('00_first', '# First\n\n> one'), ('90_tools', '# Tools: sharp\n\n> two')]:
        write(tmp_path / f'nbs/{name}.ipynb', markdown(title), code('#| export\nimport torch'))
    write(
        tmp_path / 'nbs/index.ipynb',
        markdown('# Title\n\n> subtitle'),
        markdown(INDEX),
        markdown('## Notebooks'),
        markdown('to be filled in') | {'id': 'notebooks'},
        code('#| hide\nhidden()', printed),
        code('#| echo: false\n#| fig-cap: "A caption."\nunseen()', figure),
        code('shown()', printed),
        code('drawn()', drawn),
        code('explored()', page),
    )
    return tmp_path


def set_address(repo, address):
    settings, text = repo / 'settings.ini', (repo / 'settings.ini').read_text()
    for key, value in zip(['user', 'repo'], address.split('/')):
        text = re.sub(rf'^{key} = .*', f'{key} = {value}', text, flags=re.M)
    settings.write_text(text)


def sync(repo, *options):
    "Run the copy of the script in `repo`: what it printed, and its status or last words"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, 'argv', ['sync.py', *options])
        try:
            runpy.run_path(str(repo / 'tools/sync.py'), run_name='__main__')
        except SystemExit as end:
            return printed.getvalue(), end.code
    return printed.getvalue(), 0


def snapshot(repo):
    return {
        str(path.relative_to(repo)): path.read_bytes() for path in repo.rglob('*') if path.is_file()
    }


def test_one_sync_makes_everything_and_a_second_changes_nothing(repo):
    before = snapshot(repo)
    printed, status = sync(repo, '--check')
    assert status and printed.splitlines() == [f'out of sync: {name}' for name in MADE]
    assert snapshot(repo) == before, '--check wrote something'
    printed, status = sync(repo)
    assert (printed.splitlines(), status) == ([f'wrote {name}' for name in MADE], 0)
    after = snapshot(repo)
    assert sync(repo) == sync(repo, '--check') == ('', 0)
    assert snapshot(repo) == after and sorted(after) == sorted({*before, *MADE})


def test_readme(repo):
    sync(repo)
    text = (repo / 'README.md').read_text()
    kept = [
        '# Title\n\n> subtitle\n\n[![Tests]',
        '### Lessons\n\n| notebook | what it is about |\n|---|---|\n'
        '| [00 First](nbs/00_first.ipynb) | one |\n',
        '### Workshop\n\n| notebook | what it is about |\n|---|---|\n'
        '| [90 Tools: sharp](nbs/90_tools.ipynb) | two |\n',
        '[`first`](nbs/00_first.ipynb), [a log](CHANGELOG.md),\n',
        '\n## A heading\n\nClone <https://github.com/first-user/first-repo>.\n',
        '```bash\necho "{#kept} [kept](kept.ipynb) @kept"\n```',
        '![A caption.](nbs/images/readme_1.png)\n\nA caption.\n',
        '```python\nshown()\n```',
        '    a result\n',
    ]
    assert [part for part in kept if part not in text] == []
    assert not any(
        part in text
        for part in ['hidden', 'unseen', 'a view', '#|', ':::', 'pip install', '\n\n\n']
    )
    assert (repo / 'nbs/images/readme_1.png').read_bytes() == base64.b64decode(PNG)


def test_the_sidebar_shows_titles_in_two_wings(repo):
    sync(repo)
    site = yaml.safe_load((repo / 'nbs/site.yml').read_text())
    start, lessons, behind = site['website']['sidebar']['contents']
    (workshop,) = behind['contents']
    assert start['href'] == 'index.ipynb'
    assert lessons == {
        'section': 'Lessons',
        'contents': [{'href': '00_first.ipynb', 'text': 'First'}],
    }
    assert workshop['contents'] == [{'href': '90_tools.ipynb', 'text': 'Tools: sharp'}]
    assert site['repo-url'] == 'https://github.com/first-user/first-repo'


@pytest.mark.parametrize('name', [name for name in MADE if not name.endswith('.svg')])
def test_check_names_a_planted_difference(repo, name):
    sync(repo)
    right, path = snapshot(repo), repo / name
    path.write_bytes(
        path.read_bytes().replace(b'first-user/', b'someone-else/').replace(b'PNG', b'GIF')
    )
    assert sync(repo, '--check') == (
        f'out of sync: {name}\n',
        'Run `python tools/sync.py` and commit what it writes.',
    )
    assert sync(repo) == (f'wrote {name}\n', 0) and snapshot(repo) == right


def test_a_figure_that_is_gone_is_deleted(repo):
    sync(repo)
    stale = repo / 'nbs/images/readme_7.png'
    stale.write_bytes(b'old')
    assert sync(repo, '--check')[0] == 'out of sync: nbs/images/readme_7.png\n' and stale.exists()
    assert sync(repo) == ('deleted nbs/images/readme_7.png\n', 0) and not stale.exists()


def test_the_address_follows_settings_and_nbdev_writes_the_same(repo):
    sync(repo)
    set_address(repo, 'another-user/another-repo')
    assert sync(repo)[1] == 0
    moved = snapshot(repo)
    assert not any(b'first-' in data for data in moved.values())
    assert all(
        b'another-user/another-repo' in moved[name]
        for name in MADE
        if not name.startswith('nbs/images')
    )
    nbdev = 'from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()'
    subprocess.run([sys.executable, '-c', nbdev], cwd=repo, check=True)
    subprocess.run([Path(sys.executable).with_name('nbdev_clean')], cwd=repo, check=True)
    assert snapshot(repo) == moved | {'nbs/_quarto.yml': (repo / 'nbs/_quarto.yml').read_bytes()}


BAD = [
    ([markdown('no title')], 'first cell must be'),
    (
        [markdown('# T'), markdown('https://github.com/first-user/first-repo')],
        'spells out the address',
    ),
    ([markdown('# T'), markdown('as in @vaswani2017')], '@vaswani2017 would address a person'),
]


@pytest.mark.parametrize('cells, message', BAD, ids=[message for _, message in BAD])
def test_a_bad_index_is_refused_and_nothing_written(repo, cells, message):
    write(repo / 'nbs/index.ipynb', *cells)
    before = snapshot(repo)
    assert message in sync(repo)[1] and snapshot(repo) == before


def test_the_address_stands_in_settings_alone():
    config = ConfigParser()
    config.read(ROOT / 'settings.ini')
    cfg = config['DEFAULT']
    derived = {
        'settings.ini',
        'README.md',
        'nbs/nbdev.yml',
        'nbs/site.yml',
        'transformers_tut/_modidx.py',
    }
    places = ['-e', f'{cfg["user"]}/{cfg["repo"]}', '-e', cfg['doc_host'], '--', ':!nbs/*.ipynb']
    found = subprocess.run(
        ['git', 'grep', '--untracked', '-lF', *places], cwd=ROOT, capture_output=True, text=True
    )
    assert set(found.stdout.split()) <= derived
