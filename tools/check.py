"""Check what no test sees: links, cross-references, citations, tables of contents, YAML, and the form of the Markdown.

Reads the notebooks in nbs, README.md, CONTRIBUTING.md, CHANGELOG.md, nbs/references.bib and the YAML files; prints a line
for each problem. Nothing is fetched or written, and no Quarto is needed. References such as @fig-x reach labels of their
own notebook only: in a website, another notebook is reached by a link to NAME.ipynb#sec-x. Python code is not looked at.
"""

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from urllib.parse import unquote

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
TEXTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
BADGE = "(https://colab.research.google.com/github/"
COLAB_GUARD = "! [ -e /content ] &&"

CROSS_REFERENCE = ("fig", "tbl", "eq", "sec", "lst")
FIELDS = {  # of a bibliography entry; a | b: one of them
    "article": "author title journal year",
    "book": "author|editor title publisher year",
    "inproceedings": "author title booktitle year",
    "misc": "author title year url|doi|howpublished",
    "phdthesis": "author title school year",
}
VOID_TAGS = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
PLACEHOLDER = re.compile(r"\b(?:TODO|FIXME|XXX|localhost|example\.(?:com|org|net))\b|\byour[-_]|[<>{}]", re.I)

FENCE = re.compile(r"[ \t>]*(`{3,}|~{3,})(.*)")
INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)\1(?!`)", re.S)
DISPLAY_MATH = re.compile(r"\$\$(.*?)\$\$", re.S)
INLINE_MATH = re.compile(r"\$(?=\S)(?:[^$\n]|\n(?![ \t]*\n))+?(?<=\S)\$(?!\d)")
HEADING = re.compile(r"^(#{1,6})[ \t]+(.*)$", re.M)
LABEL = re.compile(r"\{#([A-Za-z][\w:.-]*)")
LINK = re.compile(
    r"\]\(((?:[^()]|\([^()]*\))*)\)"  # [text](target "title"), ![text](target)
    r"|^\[[^]^][^]]*\]:[ \t]*(\S+)"  # [name]: target
    r"|\b(?:src|href)=\"([^\"]*)\""
    r"|<(https?:[^>]*)>",
    re.M,
)
MENTION = re.compile(r"(?<![\w/.@])@\{?([A-Za-z]\w*(?:[:.-]+\w+)*)")
TAG = re.compile(r"<(/?)([A-Za-z][\w-]*)(?:\s[^<>]*?)?(/?)>")
META = re.compile(r"\{\{<\s*meta\s+website\.([\w-]+)\s*>\}\}")


def blank(match):
    "Spaces for all but the ends of lines: what follows keeps its place"
    return re.sub(r"[^\n]", " ", match[0])


def without_fences(source):
    "The text with its code blocks blanked, and the fence that is left open, if there is one"
    lines, fence = [], None
    for line in source.split("\n"):
        match = FENCE.match(line)
        delimiter = fence or (match and not (match[1][0] == "`" and "`" in match[2]))
        lines.append(" " * len(line) if delimiter else line)
        if fence and match and match[1].startswith(fence) and not match[2].strip():
            fence = None
        elif not fence and delimiter:
            fence = match[1]
    return "\n".join(lines), fence


@dataclass
class Cell:
    "A cell of a notebook, or a whole Markdown file"

    where: str
    kind: str
    source: str

    @cached_property
    def directives(self):
        "The `#|` lines of a code cell: {name: value}"
        return dict(re.findall(r"^#\|[ \t]*([\w-]+):?[ \t]*(.*?)[ \t]*$", self.source, re.M)) if self.kind == "code" else {}

    @cached_property
    def prose(self):
        "Markdown, or the captions of a code cell, with code, comments and escaped characters blanked"
        if self.kind != "markdown":
            return "\n".join(text for name, text in self.directives.items() if name.endswith(("-cap", "-alt")))
        text = without_fences(self.source)[0]
        for pattern in [re.compile(r"<!--.*?-->", re.S), INLINE_CODE, re.compile(r"\\[^\w\s]")]:
            text = pattern.sub(blank, text)
        return text

    @cached_property
    def plain(self):
        "Prose with its mathematics blanked"
        return INLINE_MATH.sub(blank, DISPLAY_MATH.sub(blank, self.prose))


@dataclass
class Page:
    "A notebook or a Markdown file"

    path: Path
    cells: list

    @property
    def name(self):
        return self.path.relative_to(ROOT).as_posix()

    @property
    def markdown(self):
        return [cell for cell in self.cells if cell.kind == "markdown"]

    @property
    def is_notebook(self):
        return self.path.suffix == ".ipynb"

    @cached_property
    def headings(self):
        "Cell, level and text of each"
        return [
            (cell, len(match[1]), cell.source[match.start(2) : match.end(2)])
            for cell in self.markdown
            for match in HEADING.finditer(cell.prose)
        ]

    @cached_property
    def labels(self):
        "Cell and label of each figure, table, equation and section that has one"
        directives = [(cell, cell.directives["label"]) for cell in self.cells if "label" in cell.directives]
        return directives + [(cell, match[1]) for cell in self.markdown for match in LABEL.finditer(cell.prose)]

    @cached_property
    def anchors(self):
        "What a link may name behind #: labels, and headings by GitHub's rule and by Pandoc's"
        unlabelled = [slug for _, _, text in self.headings if not LABEL.search(text) for slug in slugs(text)]
        return {label for _, label in self.labels}.union(unlabelled)


def slugs(heading):
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "").strip().lower()
    pandoc = re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", text))
    return re.sub(r"[^\w -]", "", text).replace(" ", "-"), re.sub(r"^[^a-z]+", "", pandoc)


def read_page(path):
    name = path.relative_to(ROOT).as_posix()
    if path.suffix != ".ipynb":
        return Page(path, [Cell(name, "markdown", path.read_text(encoding="utf-8"))])
    nb = nbformat.read(path, as_version=4)
    return Page(path, [Cell(f"{name}: cell {n}", c.cell_type, c.source) for n, c in enumerate(nb.cells, 1)])


# One page: each check yields its problems, "where: what"


def check_form(page):
    "Fences, call-outs, display equations and HTML are closed, in the cell where they begin"
    for cell in page.markdown:
        if fence := without_fences(cell.source)[1]:
            yield f"{cell.where}: the code fence {fence} is not closed"
        if len(re.findall(r"^:{3,}[ \t]*\S", cell.prose, re.M)) != len(re.findall(r"^:{3,}[ \t]*$", cell.prose, re.M)):
            yield f"{cell.where}: the fences ::: do not balance"
        if cell.prose.count("$$") % 2:
            yield f"{cell.where}: an odd number of $$"
        elif any(re.search(r"\n[ \t]*\n", match[1]) for match in DISPLAY_MATH.finditer(cell.prose)):
            yield f"{cell.where}: an empty line between $$ and $$ ends the equation"
        yield from check_tags(cell)


def check_tags(cell):
    opened = []
    for closing, name, empty in TAG.findall(cell.plain):
        if not closing and not empty and name.lower() not in VOID_TAGS:
            opened.append(name)
        elif closing and (not opened or opened.pop() != name):
            yield f"{cell.where}: </{name}> closes nothing"
    yield from (f"{cell.where}: <{name}> is not closed" for name in opened)


def check_headings(page):
    "One title, and no level left out"
    last = 0
    for cell, level, text in page.headings:
        if level > last + 1:
            yield f"{cell.where}: the heading '{text}' skips a level"
        if level == 1 and last:
            yield f"{cell.where}: '{text}' is a second title"
        last = level


def check_house(page):
    "A notebook's first cells, and its module's name"
    first, *rest = page.cells
    if not re.match(r"# \S[^\n]*\n\n> \S", first.source) or first.kind != "markdown":
        yield f"{first.where}: must begin with '# Title', an empty line and '> description'"
    badges = [cell for cell in page.markdown if BADGE in cell.source and f"/nbs/{page.path.name})" in cell.source]
    if not badges or not any(COLAB_GUARD in cell.source for cell in rest):
        yield f"{page.name}: lacks its Colab badge or install cell; run tools/sync.py"
    modules = [cell.directives["default_exp"] for cell in page.cells if "default_exp" in cell.directives]
    if page.path.stem != "index" and modules != [page.path.stem.partition("_")[2]]:
        yield f"{page.name}: must export to the module it is named after, found {modules}"


def check_directives(page):
    "Quarto reads `#| name: value` as YAML"
    for cell in page.cells:
        for line in re.findall(r"^#\|[ \t]*([\w-]+:[ \t].*)$", cell.source if cell.kind == "code" else "", re.M):
            try:
                yaml.safe_load(line)
            except yaml.YAMLError:
                yield f"{cell.where}: '#| {line}' is not YAML; quote the value"


def check_labels(page):
    "Each only once, where it belongs; figures and tables have a caption"
    counts = Counter(label for _, label in page.labels)
    for cell, label in page.labels:
        kind = label.partition("-")[0]
        if counts[label] > 1:
            yield f"{cell.where}: the label {label} stands {counts[label]} times in this notebook"
        if cell.kind == "code" and kind in ("fig", "tbl") and not cell.directives.get(f"{kind}-cap"):
            yield f"{cell.where}: {label} has no {kind}-cap"
        if cell.kind == "markdown" and kind == "eq" and not re.search(rf"\$\$[ \t]*\{{#{label}\}}", cell.prose):
            yield f"{cell.where}: {label} must stand right behind the closing $$"
        if cell.kind == "markdown" and kind == "sec" and not re.search(rf"^#.*\{{#{label}\b", cell.prose, re.M):
            yield f"{cell.where}: {label} must stand in a heading"


def mentions(page):
    "Cell, key and kind of each @key in the prose; kind is None for a citation"
    for cell in page.cells:
        for match in MENTION.finditer(cell.plain):
            kind = match[1].partition("-")[0].lower()
            yield cell, match[1], kind if kind in CROSS_REFERENCE and "-" in match[1] else None


def check_references(page, numbered_sections):
    "Each @fig-x, @tbl-x, @eq-x has its label in the same notebook"
    labels = {label for _, label in page.labels}
    for cell, key, kind in mentions(page):
        if kind and key[0].lower() + key[1:] not in labels:
            yield f"{cell.where}: @{key} has no label in this notebook (to another one, link: NAME.ipynb#sec-x)"
        elif kind == "sec" and not numbered_sections:
            yield f"{cell.where}: @{key} needs number-sections: true; link to #{key} instead"


def check_citations(page, keys):
    for cell, key, kind in mentions(page):
        if kind is None and key not in keys:
            yield f"{cell.where}: @{key} is not in nbs/references.bib"


def check_links(page, pages, site):
    for cell in page.cells:
        prose = META.sub(lambda match: str(site.get(match[1], match[0])), cell.plain)
        for groups in LINK.findall(prose):
            target = re.sub(r"\s+([\"']).*\1$", "", "".join(groups).strip(), flags=re.S)
            if problem := link_problem(page, pages, target):
                yield f"{cell.where}: the link '{target}' {problem}"


def link_problem(page, pages, target):
    "What is wrong with a link, or None; addresses elsewhere are not fetched"
    if not target.strip("#"):
        return "leads nowhere"
    if re.search(r"\s", target):
        return "has a space in it"
    if PLACEHOLDER.search(target):
        return "is a placeholder"
    if re.match(r"[A-Za-z][\w+.-]*:", target):
        return None if re.match(r"https://[\w-]+(\.[\w-]+)+([/?#]|$)|mailto:\S+@\S+$", target) else "is not an https address"
    name, _, anchor = target.partition("#")
    path = (page.path.parent / unquote(name)).resolve() if name else page.path
    if not path.is_relative_to(ROOT) or not path.exists():
        return "leads to no file"
    if page.is_notebook and not path.is_relative_to(NBS):
        return "leads out of nbs, which is not on the site; begin it with {{< meta website.repo-url >}}"
    if anchor and path in pages and anchor not in pages[path].anchors:
        return f"leads to no section or label of {path.name}"


# The whole: bibliography, tables of contents, YAML


def read_bibliography():
    "What {key: (type, entry)} nbs/references.bib holds, and its problems"
    entries, problems = {}, []
    for text in re.split(r"^(?=@)", (NBS / "references.bib").read_text(encoding="utf-8"), flags=re.M)[1:]:
        match = re.match(r"@(\w+)\{([^\s,{}]+),", text)
        if not match:
            problems.append(f"nbs/references.bib: cannot read the entry that begins with {text[:30]!r}")
            continue
        if match[2] in entries:
            problems.append(f"nbs/references.bib: {match[2]} stands there twice")
        entries[match[2]] = match[1].lower(), text
    return entries, problems


def check_bibliography(entries, used):
    for key, (kind, text) in entries.items():
        where, found = f"nbs/references.bib: {key}", dict(re.findall(r"^\s*(\w+)\s*=\s*(.*?),?\s*$", text, re.M))
        depth = 0
        for brace in re.findall(r"(?<!\\)[{}]", text.rstrip()):
            depth += 1 if brace == "{" else -1
            if depth < 0:
                break
        if depth:
            yield f"{where} has unbalanced braces"
        if kind not in FIELDS:
            yield f"{where} is of an unknown type, {kind}"
        for fields in FIELDS.get(kind, "").split():
            if not any(found.get(field, "").strip('{}" ') for field in fields.split("|")):
                yield f"{where} lacks {fields.replace('|', ' or ')}"
        if "url" in found and not re.fullmatch(r"[{\"]https://\S+[}\"]", found["url"]):
            yield f"{where}: its url is not an https address"
        if key not in used:
            yield f"{where} is not cited"


def sidebar_entries(contents):
    for entry in contents:
        if isinstance(entry, str):
            yield entry
        else:
            yield from [entry[name] for name in ("href", "file") if name in entry]
            yield from sidebar_entries(entry.get("contents", []))


def check_table(where, found, expected):
    "A list of notebooks holds them all, in the order of their numbers"
    for name in sorted(set(expected) - set(found)):
        yield f"{where}: {name} is missing"
    for name in found:
        if name not in expected:
            yield f"{where}: there is no notebook {name}"
        elif found.count(name) > 1:
            yield f"{where}: {name} stands there twice"
    if [name for name in found if name in expected] != sorted(set(found) & set(expected), key=expected.index):
        yield f"{where}: not in reading order"


def check_contents(pages, config):
    "The sidebar, CONTRIBUTING.md's table and the index's name every notebook; the preview image is there"
    if not (image := NBS / config["website"].get("image", "")).exists():
        yield f"_quarto.yml: image: there is no file {image.relative_to(ROOT).as_posix()}"
    numbered = sorted(page.path.stem for page in pages if page.is_notebook and page.path.stem != "index")
    entries = sidebar_entries(config["website"]["sidebar"]["contents"])
    yield from check_table("_quarto.yml: sidebar", list(entries), [f"{name}.ipynb" for name in ["index", *numbered]])
    for name, row in [("CONTRIBUTING.md", r"^\| `(\d\w+)` \|"), ("nbs/index.ipynb", r"^\| \[(\d\w+)\]\(")]:
        cells = [cell.source for page in pages if page.name == name for cell in page.markdown]
        yield from check_table(f"{name}: table", re.findall(row, "\n".join(cells), re.M), numbered)


class OnceLoader(yaml.SafeLoader):
    "Refuses keys that stand twice, of which YAML would take the last"

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := [key for key, count in Counter(map(str, keys)).items() if count > 1]:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]} stands there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml():
    "What {path: content} the YAML files hold, and their problems"
    contents, problems = {}, []
    patterns = ["*.yml", ".*.yaml", "nbs/nbdev.yml", ".github/**/*.yml"]
    for path in sorted(chain.from_iterable(map(ROOT.glob, patterns))):
        try:
            contents[path.name] = yaml.load(path.read_text(encoding="utf-8"), OnceLoader)
        except yaml.YAMLError as e:
            mark, problem = getattr(e, "problem_mark", None), getattr(e, "problem", e)
            line = f"line {mark.line + 1}: " if mark else ""
            problems.append(f"{path.relative_to(ROOT).as_posix()}: {line}{problem}")
    return contents, problems


def find_problems():
    "All problems, and how many pages and YAML files were read"
    files, problems = read_yaml()
    site = {**files.get("_quarto.yml", {}).get("website", {}), **files.get("nbdev.yml", {}).get("website", {})}
    html = files.get("_quarto.yml", {}).get("format", {}).get("html", {})
    notebooks = sorted(NBS.glob("*.ipynb"))
    pages = {path: read_page(path) for path in [*notebooks, *(ROOT / name for name in TEXTS)]}
    entries, more = read_bibliography()
    problems += more
    cited = set()
    for page in pages.values():
        checks = [check_form(page), check_headings(page), check_links(page, pages, site)]
        if page.is_notebook:
            cited.update(key for _, key, kind in mentions(page) if kind is None)
            checks += [check_house(page), check_directives(page), check_labels(page), check_citations(page, entries)]
            checks += [check_references(page, html.get("number-sections"))]
        problems += chain.from_iterable(checks)
    problems += check_bibliography(entries, cited)
    if "_quarto.yml" in files:
        problems += check_contents(pages.values(), files["_quarto.yml"])
    return problems, len(pages), len(files)


def main():
    about, details = __doc__.split("\n\n", 1)
    argparse.ArgumentParser(description=about, epilog=details).parse_args()
    problems, pages, files = find_problems()
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"{pages} notebooks and texts and {files} YAML files: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
