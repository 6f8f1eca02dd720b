"""The attention viewer in a real browser: what it shows is compared with the tensors."""

import html
import json
import os
import re
import shutil
import subprocess
import warnings

import pytest
import torch

from transformers_tut.viewer import attention_rollout, view_attention

BROWSER = next(
    filter(None, map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome'])), None
)
NOT_TESTED = (
    "NOBODY LOOKED AT THE VIEWER'S PAGE: there is no browser here. "
    '`apt-get install chromium`, then run tests/test_viewer.py'
)
needs_browser = pytest.mark.skipif(not BROWSER, reason=NOT_TESTED)


def test_there_is_a_browser_to_look_with():
    "Without one, CI fails; elsewhere pytest's summary of warnings says what was not tested."
    if BROWSER:
        return
    if os.environ.get('CI'):
        pytest.fail(NOT_TESTED)
    warnings.warn(NOT_TESTED, stacklevel=1)


WORDS = ['the', 'cat', '</script>', '"sat"', '<b>on</b>', 'the', '&amp;', "'mat'"]
NASTY = '</script><script>document.title = \'broken out\'</script> "quoted" & <b>bold</b>'

# Runs ahead of the page: whatever goes wrong is kept.
KEEP_ERRORS = """<script>
window.errors = [];
window.onerror = (message) => errors.push(String(message));
window.onunhandledrejection = (event) => errors.push(String(event.reason));
for (const kind of ["error", "warn"]) console[kind] = (...words) => errors.push(words.join(" "));
</script>"""

# Runs behind it: does each step with events where a person would cause them, and
# writes down what is to be seen then.
DRIVE = """<script>
addEventListener("load", async () => {
  const page = document.querySelector("iframe")?.contentDocument ?? document;
  const $$ = (query) => [...page.querySelectorAll(query)];
  const texts = (query) => $$(query).map((element) => element.textContent);
  const point = (query, i) => {
    $$(query)[i].scrollIntoView();
    const box = $$(query)[i].getBoundingClientRect();
    const target = page.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    for (let e = target; e; e = e.parentElement) e.dispatchEvent(new PointerEvent("pointerenter"));
    return target;
  };
  const click = (query, i) => point(query, i).click();
  const press = (key) => page.activeElement.dispatchEvent(
    new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const focus = (query) => $$(query)[0].focus();
  const select = (query, i) => {
    $$(query)[0].selectedIndex = i;
    $$(query)[0].dispatchEvent(new Event("change"));
  };
  const seen = () => ({
    numbers: texts("#keys .number"),
    labels: $$("#keys li").map((item) => item.ariaLabel),
    bars: $$(".bar i").map((bar) => parseFloat(bar.style.width)),
    lines: $$("path").map((path) => parseFloat(path.style.strokeWidth)),
    ends: $$("path").map((path) => path.getAttribute("d").match(/[\\d.]+/g).map(Number)),
    query: $$("#queries li").findIndex((item) => item.ariaSelected === "true"),
    head: $$("#overview button").findIndex((item) => item.ariaChecked === "true"),
    stops: $$("#queries [tabindex='0'], #overview [tabindex='0']").length,
    focused: page.activeElement.ariaLabel,
    layer: ["#layer", "#head"]
      .map((query) => $$(query)[0].selectedOptions[0].textContent).join(", "),
    says: texts("#says")[0],
  });
  const report = {
    steps: [], tokens: texts("#queries bdi"), keys: texts("#keys bdi"),
    title: page.title, heading: texts("h1")[0],
  };
  try {
    for (const step of STEPS) { step(); report.steps.push(seen()); }
    await new Promise((resolve) => setTimeout(resolve, 300));
    const root = page.documentElement;
    report.unloaded = $$("img").filter((image) => !image.naturalWidth).length;
    report.images = $$("img").length;
    report.overflow = [root.scrollWidth - root.clientWidth, root.scrollHeight - root.clientHeight];
    report.bold = $$("b").length;
    report.transition = page.defaultView.getComputedStyle($$("path")[0]).transitionDuration;
    report.colours = ["body", "#scale", "path"].map((query) => {
      const style = page.defaultView.getComputedStyle($$(query)[0]);
      return (query === "path" ? style.stroke : style.color).match(/\\d+/g).map(Number);
    });
    const { backgroundColor } = page.defaultView.getComputedStyle(page.body);
    report.background = backgroundColor.match(/\\d+/g).map(Number);
    report.pixels = $$("canvas").map((canvas) => {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return [...data].filter((_, i) => i % 4 === 3); // how opaque each cell is
    });
    const { data } = $$("canvas")[0].getContext("2d").getImageData(0, 0, 99, 99);
    const opaque = data.filter((_, i) => i % 4 === 3);
    const strongest = 4 * opaque.indexOf(Math.max(...opaque));
    report.painted = [...data.slice(strongest, strongest + 3)];
    report.cut = $$("bdi").filter((label) => label.scrollWidth > label.clientWidth).length;
    const nameless = ["img:not([alt])", "button:not([aria-label])", "select:not([aria-label])"];
    report.unnamed = nameless.flatMap($$).length;
  } catch (error) { errors.push(String(error)); }
  report.errors = [...errors, ...(page.defaultView.errors ?? [])];
  const pre = document.body.appendChild(document.createElement("pre"));
  Object.assign(pre, { id: "report", textContent: JSON.stringify(report) });
});
</script>"""


def drive(page, steps, tmp_path, width=700, options=()):
    "What the page shows after each of `steps`, which are JavaScript expressions"
    script = DRIVE.replace('STEPS', '[' + ', '.join(f'() => {step}' for step in steps) + ']')
    page = (
        page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">{KEEP_ERRORS}', 1) + script
    )
    file = tmp_path / 'page.html'
    file.write_text(page, encoding='utf-8')
    command = [
        BROWSER,
        '--headless=new',
        '--no-sandbox',
        '--disable-gpu',
        f'--user-data-dir={tmp_path / "profile"}',
    ]
    command += [
        f'--window-size={width},900',
        '--virtual-time-budget=5000',
        *options,
        '--dump-dom',
        file.as_uri(),
    ]
    dom = subprocess.run(
        command, capture_output=True, text=True, encoding='utf-8', timeout=120
    ).stdout
    found = re.search(r'<pre id="report">(.*?)</pre>', dom, re.S)
    assert found, f'no report in the page:\n{dom[-2000:]}'
    report = json.loads(html.unescape(found[1]))
    assert report['errors'] == []
    return report


def check_shown(shown, weights, largest):
    "Numbers, labels, bars and lines are the weights"
    for values in [
        [float(text) for text in shown['numbers']],
        [float(label.rsplit(': ', 1)[1]) for label in shown['labels']],
        [width / 100 * largest for width in shown['bars']],
        [width / 10 * largest for width in shown['lines']],
    ]:  # three digits of a weight that is kept with four
        torch.testing.assert_close(torch.tensor(values), weights, rtol=0, atol=0.5e-3 + 0.5e-4)
    assert shown['stops'] == 2


def random_maps(layers, heads, queries, keys, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        (2 * torch.randn(2, heads, queries, keys, generator=g)).softmax(-1) for _ in range(layers)
    ]


@needs_browser
def test_pointing_and_choosing(tmp_path):
    maps = random_maps(2, 3, 8, 8)
    rollout = attention_rollout(maps, 1)
    largest = max(m[1].max().item() for m in [*maps, rollout[None, None].expand(2, 1, 8, 8)])
    view = view_attention(WORDS, maps, 1, title=NASTY)
    expected = [  # (a step, the head, the query)
        ('null', 0, 0),
        ("point('#queries li', 3)", 0, 3),
        ("point('#queries li bdi', 7)", 0, 7),
        ("click('#overview button', 4)", 4, 7),
        ("point('#queries li small', 2)", 4, 2),
        ("click('#overview button', 6)", 6, 2),
        ("point('#queries li', 5)", 6, 5),
        ("select('#layer', 0)", 0, 5),
        ("select('#head', 2)", 2, 5),
        ("select('#layer', 1)", 5, 5),
        ("select('#layer', 2)", 6, 5),
    ]
    report = drive(view.html, [step for step, *_ in expected], tmp_path)
    heads = [m[1, h] for m in maps for h in range(3)] + [rollout]
    names = [f'layer {i}, head {j}' for i in (1, 2) for j in (1, 2, 3)] + ['rollout, all heads']
    for shown, (_, head, query) in zip(report['steps'], expected, strict=True):
        check_shown(shown, heads[head][query], largest)
        assert (shown['head'], shown['query'], shown['layer']) == (head, query, names[head])
        key = heads[head][query].argmax().item()
        start = (
            f'{names[head]}: “{WORDS[query]}” ({query}) gives '
            f'{heads[head][query, key]:.3f} to “{WORDS[key]}” ({key}), '
        )
        assert shown['says'].startswith(start)
        y = [end[1] for end in shown['ends']]
        assert (
            len(set(y)) == 1 and [end[-1] for end in shown['ends']][query] == y[0]
        )  # its own key is level with it
    small_maps = torch.tensor(report['pixels']).reshape(7, 8, 8) / 255 * largest
    torch.testing.assert_close(small_maps, torch.stack(heads), rtol=0, atol=1 / 255)
    assert report['tokens'] == report['keys'] == WORDS
    assert report['title'] == report['heading'] == NASTY
    assert (report['bold'], report['unnamed'], report['overflow'][0]) == (0, 0, 0)


@needs_browser
def test_keyboard(tmp_path):
    maps = random_maps(2, 3, 5, 5)
    expected = [  # (a step, the head, the query)
        ('focus(\'#queries [tabindex="0"]\')', 0, 0),
        ("press('ArrowDown')", 0, 1),
        ("press('ArrowRight')", 0, 2),
        ("press('End')", 0, 4),
        ("press('ArrowDown')", 0, 4),
        ("press('ArrowUp')", 0, 3),
        ("press('Home')", 0, 0),
        ('focus(\'#overview [tabindex="0"]\')', 0, 0),
        ("press('ArrowRight')", 1, 0),
        ("press('ArrowDown')", 4, 0),
        ("press('ArrowDown')", 6, 0),
        ("press('ArrowUp')", 3, 0),
        ("press('Tab')", 3, 0),
    ]
    report = drive(view_attention(None, maps).html, [step for step, *_ in expected], tmp_path)
    heads = [m[0, h] for m in maps for h in range(3)] + [attention_rollout(maps)]
    largest = max(h.max().item() for h in heads)
    for i, (shown, (_, head, query)) in enumerate(zip(report['steps'], expected, strict=True)):
        check_shown(shown, heads[head][query], largest)
        assert (shown['head'], shown['query']) == (head, query)
        name = (
            f'token {query}'
            if i < 7
            else f'{shown["layer"]}, largest weight {heads[head].max():.3f}'
        )
        assert shown['focused'] == name


@needs_browser
def test_thumbnails_of_a_rectangular_map(tmp_path):
    maps = random_maps(4, 4, 10, 6)
    pictures = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    view = view_attention(pictures, maps, queries=list('abcdefghij'), mark=2)
    report = drive(view.html, ['null', "point('#queries li', 9)"], tmp_path)
    largest = max(m[0].max().item() for m in maps)
    for shown, query in zip(report['steps'], [0, 9], strict=True):
        check_shown(shown, maps[0][0, 0, query], largest)
        assert [label.rsplit(':')[0] for label in shown['labels']] == [
            f'{"the marked " * (k == 2)}image {k}' for k in range(6)
        ]
    assert (report['images'], report['unloaded'], report['tokens']) == (6, 0, list('abcdefghij'))


@needs_browser
@pytest.mark.parametrize('width', [500, 700])
def test_fifty_tokens_fit(width, tmp_path):
    maps = random_maps(3, 8, 50, 50)
    report = drive(
        view_attention([f'token {i}' for i in range(50)], maps).html,
        ["point('#queries li', 49)"],
        tmp_path,
        width,
    )
    check_shown(report['steps'][0], maps[0][0, 0, 49], max(m[0].max().item() for m in maps))
    assert report['overflow'][0] == 0


def luminance(rgb):
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (value / 255 for value in rgb)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@needs_browser
@pytest.mark.parametrize('dark', [False, True])
def test_light_and_dark_and_at_rest(dark, tmp_path):
    options = [
        '--force-prefers-reduced-motion',
        f'--blink-settings=preferredColorScheme={0 if dark else 1}',
    ]
    report = drive(
        view_attention(None, random_maps(1, 1, 4, 4)).html, ['null'], tmp_path, options=options
    )
    page = luminance(report['background'])
    assert page < 0.02 if dark else page == 1
    contrasts = [
        (max(page, x) + 0.05) / (min(page, x) + 0.05) for x in map(luminance, report['colours'])
    ]
    assert all(contrast >= 4.5 for contrast in contrasts)  # WCAG AA for text
    assert report['transition'] == '0s'


@needs_browser
def test_in_a_notebook_the_frame_takes_the_height_of_the_page(tmp_path):
    maps = random_maps(1, 2, 30, 30)
    page = in_a_notebook(view_attention(None, maps))
    report = drive(page, ['null', "point('#queries li', 7)"], tmp_path)
    largest = max(m.max().item() for m in [maps[0][0], attention_rollout(maps)])
    check_shown(report['steps'][1], maps[0][0, 0, 7], largest)
    assert report['overflow'] == [0, 0]


def in_a_notebook(view, body='<body>'):
    "A page outside, with the viewer's in a frame"
    view.html = view.html.replace(
        '<meta charset="utf-8">', f'<meta charset="utf-8">{KEEP_ERRORS}', 1
    )
    return f'<!doctype html><meta charset="utf-8">{body}{view._repr_html_()}'


@needs_browser
@pytest.mark.parametrize('dark', [False, True])
@pytest.mark.parametrize(
    'light_body, dark_body',
    [
        ("class = 'quarto-light'", "class = 'quarto-dark'"),
        ("data-jp-theme-light = 'true'", "data-jp-theme-light = 'false'"),
    ],
)
def test_the_frame_follows_the_theme_outside(light_body, dark_body, dark, tmp_path):
    "It is switched to `dark` or back while the system prefers the opposite."
    before, after = (light_body, dark_body) if dark else (dark_body, light_body)
    page = in_a_notebook(view_attention(None, random_maps(1, 1, 4, 4)), f'<body {before}>')
    name, value = after.replace("'", '').split(' = ')
    switch = f"document.body.setAttribute('{name}', '{value}')"
    options = [f'--blink-settings=preferredColorScheme={1 if dark else 0}']
    report = drive(page, ['null', switch], tmp_path, options=options)
    page = luminance(report['background'])
    assert page < 0.02 if dark else page == 1
    # the small maps are painted anew in the colour of the lines; canvas rounds by opacity
    line = report['colours'][2]
    assert max(abs(a - b) for a, b in zip(report['painted'], line, strict=True)) <= 2


@needs_browser
def test_labels_can_be_read_on_a_phone(tmp_path):
    words = ['attention', 'is', 'all', 'you', 'need', 'friend']
    view = view_attention(words, random_maps(2, 4, 6, 6))
    page = in_a_notebook(view, '<body style="margin: 0; width: 375px">')
    report = drive(page, ['null', "point('#queries li', 3)"], tmp_path)
    assert (report['cut'], report['overflow'][0]) == (0, 0)


def test_save_says_where_the_page_is(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    path = view_attention(None, torch.rand(1, 2, 2)).save('~/a é.html')
    assert path == tmp_path / 'a é.html'
    assert path.exists()
