"""Downloads from a server that behaves badly: what arrives is right, or nothing arrives."""

import hashlib
import http.server
import threading

import pytest

from transformers_tut.files import (
    download,
    make_study,
    published_checkpoint,
    read_study,
    sha256,
    whole_path,
    write_json,
)

CONTENT = bytes(range(256)) * 1000
RIGHT = hashlib.sha256(CONTENT).hexdigest()


class BadServer(http.server.BaseHTTPRequestHandler):
    release = threading.Event()

    def do_GET(self):
        half, damaged = CONTENT[:1000], CONTENT[:-1] + b'!'
        sent = {'missing': None, 'cut': half, 'stall': half, 'corrupt': damaged}
        content = sent.get(self.path.split('/')[1], CONTENT)
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header('Content-Length', str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
        if self.path == '/stall':
            self.release.wait(30)

    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def base():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), BadServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    BadServer.release.set()
    server.shutdown()
    server.server_close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('expected', [RIGHT, RIGHT[:8], RIGHT[:20].upper()])
def test_the_hash_or_its_first_digits_are_enough(base, tmp_path, expected):
    path = download(f'{base}/good', tmp_path / 'a', expected, progress=False)
    assert path.read_bytes() == CONTENT
    # it is there: the server, which no longer has it, is not asked
    assert download(f'{base}/missing', path, expected, progress=False) == path


BAD = [
    ('cut', ConnectionError, 'cannot download'),
    ('stall', ConnectionError, 'imed out'),
    ('missing', ConnectionError, '404'),
    ('corrupt', ValueError, 'gave other content than expected'),
]


@pytest.mark.parametrize('expected', [RIGHT, RIGHT[:8], None], ids=['hash', 'digits', 'none'])
@pytest.mark.parametrize('file, error, message', BAD, ids=[bad[0] for bad in BAD])
def test_nothing_wrong_gets_a_name(base, tmp_path, file, error, message, expected):
    if file == 'corrupt' and expected is None:
        pytest.skip('nobody can know')
    with pytest.raises(error, match=message):
        download(f'{base}/{file}', tmp_path / 'b', expected, timeout=0.2, progress=False)
    assert names(tmp_path) == []


def test_other_digits_are_refused(base, tmp_path):
    for expected in ['0' * 64, RIGHT[:8] + '0']:
        with pytest.raises(ValueError, match='gave other content than expected'):
            download(f'{base}/good', tmp_path / 'b', expected, progress=False)
    assert names(tmp_path) == []


def test_an_unknown_hash_is_recorded_and_holds_from_then_on(base, tmp_path, capsys):
    path = download(f'{base}/good', tmp_path / 'new', None, progress=False)
    assert (tmp_path / 'new.sha256').read_text() == f'{RIGHT}  new\n'
    assert RIGHT in capsys.readouterr().out
    path.unlink()
    with pytest.raises(ValueError, match='new.sha256'):
        download(f'{base}/corrupt', path, None, progress=False)
    assert download(f'{base}/good', path, None, progress=False).read_bytes() == CONTENT
    (tmp_path / 'new.sha256').write_text('')
    with pytest.raises(ValueError, match='must be a SHA-256'):
        download(f'{base}/good', path, None, progress=False)


@pytest.mark.parametrize('expected', [RIGHT, None], ids=['hash', 'none'])
def test_a_file_of_somebodys_is_left_alone(base, tmp_path, expected):
    mine = tmp_path / 'mine'
    mine.write_text("somebody's")
    message = 'is not the file expected' if expected else 'has no record mine.sha256'
    with pytest.raises(ValueError, match=message):
        download(f'{base}/good', mine, expected, progress=False)
    assert mine.read_text() == "somebody's" and names(tmp_path) == ['mine']


def test_a_published_file_without_a_known_hash_is_recorded(base, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH_CHECKPOINT', str(tmp_path))

    def get():
        return published_checkpoint('SetAnomalyTask.ckpt', url=f'{base}/', progress=False)

    file = get()
    record = file.with_name('SetAnomalyTask.ckpt.sha256')
    assert record.read_text().split() == [sha256(file), file.name]
    file.write_bytes(b'damaged')
    with pytest.raises(ValueError, match='is not the file expected'):
        get()


def test_no_network_is_one_sentence(tmp_path):
    with pytest.raises(ConnectionError, match='it needs a network connection, once'):
        download('http://127.0.0.1:9/file', tmp_path / 'c', RIGHT, progress=False)
    assert names(tmp_path) == []


def test_paths_with_a_home(tmp_path, monkeypatch):
    "Each function expands `~`, and nobody gets a folder that is called so."
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_json('~/a é %s.json', {})
    assert sha256('~/a é %s.json') == sha256(tmp_path / 'a é %s.json')
    with pytest.raises(ValueError, match='nobody knows'):
        write_json('~no-such-user/a.json', {})
    assert [path.name for path in tmp_path.iterdir()] == ['a é %s.json']
    assert whole_path('./~no-such-user') == tmp_path / '~no-such-user'


def test_a_study_keeps_names_like_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{'variant': name, 'acc': 0.5} for name in ('None', 'NA', 'nan')]
    make_study('names', lambda: [*rows, {'variant': 'missing', 'acc': None}])
    table = read_study('names')
    assert table.variant.tolist() == ['None', 'NA', 'nan', 'missing']
    assert table.acc.isna().tolist() == [False, False, False, True]
