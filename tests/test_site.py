"""The site's own styles in a real browser: on a phone, nothing is wider than the screen."""

import shutil
import subprocess
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[1] / 'nbs'
BROWSERS = map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome'])
BROWSER = next(filter(None, BROWSERS), None)
PHONE = 390  # pixels
# The wide things of a lesson, in the elements that Quarto makes of them
CONTENT = f"""
<p>Inline code such as <code>{'transformers_tut.' * 8}</code> and
<span class="math display"><span style="display: inline-block; width: 900px">E</span></span></p>
<table><tr>{'<td>a column of a wide table</td>' * 9}</tr></table>
<div class="sourceCode" style="overflow: auto"><pre><code>{'x = 1; ' * 14}</code></pre></div>
"""


def width_on_a_phone(tmp_path, css):
    "How wide the page becomes, in pixels; it is laid out in a frame, as windows have a least width"
    page = f'<style>{css}</style><main>{CONTENT}</main>'
    (tmp_path / 'page.html').write_text(page)
    (tmp_path / 'frame.html').write_text(
        f'<iframe src="page.html" style="width: {PHONE}px; height: 800px; border: 0"></iframe>'
        '<script>onload = () => { document.title = document.querySelector("iframe")'
        '.contentDocument.documentElement.scrollWidth; }</script>'
    )
    options = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking']
    options += ['--allow-file-access-from-files', f'--user-data-dir={tmp_path / "profile"}']
    command = [BROWSER, *options, '--dump-dom', (tmp_path / 'frame.html').as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return int(run.stdout.partition('<title>')[2].partition('<')[0])


@pytest.mark.skipif(not BROWSER, reason='there is no browser here; test_viewer.py says so loudly')
def test_nothing_is_wider_than_a_phone(tmp_path):
    assert width_on_a_phone(tmp_path, (NBS / 'styles.css').read_text()) == PHONE
    assert width_on_a_phone(tmp_path, '') > 2 * PHONE  # the test sees what is too wide
