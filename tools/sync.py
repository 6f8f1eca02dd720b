"""Derive what several places say from the one place that knows it.

From settings.ini, the address: nbs/nbdev.yml, and each notebook's Colab badge and install cell.
From the notebooks' titles and descriptions: navigation in nbs/site.yml and the table of
notebooks in index.ipynb, in the order of their numbers. From the lessons: nbs/_workbook, the
exercises as Colab opens them. From nbs/index.ipynb: README.md and its figures,
nbs/images/readme_<n>.*, without Quarto. Files are replaced in one step, and left alone where
nothing changes.
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
from nbdev.quarto import _nbdev_yml  # the template of the pinned nbdev, which writes the same file
from traitlets.config import Config

from transformers_tut.workbook import _make_workbooks

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / 'nbs'
BADGE_IMAGE = 'https://colab.research.google.com/assets/colab-badge.svg'
WORKBOOK = '_workbook'  # nbdev and Quarto leave out what begins with an underscore
COLAB_GUARD = '! [ -e /content ]'


def read_settings():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def colab_url(cfg, notebook):
    place = f'{cfg["user"]}/{cfg["repo"]}/blob/{cfg["branch"]}/nbs/{notebook}'
    return f'https://colab.research.google.com/github/{place}'


def colab_badge(cfg, notebook):
    "The badge that opens `notebook` on Colab; as HTML, or Quarto would make it a figure"
    url = colab_url(cfg, notebook)
    return f'<a href="{url}"><img src="{BADGE_IMAGE}" alt="Open in Colab"></a>'


def is_colab(cell):
    source = ''.join(cell['source'])
    return COLAB_GUARD in source if cell['cell_type'] == 'code' else BADGE_IMAGE in source


def with_colab_cells(nb, name, cfg):
    "The notebook with its badge and install cell behind the title, found by what they hold"
    badge = {'cell_type': 'markdown', 'id': 'colab-badge', 'metadata': {}}
    badge |= {'source': [colab_badge(cfg, name)]}
    if any('exercise' in cell['metadata'].get('tags', []) for cell in nb['cells']):
        url = colab_url(cfg, f'{WORKBOOK}/{name}')
        badge['source'] = [f'{badge["source"][0]}\n', f'<a href="{url}">as exercises</a>']
    clone = f'{COLAB_GUARD} && git clone --depth 1 {cfg["git_url"]} repo\n'
    setup = f'{COLAB_GUARD} && pip install -qU fastcore ./repo && ln -sfn repo/nbs/results results'
    lines = ['#| hide\n', '#| eval: false\n', clone, setup]
    install = {'cell_type': 'code', 'id': 'colab-install', 'metadata': {}, 'source': lines}
    install |= {'execution_count': None, 'outputs': []}
    title, *rest = nb['cells']
    if title['cell_type'] != 'markdown' or not ''.join(title['source']).startswith('# '):
        sys.exit(f"nbs/{name}: the first cell must be Markdown that starts with '# Title'")
    rest = [cell for cell in rest if not is_colab(cell)]
    for cell in [title, *rest]:
        if f'{cfg["user"]}/{cfg["repo"]}' in ''.join(cell['source']):
            sys.exit(
                f'nbs/{name}: cell {cell.get("id")} spells out the address; '
                'it stands in settings.ini alone'
            )
    return nb | {'cells': [title, badge, install, *rest]}


def directives(source):
    "Split a code cell into its `#|` directives and the rest"
    found, rest = {}, []
    for line in source.splitlines():
        match = re.match(r'#\|\s*([\w-]+):?\s*(.*)', line)
        if match:
            found[match[1]] = match[2].strip().strip('"\'')
        else:
            rest.append(line)
    return found, '\n'.join(rest).strip()


def for_github(markdown, site):
    "Markdown without Quarto's additions, its relative links seen from the top of the repository"

    def link(match):
        if re.match(r'[a-z]+:|[/#]', match[2]):
            return match[0]
        return match[1] + posixpath.normpath(posixpath.join('nbs', match[2]))

    def prose(text):
        text = re.sub(r'^:{3,}.*\n?', '', text, flags=re.M)  # the fences of call-outs
        text = re.sub(r'[ \t]*\{[#.][A-Za-z][^{}\n]*\}', '', text)  # {#fig-name}, {.class}
        text = re.sub(r'\{\{< meta ([\w-]+) >\}\}', lambda m: site[m[1]], text)
        reference = re.search(r'(?<![\w/.@])@\w[\w-]*', text)
        if reference:
            sys.exit(
                f'nbs/index.ipynb: {reference[0]} would address a person in README.md; '
                'link to it instead'
            )
        return re.sub(r'(\]\(|\b(?:src|href)=\")([^)\"\s]+)', link, text)

    parts = re.split(r'(^```.*?^```[ \t]*$|`[^`\n]+`)', markdown, flags=re.M | re.S)
    return ''.join(part if i % 2 else prose(part) for i, part in enumerate(parts))


def for_readme(output, found, files, site):
    "An output as README.md shows it: a figure as a file, what needs a browser not at all"
    data = output.get('data', {})
    for kind, ending in [('image/svg+xml', 'svg'), ('image/png', 'png')]:
        if kind in data:
            path = NBS / 'images' / f'readme_{len(files) + 1}.{ending}'
            files[path] = data[kind].encode() if ending == 'svg' else base64.b64decode(data[kind])
            caption = for_github(found.get('fig-cap', ''), site)
            file = path.relative_to(ROOT).as_posix()
            alt = found.get('fig-alt', caption)
            output.data = {'text/markdown': f'![{alt}]({file})\n\n{caption}'}
            return [output]
    return [] if 'text/html' in data else [output]


def readme(index, cfg, site):
    "README.md and its figures: {path: content}"
    actions = f'{cfg["git_url"]}/actions/workflows'
    badges = [
        f'[![Tests]({actions}/test.yml/badge.svg)]({actions}/test.yml)',
        f'[![Site]({actions}/docs.yml/badge.svg)]({site["site-url"]})',
        colab_badge(cfg, 'index.ipynb'),
    ]
    nb, cells, files = nbformat.reads(json.dumps(index), as_version=4), [], {}
    for cell in nb.cells:
        if cell.cell_type == 'markdown':
            badge = is_colab(cell)
            cell.source = '\n'.join(badges) if badge else for_github(cell.source, site)
            cells.append(cell)
        elif cell.cell_type == 'code':
            found, cell.source = directives(cell.source)
            if 'hide' in found:
                continue
            if found.get('echo') == 'false':
                cell.metadata.tags = ['no-source']
            outputs = [for_readme(output, found, files, site) for output in cell.outputs]
            cell.outputs = sum(outputs, [])
            cells.append(cell)
    nb.cells = cells
    nb.metadata.language_info = {'name': 'python'}  # nbdev_clean drops it
    tags = {'enabled': True, 'remove_input_tags': {'no-source'}}
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor=tags))
    text, _ = exporter.from_notebook_node(nb)
    text = re.sub(r'\n([ \t]*\n){2,}', '\n\n', text).strip()
    note = '<!-- Made from nbs/index.ipynb by tools/sync.py: change it there. -->'
    return files | {ROOT / 'README.md': f'{note}\n\n{text}\n'.encode()}


def heading(nb):
    "Title and description, from the first cell"
    title, _, rest = ''.join(nb['cells'][0]['source']).partition('\n')
    return title.removeprefix('# ').strip(), rest.strip().removeprefix('>').strip()


def wings(notebooks):
    "The lessons, and the workshop (8x, 9x): {name: notebook} each"
    for title, workshop in [('Lessons', False), ('Workshop', True)]:
        part = {name: nb for name, nb in notebooks.items() if (name >= '8') == workshop}
        if part:
            yield title, part


def site_yml(notebooks, cfg):
    """Navigation, and the address for links to the repository: Quarto keeps website's to itself.

    Quarto folds sections from the second level on: the lessons lie open, the workshop is folded.
    """
    contents = [{'href': 'index.ipynb', 'text': 'Start here'}]
    for title, part in wings(notebooks):
        entries = [{'href': name, 'text': heading(nb)[0]} for name, nb in part.items()]
        section = {'section': title, 'contents': entries}
        if title == 'Workshop':
            section = {'section': 'Behind the lessons', 'contents': [section]}
        contents.append(section)
    sidebar = {'style': 'floating', 'collapse-level': 2, 'contents': contents}
    repository = {'icon': 'github', 'href': cfg['git_url'], 'aria-label': 'The repository'}
    navbar = {'logo': 'images/logo.svg', 'logo-alt': cfg['title'], 'right': [repository]}
    site = {'website': {'navbar': navbar, 'sidebar': sidebar}}
    site |= {'repo-url': cfg['git_url'], 'repo-branch': cfg['branch']}
    site |= {'site-url': cfg['doc_host'] + cfg['doc_baseurl']}
    site |= {'workbook-url': colab_url(cfg, WORKBOOK)}
    note = '# Made from the notebooks and settings.ini by tools/sync.py: change it there.\n'
    return note + yaml.safe_dump(site, sort_keys=False, allow_unicode=True, width=100)


def with_table(index, notebooks):
    "The index with its table of notebooks, in the cell of that id"
    lines = []
    for title, part in wings(notebooks):
        lines += [f'### {title}\n', '\n', '| notebook | what it is about |\n', '|---|---|\n']
        for name, nb in part.items():
            text, description = heading(nb)
            lines.append(f'| [{name[:2]} {text}]({name}) | {description} |\n')
        lines.append('\n')
    table = ''.join(lines).strip().splitlines(keepends=True)
    cells = [c | {'source': table} if c.get('id') == 'notebooks' else c for c in index['cells']]
    return index | {'cells': cells}


def read_notebook(path):
    return json.loads(path.read_text(encoding='utf-8'))


def derive():
    "What every derived file should hold: {path: content}, None for a figure that no longer exists"
    cfg = read_settings()
    keys = ['title', 'description', 'branch', 'git_url', 'doc_host', 'doc_baseurl']
    nbdev_yml = _nbdev_yml.format(doc_path=Path(cfg['doc_path']).name, **{k: cfg[k] for k in keys})
    paths = sorted(NBS.glob('[0-9]*.ipynb'))
    old = {path.name: read_notebook(path) for path in [*paths, NBS / 'index.ipynb']}
    new = {name: with_colab_cells(nb, name, cfg) for name, nb in old.items()}
    lessons = {path.name: new[path.name] for path in paths}
    new['index.ipynb'] = with_table(new['index.ipynb'], lessons)
    site = site_yml(lessons, cfg)
    files = {NBS / 'nbdev.yml': nbdev_yml.encode(), NBS / 'site.yml': site.encode()}
    for name, nb in new.items():
        if nb != old[name]:  # nbdev_clean writes notebooks in this very form
            text = json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n'
            files[NBS / name] = text.encode()
    files |= dict.fromkeys((NBS / 'images').glob('readme_*.*'))
    files |= dict.fromkeys((NBS / WORKBOOK).glob('*.ipynb'))
    for name, text in _make_workbooks(
        lessons, f'{cfg["git_url"]}/blob/{cfg["branch"]}/nbs'
    ).items():
        files[NBS / WORKBOOK / name] = text.encode()
    return files | readme(new['index.ipynb'], cfg, yaml.safe_load(site))


def replace(path, content):
    "Write, or delete where `content` is None, in one step"
    if content is None:
        return path.unlink()
    path.parent.mkdir(exist_ok=True)
    scratch = path.with_name(f'.{path.name}.new')
    scratch.write_bytes(content)
    os.replace(scratch, path)


def write(check=False):
    "Bring what is derived up to date, or with `check` only name what is not; how many files"
    stale = {p: c for p, c in derive().items() if c != (p.read_bytes() if p.exists() else None)}
    for path, content in stale.items():
        if not check:
            replace(path, content)
        done = 'deleted' if content is None else 'wrote'
        print('out of sync:' if check else done, path.relative_to(ROOT))
    return len(stale)


def main():
    about, details = __doc__.split('\n\n', 1)
    parser = argparse.ArgumentParser(description=about, epilog=details)
    help = 'write nothing; name what is out of sync and exit with 1'
    parser.add_argument('--check', action='store_true', help=help)
    check = parser.parse_args().check
    if write(check) and check:
        sys.exit('Run `python tools/sync.py` and commit what it writes.')


if __name__ == '__main__':
    main()
