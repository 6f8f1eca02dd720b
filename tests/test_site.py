"""The site as a visitor sees it: pages made as in site_pages.py, read by a script and by a browser.

Each check passes on all pages, and fails where an error is planted.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import yaml
from bs4 import BeautifulSoup
from matplotlib.colors import to_rgb
from nbdev.showdoc import BasicMarkdownRenderer
from PIL import Image
from site_pages import BROWSER, ROOT, STYLES, dressed, look, make_pages
from test_viewer import luminance

from transformers_tut.attention import scaled_dot_product
from transformers_tut.figures import COLOURS, _tint

PHONE = 390  # pixels
LONGEST = 48_000  # pixels
HEAVIEST = 1_500_000  # bytes of a page and its images; Quarto's own files come on top
SITE = yaml.safe_load((ROOT / 'nbs/site.yml').read_text(encoding='utf-8'))
QUARTO = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('site')


@pytest.fixture(scope='module')
def pages(folder):
    "All pages: {name: HTML}"
    return make_pages(folder)


# What a script can see


def link_fault(name, target, pages, made):
    "What is wrong with a link of a page, or None; addresses elsewhere are not fetched"
    repository, site = f'{SITE["repo-url"]}/blob/{SITE["repo-branch"]}/', SITE['site-url'] + '/'
    if target.startswith(repository):
        path, _, line = target.removeprefix(repository).partition('#L')
        lines = (ROOT / path).read_text(encoding='utf-8').splitlines() if line else []
        there = (ROOT / path).exists() and int(line or 0) <= len(lines)
        return None if there else f'{target} is not in the repository'
    if target.startswith('https:') and not target.startswith(site):
        return None
    path, _, anchor = unquote(target.removeprefix(site)).partition('#')
    numbers = {re.sub(r'^\d+_', '', other) + '.html': other for other in pages}
    other = numbers.get(path, path.removesuffix('.ipynb')) or name
    if other not in pages:
        return None if (made / path).is_file() else f'{target} leads nowhere'
    if anchor and f'id="{anchor}"' not in pages[other]:
        return f'{target} leads to no part of {other}'


def faults(name, text, pages, made):
    "What is wrong with a page, and None for what is right"
    page = BeautifulSoup(text, 'html.parser')
    for link in page('a', href=True):
        yield link_fault(name, link['href'], pages, made)
    size = len(text)
    for image in page('img'):
        yield None if image.get('alt') else f'{image} has no alternative text'
        yield link_fault(name, image['src'], {}, made)
        path = made / image['src']
        if path.is_file():
            size += path.stat().st_size
            if path.suffix == '.png' and Image.open(path).width < 1.5 * int(image['width']):
                yield f'{image} is blurred on sharp screens'
    yield f'{size / 1e6:.1f} MB' if size > HEAVIEST else None
    yield 'a badge is a figure' if page.select('figure a img') else None
    for frame in page('iframe'):
        yield None if frame.get('title') else f'{frame} has no title'

    for folded in page.select('details:not([open])'):
        folded.clear()
    for code in page('pre'):
        imports = re.findall('^(?:from|import) ', code.get_text(), re.M)
        yield 'imports before the idea' if len(imports) > 3 else None
    for code in page(['pre', 'code', 'math', 'script', 'style']):
        code.clear()
    raw = re.findall(r'.{0,30}(?:\]\(|\{#|\{\{|\$\$|:::|`).{0,30}', page.get_text())
    yield f'raw Markdown: {raw}' if raw else None


def test_no_page_has_faults(pages, folder):
    for name, text in pages.items():
        assert {*faults(name, text, pages, folder / '_proc')} <= {None}, name


PLANTED = [  # what stands on a page, and the fault
    ('<a href="01_decoder.ipynb">x</a>', '01_decoder.ipynb leads nowhere'),
    ('<a href="00_attention.ipynb#sec-x">x</a>', 'leads to no part of 00_attention'),
    ('<a href="#fig-x">x</a>', '#fig-x leads to no part of index'),
    (f'<a href="{SITE["site-url"]}/encoder.html#x">x</a>', 'leads to no part of 01_encoder'),
    (f'<a href="{SITE["repo-url"]}/blob/main/LICENCE">x</a>', 'is not in the repository'),
    (f'<a href="{SITE["repo-url"]}/blob/main/LICENSE#L999">x</a>', 'is not in the repository'),
    ('<img src="images/x.png" alt="x">', 'images/x.png leads nowhere'),
    ('<img src="images/logo.svg" alt="">', 'has no alternative text'),
    ('<figure><a href="#"><img src="images/logo.svg" alt="x"></a></figure>', 'badge is a figure'),
    ('<img src="images/readme_1.png" alt="x" width="1005">', 'is blurred on sharp screens'),
    ('<iframe srcdoc=""></iframe>', 'has no title'),
    ('<p>{{&lt; meta x &gt;}}</p>', 'raw Markdown'),
    ('<p>[<code>Mean</code>](training.html)</p>', 'raw Markdown'),
    ('<pre><code>' + 'import os\n' * 4 + '</code></pre>', 'imports before the idea'),
    ('<p>' + 'word ' * 300_000, '1.5 MB'),
]


@pytest.mark.parametrize('body, fault', PLANTED, ids=[fault for _, fault in PLANTED])
def test_a_planted_fault_is_found(body, fault, pages, folder):
    (found,) = {*faults('index', dressed(body), pages, folder / '_proc')} - {None}
    assert fault in found


def sidebar(entries):
    "The names and titles in a sidebar: {name: title}"
    found = {}
    for entry in entries:
        inner = sidebar(entry.get('contents', []))
        found |= inner or {entry['href'].removesuffix('.ipynb'): entry['text']}
    return found


def test_sidebar_and_landing_table_list_the_titles_of_the_pages(pages):
    titles = {name: re.search('<h1>(.*)</h1>', text)[1] for name, text in pages.items()}
    del titles['index']
    listed = sidebar(SITE['website']['sidebar']['contents'])
    assert listed == titles | {'index': 'Start here'}
    links = BeautifulSoup(pages['index'], 'html.parser').select('table a')
    table = {a['href'].removesuffix('.ipynb'): a.text[3:] for a in links}
    assert table == titles


def lacking(made):
    "What the site's settings name and nbdev's processed files lack"
    navbar, website = SITE['website']['navbar'], QUARTO['website']
    named = [navbar['logo'], website['favicon'], website['image'], *QUARTO['project']['resources']]
    named += [QUARTO['format']['html']['css'], *QUARTO['metadata-files'], '404.qmd']
    named += [name for name in QUARTO['format']['html']['theme']['dark'] if '.' in name]
    return [name for name in named if not (made / name).is_file()]


def test_logo_favicon_social_image_styles_and_404_page_reach_the_site(pages, folder, tmp_path):
    assert lacking(folder / '_proc') == []
    assert len(lacking(tmp_path)) == 9  # an empty site
    (repository,) = SITE['website']['navbar']['right']
    assert repository['href'] == SITE['repo-url'] and repository['aria-label']


def test_signatures_keep_the_star_before_arguments_by_name(pages):
    signature = 'def scaled_dot_product(\n    q:Tensor'
    assert signature in pages['00_attention']
    shown = pages['00_attention'].partition(signature)[2].partition('</pre>')[0]
    assert '    *, key_padding_mask' in shown
    assert '*, ' not in str(BasicMarkdownRenderer(scaled_dot_product).dm)  # nbdev's own lack it
    workflow = (ROOT / '.github/workflows/docs.yml').read_text()
    assert 'PYTHONPATH=. nbdev_docs' in workflow  # where tools/signatures.py is


# Letters of figures


def contrast(colour, page, brightness=1.0):
    "WCAG's contrast of a colour, brightened by a filter, with a page"
    low, high = sorted(
        luminance([255 * min(1, factor * part) for part in to_rgb(shade)])
        for shade, factor in [(colour, brightness), (page, 1)]
    )
    return (high + 0.05) / (low + 0.05)


def letters(svg):
    "The colours of the letters in a figure of matplotlib's"
    groups = ElementTree.fromstring(svg).iterfind('.//{*}g[@id]')
    texts = [ElementTree.tostring(g, 'unicode') for g in groups if g.get('id')[:5] == 'text_']
    return {colour for text in texts for colour in re.findall(r'fill: (#\w+)', text)}


PAPER = {'#222222', '#262626', '#ffffff'}  # letters in pale boxes and on the cells of maps


def pale(svgs, css):
    "Which letters are hard to read on a light or on a dark page"
    light, dark = (float(f) for f in re.findall(r'img\[.*brightness\((.*)\)', css) or (1, 1))
    return {
        (colour, page)
        for colour in set().union(*map(letters, svgs)) - PAPER
        for page, brightness in [('white', light), ('#222222', dark)]
        if contrast(colour, page, brightness) < 4.5
    }


def test_letters_of_figures_stand_out(pages, folder):
    svgs = [path.read_text() for path in (folder / '_proc').glob('[0-9]*/*.svg')]
    assert pale(svgs, STYLES) == set()
    assert pale(svgs, '') == {('#7f7f7f', 'white'), ('#7f7f7f', '#222222')}
    in_boxes = [contrast('#222222', _tint(colour)) for colour in COLOURS]
    assert min(in_boxes) > 4.5


# What a browser can see

WRONG = """<p style="width: 900px">wide</p> <pre>{}</pre> <img src="no.svg"> <iframe></iframe>
<p style="color: #999">pale</p> <p style="color: #666">dark</p> <script>nowhere()</script>
<div style="height: 50000px"></div>""".format('long ' * 99)


@pytest.fixture(scope='module')
def seen(pages, folder):
    "What the browser reports: {name: report}; of the pages, and of what is planted"
    if not BROWSER:
        pytest.skip('there is no browser here; test_viewer.py says so loudly')
    made = folder / '_proc'
    (made / 'wrong.html').write_text(dressed(WRONG), encoding='utf-8')
    unstyled = (made / '00_attention.html').read_text(encoding='utf-8').replace(STYLES, '')
    (made / 'unstyled.html').write_text(unstyled, encoding='utf-8')
    chips = dressed('<p><a href="#"><code>name</code></a></p>', scss='')
    (made / 'undarkened.html').write_text(chips, encoding='utf-8')
    names = [*pages, 'wrong', 'unstyled', 'undarkened']
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda part: look(made, part), [names[::2], names[1::2]])
    return first | second


@pytest.fixture(scope='module')
def reports(seen, pages):
    "Those of the pages alone"
    return {name: seen[name] for name in pages}


def test_nothing_is_wider_than_a_phone(reports, seen):
    assert {name: r['phone'] for name, r in reports.items() if r['phone'] > PHONE} == {}
    assert seen['wrong']['phone'] > PHONE and seen['unstyled']['phone'] > PHONE


def test_hardly_any_code_scrolls_sideways(reports, seen):
    blocks = sum(report['blocks'] for report in reports.values())
    scrolling = [code for report in reports.values() for code in report['scrolling']]
    print(f'{len(scrolling)} of {blocks} blocks of code scroll sideways')
    assert len(scrolling) <= 0.05 * blocks, scrolling
    assert len(seen['wrong']['scrolling']) == 1


def test_nothing_goes_wrong_when_a_page_is_loaded(reports, seen):
    assert {name: r['errors'] for name, r in reports.items() if r['errors']} == {}
    image, script = seen['wrong']['errors']
    assert 'no.svg' in image + script and 'nowhere is not defined' in image + script


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_axe_finds_nothing_serious(theme, reports, seen):
    assert {name: r[theme] for name, r in reports.items() if r[theme]} == {}
    rules = {finding.partition(':')[0] for finding in seen['wrong'][theme]}
    more = {'image-alt', 'frame-title', 'scrollable-region-focusable'}
    assert rules >= {'color-contrast'} | (more if theme == 'light' else set())
    hard_to_read = 'pale' if theme == 'light' else 'dark'
    assert hard_to_read in ''.join(seen['wrong'][theme])
    assert len(seen['undarkened'][theme]) == (theme == 'dark')


def test_pages_end_somewhere(reports, seen):
    longest = max(reports, key=lambda name: reports[name]['height'])
    print(f'the longest page is {longest}: {reports[longest]["height"]} pixels')
    assert reports[longest]['height'] < LONGEST < seen['wrong']['height']
