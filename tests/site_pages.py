"""The site's pages as a visitor sees them, as far as they can be made without Quarto.

nbdev processes the notebooks, Pandoc makes HTML of them in the elements that Quarto uses, and the
site's own styles dress it; of Quarto's themes, the few lines that matter here.
"""

import html
import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from itertools import takewhile
from pathlib import Path

import nbformat
import pypandoc
import yaml

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome'])
BROWSER = next(filter(None, BROWSERS), None)
STYLES, DARK = ((ROOT / 'nbs' / name).read_text() for name in ('styles.css', 'dark.scss'))
IMAGES = {'image/svg+xml': 'svg', 'image/png': 'png', 'image/jpeg': 'jpg'}
WIDTH = yaml.safe_load((ROOT / '_quarto.yml').read_text())['format']['html']['grid']['body-width']
THEME = f"""
body {{ margin: 0; font: 17px/1.5 sans-serif; color: #373a3c; background: #fff; }}
main {{ box-sizing: border-box; max-width: {WIDTH}; margin: auto; padding: 0 1.5em; }}
a {{ color: #2761e3; }}
img, svg {{ max-width: 100%; height: auto; }}
pre {{ margin: 0; padding: .4em; overflow-x: auto; }}
code {{ font: .875em monospace; }}
:not(pre) > code {{ color: #7d12ba; background: #f8f9fa; }}
"""
# Whatever goes wrong is kept; images from elsewhere are not asked for
KEEP_ERRORS = """<script>
window.errors = [];
addEventListener("error", ({ message, target }) => {
  if (!target.src?.startsWith("https:")) errors.push(message ?? target.outerHTML.slice(0, 200));
}, true);
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
for (const kind of ["error", "warn"]) console[kind] = (...words) => errors.push(words.join(" "));
</script>"""


def dark_theme(scss):
    "Quarto's darkly, and what dark.scss sets on top of it"
    variables = {'code-color': '#7d12ba', 'code-bg': '#f8f9fa'}  # cosmo's
    variables |= dict(re.findall(r'^\$([\w-]+): (.*);', scss, re.M))
    code = f'color: {variables["code-color"]}; background: {variables["code-bg"]};'
    rules = scss.partition('/*-- scss:rules --*/')[2]
    return f"""
    body {{ color: #fff; background: #222; }}
    a {{ color: #00bc8c; }}
    :not(pre) > code {{ {code} }} a > code {{ color: inherit; }}
    {rules}"""


def processed(folder):
    "nbdev's processed notebooks, made in `folder`"
    shutil.copytree(ROOT / 'nbs', folder / 'nbs', ignore=lambda *_: {'data', 'results'})
    shutil.copy(ROOT / 'settings.ini', folder)
    shutil.copytree(ROOT / 'tools', folder / 'tools')
    make = 'from nbdev.serve import proc_nbs\nif __name__ == "__main__": proc_nbs(n_workers=2)'
    (folder / 'make.py').write_text(make)
    run = subprocess.run([sys.executable, 'make.py'], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / '_proc'


def options_of(source):
    "A cell's `#|` options, and its code"
    lines = source.splitlines(keepends=True)
    head = list(takewhile(lambda line: line.startswith('#|'), lines))
    options = ''.join(line[2:] for line in head)
    return yaml.safe_load(options) or {}, ''.join(lines[len(head) :]).strip('\n')


def block(text, attributes):
    "Markdown of a code block"
    return f'````` {{{attributes}}}\n{text}\n`````\n\n'


def div(markdown, classes):
    return f'::: {{{classes}}}\n{markdown}\n:::\n\n'


def output_markdown(output, options, folder):
    "What Quarto makes of an output; images become files"
    if output.output_type == 'stream':
        return div(block(output.text, '.text'), f'.cell-output .cell-output-{output.name}')
    data = output.data
    for kind, ending in IMAGES.items():
        if kind in data:
            path = folder / f'{len(list(folder.iterdir()))}.{ending}'
            raw = data[kind].encode() if ending == 'svg' else b64decode(data[kind])
            path.write_bytes(raw)
            size = output.metadata.get(kind, {})
            width = f' width={size["width"]}' if 'width' in size else ''
            label = f'#{options["label"]} ' if 'label' in options else ''
            alt = html.escape(options.get('fig-alt', ''))
            caption = options.get('fig-cap', '')
            text = f'![{caption}]({folder.name}/{path.name}){{{label}alt="{alt}"{width}}}\n'
            return div(text, '.cell-output .cell-output-display')
    if 'text/markdown' in data:
        return ''.join(data['text/markdown']) + '\n\n'
    if 'text/html' in data:
        return div(block(data['text/html'], '=html'), '.cell-output .cell-output-display')
    return div(block(data['text/plain'], '.text'), '.cell-output .cell-output-display')


def cell_markdown(cell, folder):
    if cell.cell_type == 'markdown':
        text = re.sub(r'(\$\$.*?\$\$)\s*\{#(eq-[\w-]+)\}', r'[\1]{#\2}', cell.source, flags=re.S)
        return text + '\n\n'
    if cell.cell_type == 'raw':  # the front matter
        return ''
    options, code = options_of(cell.source)
    text = '' if options.get('echo') is False or not code else block(code, '.python .cell-code')
    if text and 'code-fold' in options:
        is_open = ' open' if options['code-fold'] == 'show' else ''
        summary = options.get('code-summary', 'Code')
        text = f'<details{is_open}><summary>{summary}</summary>\n\n{text}</details>\n\n'
    for output in cell.outputs if options.get('output') is not False else []:
        text += output_markdown(output, options, folder)
    return div(text, '.cell') if text else ''


def html_page(nb, folder, site):
    "A processed notebook as HTML, its images in `folder`"
    folder.mkdir()
    head = yaml.safe_load(nb.cells[0].source.strip().strip('-'))
    text = ''.join(cell_markdown(cell, folder) for cell in nb.cells)
    text = re.sub(r'\{\{< meta ([\w-]+) >\}\}', lambda m: site.get(m[1], m[0]), text)
    text = re.sub(r'(?<![\w/.@])@((?:fig|tbl|eq)-[\w-]+)', r'[\1](#\1)', text)
    bibliography = f'--bibliography={ROOT / "nbs/references.bib"}'
    options = ['--mathml', '--wrap=none', '--citeproc', bibliography, '--fail-if-warnings']
    body = pypandoc.convert_text(text, 'html', 'markdown', extra_args=options)
    # as Quarto's: mathematics in a span; code without its colours, which are Quarto's own
    equation = re.compile('<math display="block".*?</math>', re.S)
    body = equation.sub(r'<span class="math display">\g<0></span>', body)
    source = re.compile('<pre class="sourceCode.*?</pre>', re.S)
    body = source.sub(lambda m: re.sub('</?(span|a)[^>]*>', '', m[0]), body)
    return dressed(f'<h1>{head["title"]}</h1>\n{body}', head['title'])


def dressed(body, title='Page', css=STYLES, scss=DARK):
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">{KEEP_ERRORS}
<meta name="viewport" content="width=device-width"><title>{title}</title><style>{THEME}{css}</style>
<style id="dark" media="not all">{dark_theme(scss)}</style></head>
<body class="quarto-light"><main>{body}</main></body></html>"""


def make_pages(folder):
    "All pages, in `folder`: {name: HTML}"
    made = processed(folder)
    site = yaml.safe_load((made / 'site.yml').read_text(encoding='utf-8'))

    def make(path):
        notebook = nbformat.v4.reads(path.read_text(encoding='utf-8'))
        text = html_page(notebook, made / path.stem, site)
        path.with_suffix('.html').write_text(text, encoding='utf-8')
        return path.stem, text

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(make, sorted(made.glob('*.ipynb'))))


def look(folder, names):
    "What a browser reports of pages, see site_look.js: {name: report}"
    script = (Path(__file__).parent / 'site_look.js').read_text()
    axe = (files('axe_playwright_python') / 'axe.min.js').read_text(encoding='utf-8')
    known = f'const NAMES = {json.dumps(names)}, AXE = {json.dumps(axe)};'.replace('</', r'<\/')
    driver = folder / f'look_{names[0]}.html'
    driver.write_text(
        f'<!doctype html><meta charset="utf-8"><body><script>{known}{script}</script>'
    )
    command = [BROWSER, '--headless=new', '--no-sandbox', '--disable-gpu', '--hide-scrollbars']
    command += ['--allow-file-access-from-files', '--host-resolver-rules=MAP * ~NOTFOUND']
    command += [f'--user-data-dir={folder / "profile"}-{names[0]}', '--window-size=1500,1000']
    command += ['--virtual-time-budget=1000000', '--dump-dom', driver.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, encoding='utf-8').stdout
    found = re.search(r'<pre id="report">(.*?)</pre>', dom, re.S)
    assert found, f'no report:\n{dom[-2000:]}'
    return json.loads(html.unescape(found[1]))
