"""Check what no test and no linter sees in the notebooks and Markdown files.

Links, cross-references and citations lead somewhere; labels stand once and have captions; figures
have alternative text, and questions answers; imports between notebooks only go down, and the
workshop (9x) imports no lesson. Nothing is fetched or written. References such as @fig-x reach
labels of their own notebook only: in a website, another notebook is reached by a link to
NAME.ipynb#sec-x.
"""

import argparse
import ast
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / 'nbs'
PACKAGE = 'transformers_tut'
CROSS_REFERENCE = ('fig', 'tbl', 'eq', 'sec', 'lst')
HEAVIEST = 1_500_000  # bytes of a notebook: what a visitor has to load

FENCED = re.compile(r'^[ \t>]*(`{3,}|~{3,}).*?^[ \t>]*\1[ \t]*$', re.M | re.S)
INLINE_CODE = re.compile(r'(`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)\1(?!`)', re.S)
MATH = re.compile(r'\$\$.*?\$\$|\$(?=\S)[^$\n]+?(?<=\S)\$(?!\d)', re.S)
HEADING = re.compile(r'^#{1,6}[ \t]+(.*)$', re.M)
LABEL = re.compile(r'\{#([A-Za-z][\w:.-]*)')
MENTION = re.compile(r'(?<![\w/.@])@\{?([A-Za-z]\w*(?:[:.-]+\w+)*)')
META = re.compile(r'\{\{<\s*meta\s+([\w-]+)\s*>\}\}')
LINK = re.compile(
    r'\]\(((?:[^()]|\([^()]*\))*)\)'  # [text](target "title"), ![text](target)
    r'|^\[[^]^][^]]*\]:[ \t]*(\S+)'  # [name]: target
    r'|\b(?:src|href)="([^"]*)"'
    r'|<(https?:[^>]*)>',
    re.M,
)


@dataclass
class Cell:
    "A cell of a notebook, or a whole Markdown file"

    where: str
    kind: str
    source: str
    pictures: bool = False
    tags: tuple = ()

    @cached_property
    def directives(self):
        "The `#|` lines of a code cell: {name: value}"
        found = re.findall(r'^#\|[ \t]*([\w-]+):?[ \t]*(.*?)[ \t]*$', self.source, re.M)
        return dict(found) if self.kind == 'code' else {}

    @cached_property
    def prose(self):
        "Markdown without code, or the captions of a code cell"
        if self.kind == 'code':
            return '\n'.join(v for k, v in self.directives.items() if k.endswith(('-cap', '-alt')))
        text = self.source
        for pattern in [
            FENCED,
            re.compile('<!--.*?-->', re.S),
            INLINE_CODE,
            re.compile(r'\\[^\w\s]'),
        ]:
            text = pattern.sub(' ', text)
        return text


@dataclass
class Page:
    "A notebook or a Markdown file"

    path: Path
    cells: list

    @cached_property
    def labels(self):
        "Cell and label of each figure, table, equation and section that has one"
        directives = [(c, c.directives['label']) for c in self.cells if 'label' in c.directives]
        return directives + [(c, m[1]) for c in self.cells for m in LABEL.finditer(c.prose)]

    @cached_property
    def anchors(self):
        "What a link may name behind #: labels, and headings by GitHub's rule and by Pandoc's"
        headings = [
            m[1] for c in self.cells if c.kind == 'markdown' for m in HEADING.finditer(c.source)
        ]
        return {label for _, label in self.labels}.union(*map(slugs, headings))


def slugs(heading):
    text = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading.partition('{#')[0])
    text = re.sub('[`*]', '', text).strip().lower()
    pandoc = re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', text))
    return re.sub(r'[^\w -]', '', text).replace(' ', '-'), re.sub(r'^[^a-z]+', '', pandoc)


def read_page(path):
    name = path.relative_to(ROOT).as_posix()
    if path.suffix != '.ipynb':
        return Page(path, [Cell(name, 'markdown', path.read_text(encoding='utf-8'))])
    cells = []
    for n, c in enumerate(nbformat.read(path, as_version=4).cells, 1):
        kinds = {kind for output in c.get('outputs', []) for kind in output.get('data', {})}
        pictures = any(kind.startswith('image/') for kind in kinds)
        tags = tuple(c.metadata.get('tags', []))
        cells.append(Cell(f'{name}: cell {n}', c.cell_type, c.source, pictures, tags))
    return Page(path, cells)


def check_labels(page):
    "Each only once; figures and tables have a caption, and every figure alternative text"
    counts = Counter(label for _, label in page.labels)
    for cell, label in page.labels:
        if counts[label] > 1:
            yield f'{cell.where}: the label {label} stands {counts[label]} times in this notebook'
        kind = label.partition('-')[0]
        if (
            cell.kind == 'code'
            and kind in ('fig', 'tbl')
            and not cell.directives.get(f'{kind}-cap')
        ):
            yield f'{cell.where}: {label} has no {kind}-cap'
    for cell in page.cells:
        if cell.pictures and 'hide' not in cell.directives and not cell.directives.get('fig-alt'):
            yield f'{cell.where}: its figure has no fig-alt, which says what is to be seen'


def check_directives(page):
    "Quarto reads `#| name: value` as YAML"
    for cell in page.cells:
        for name, value in cell.directives.items():
            if name in ('hint', 'write'):  # for the workbook, without a colon
                continue
            try:
                yaml.safe_load(f'{name}: {value}')
            except yaml.YAMLError:
                yield f"{cell.where}: '#| {name}: {value}' is not YAML; quote the value"


def check_mentions(page, citations):
    "Each @fig-x has its label in the same notebook, each other @key its entry in references.bib"
    labels = {label for _, label in page.labels}
    for cell in page.cells:
        for key in MENTION.findall(MATH.sub(' ', cell.prose)):
            if key.partition('-')[0].lower() not in CROSS_REFERENCE or '-' not in key:
                if key not in citations:
                    yield f'{cell.where}: @{key} is not in nbs/references.bib'
            elif key[0].lower() + key[1:] not in labels:
                yield f'{cell.where}: @{key} has no label in this notebook'
            elif key.startswith('sec-'):
                yield f'{cell.where}: @{key} needs numbered sections; link to #{key} instead'


def check_links(page, pages, site):
    for cell in page.cells:
        prose = META.sub(lambda m: str(site.get(m[1], m[0])), MATH.sub(' ', cell.prose))
        for groups in LINK.findall(prose):
            target = re.sub(r'\s+(["\']).*\1$', '', ''.join(groups).strip(), flags=re.S)
            if problem := link_problem(page, pages, target):
                yield f"{cell.where}: the link '{target}' {problem}"


def link_problem(page, pages, target):
    "What is wrong with a link, or None; addresses elsewhere are not fetched"
    if not target.strip('#'):
        return 'leads nowhere'
    if re.search(r'[\s<>{}]', target):
        return 'is not an address'
    if re.match(r'[A-Za-z][\w+.-]*:', target):
        https = re.match(r'https://[\w-]+(\.[\w-]+)+([/?#]|$)|mailto:\S+@\S+$', target)
        return None if https else 'is not an https address'
    name, _, anchor = target.partition('#')
    path = (page.path.parent / unquote(name)).resolve() if name else page.path
    if not path.is_relative_to(ROOT) or not path.exists():
        return 'leads to no file'
    if page.path.suffix == '.ipynb' and not path.is_relative_to(NBS):
        return 'leads out of nbs, which is not on the site; begin it with {{< meta repo-url >}}'
    if anchor and path in pages and anchor not in pages[path].anchors:
        return f'leads to no section or label of {path.name}'


def imported_modules(page):
    "Which modules of the package the cells import"
    for cell in page.cells:
        magic = re.search(r'^[!%]', cell.source, re.M)
        if cell.kind != 'code' or magic:
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if (
                isinstance(node, ast.ImportFrom)
                and (node.module or '').partition('.')[0] == PACKAGE
            ):
                modules = (
                    [node.module]
                    if '.' in node.module
                    else [f'{PACKAGE}.{a.name}' for a in node.names]
                )
                yield from ((cell, module.split('.')[1]) for module in modules)


def check_house(page, numbers):
    "Title and description, a module of the same name, imports that only go down, and weight"
    first = page.cells[0]
    if first.kind != 'markdown' or not re.match(r'# \S[^\n]*\n\n> \S', first.source):
        yield f"{first.where}: must begin with '# Title', an empty line and '> description'"
    number, _, name = page.path.stem.partition('_')
    if (size := page.path.stat().st_size) > HEAVIEST:
        yield f'{page.path.name}: {size / 1e6:.1f} MB, more than a visitor should load'
    if not name:  # the index
        return
    modules = [c.directives['default_exp'] for c in page.cells if 'default_exp' in c.directives]
    if modules != [name]:
        yield f'{page.path.name}: must export to the module it is named after, found {modules}'
    for cell, module in imported_modules(page):
        other = numbers.get(module, number)
        if other.startswith('9') != number.startswith('9'):  # one wing
            allowed = not number.startswith('9')
        else:
            allowed = other <= number
        if not allowed:
            yield f'{cell.where}: {number}_{name} must not import {other}_{module}'


def check_answers(page):
    "Each question of 'Try it' has its answer behind it, folded on the site"
    headings = [n for n, c in enumerate(page.cells) if c.source.startswith('## Try it')]
    for n in headings:
        rest = page.cells[n + 1 :]
        if not rest:
            yield f'{page.cells[n].where}: give each question a cell of its own, and an answer'
        for cell, behind in zip(rest, [*rest[1:], None]):
            if re.match(r'\*\*\d+\.\*\*', cell.source) and not (
                behind and 'answer' in behind.tags and 'code-fold' in behind.directives
            ):
                yield f'{cell.where}: behind it there must be a folded cell tagged "answer"'


def check_imports(page):
    "To make the site of a module, nbdev runs each cell with an import, and all else in it"
    for cell in page.cells if page.path.stem != 'index' else []:
        shown = cell.kind == 'code' and not cell.directives.keys() & {'export', 'exports', 'eval'}
        if not shown or re.search(r'^[!%]|nbdev_export\(\)', cell.source, re.M):
            continue
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(cell.source).body}
        if kinds == {True, False}:
            yield f'{cell.where}: imports and other code; give the imports a cell of their own'


def definitions(page):
    "Each exported cell with the public functions and classes that it defines"
    for cell in page.cells:
        if cell.directives.keys() & {'export', 'exports'}:
            nodes = ast.parse(cell.source).body
            kinds = (ast.FunctionDef, ast.ClassDef)
            yield (cell, [n.name for n in nodes if isinstance(n, kinds) and n.name[0] != '_'])


def check_linked_names(page, names):
    "nbdev makes a link of a name in backticks, and one link cannot stand in another"
    for cell in page.cells:
        for name in re.findall(r'\[[^]\n]*`(\w+)`[^]\n]*\]\(', FENCED.sub('', cell.source)):
            if cell.kind == 'markdown' and name in names:
                yield f'{cell.where}: write {name} without backticks in the text of a link'


def check_exports(page, names):
    "The site documents the first definition of a cell, and makes links of names in backticks"
    for cell, public in definitions(page):
        if len(public) > 1:
            yield f'{cell.where}: defines {" and ".join(public)}; give each a cell of its own'
        for name in re.findall(r'^[^#\n]*[,:(]\s*#[^|\n]*?`(\w+)[`(.]', cell.source, re.M):
            if name in names:
                yield f'{cell.where}: write {name} without backticks in a comment on a parameter'
        if (
            'exports' in cell.directives
            and len(re.findall('^(from|import) ', cell.source, re.M)) > 3
        ):
            yield f'{cell.where}: imports before the idea; #| export hides them'


def run():
    pages = [*sorted(NBS.glob('[0-9]*.ipynb')), NBS / 'index.ipynb']
    pages += [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')]
    pages = {path: read_page(path) for path in pages}
    numbers = {path.stem[3:]: path.stem[:2] for path in pages if path.suffix == '.ipynb'}
    citations = set(
        re.findall(r'^@\w+\{([^,\s]+),', (NBS / 'references.bib').read_text('utf-8'), re.M)
    )
    names = {n for page in pages.values() for _, public in definitions(page) for n in public}
    site = yaml.safe_load((NBS / 'site.yml').read_text(encoding='utf-8'))
    for page in pages.values():
        yield from check_links(page, pages, site)
        if page.path.suffix == '.ipynb':
            yield from check_labels(page)
            yield from check_directives(page)
            yield from check_mentions(page, citations)
            yield from check_house(page, numbers)
            yield from check_imports(page)
            yield from check_exports(page, names)
            yield from check_answers(page)
            yield from check_linked_names(page, names)


def main():
    about, details = __doc__.split('\n\n', 1)
    argparse.ArgumentParser(description=about, epilog=details).parse_args()
    problems = list(run())
    print(
        '\n'.join(
            [
                *problems,
                f'tools/check.py: {len(problems) or "no"} problem{"s" * (len(problems) != 1)}',
            ]
        )
    )
    sys.exit(bool(problems))


if __name__ == '__main__':
    main()
