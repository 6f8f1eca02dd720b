"""How a command ends: signals, closed pipes, full disks, wrong options, too little memory."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transformers_tut.settings import Machine, run_name

on_linux = pytest.mark.skipif(sys.platform != 'linux', reason='needs /dev/full and /proc')

# a command that does one of several things, and none of them slowly
TOY = """
import resource, signal, sys, time
from dataclasses import dataclass
from transformers_tut.files import show_path, write_json
from transformers_tut.settings import Settings, command

@dataclass(frozen=True)
class ToySettings(Settings):
    "What a toy learns."

    action: str = 'print'  # what to do
    seed: int = 0  # decides every random number

@command('tut_toy', ToySettings, {'plain': {}}, recipe='plain')
def main(options):
    "A toy."
    action = options.settings.action
    if action == 'sleep':
        print('ready', flush=True)
        time.sleep(60)
    elif action == 'print':
        for line in range(100_000):
            print('line', line)
    elif action == 'show':
        print(show_path(options.out_dir))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        if action == 'json':
            write_json(options.out_dir / 'a.json', {'text': 10_000 * 'x'})
        if action == 'torch':
            import torch
            from transformers_tut.files import atomic_write

            with atomic_write(options.out_dir / 'a.pt') as scratch:
                torch.save(torch.zeros(10_000), scratch)

if __name__ == '__main__':
    sys.exit(main())
"""


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp('toy') / 'toy.py'
    path.write_text(TOY)
    return [sys.executable, str(path), '--accelerator', 'cpu', '--action']


@pytest.fixture(scope='module')
def toy_main(toy):
    spec = importlib.util.spec_from_file_location('toy', toy[1])
    module = sys.modules['toy'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def unboxed(text):
    "tyro's message without the frame around it"
    return ' '.join(re.sub('[│╭╮╰╯─]', ' ', text).split())


def run(*command, **kwargs):
    given = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120)
    return subprocess.run(command, **given | kwargs)


def assert_one_sentence(text, *words):
    assert len(text.splitlines()) == 1 and 'Traceback' not in text, text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    'number, status, word',
    [(signal.SIGINT, 130, 'interrupted'), (signal.SIGTERM, 143, 'terminated')],
    ids=['ctrl-c', 'sigterm'],
)
def test_a_signal_ends_it_with_a_sentence_and_its_status(toy, number, status, word):
    process = subprocess.Popen(
        [*toy, 'sleep'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert_one_sentence(err, f'tut_toy: {word}')


def test_whoever_reads_may_leave(toy):
    process = subprocess.Popen([*toy, 'print'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b''
    assert process.wait(60) == 141


@on_linux
@pytest.mark.parametrize('options', [['print'], ['print', '--help']], ids=['run', 'help'])
def test_a_full_disk_behind_stdout_is_one_sentence(toy, options):
    with open('/dev/full', 'w') as full:
        ended = run(*toy, *options, stdout=full)
    assert ended.returncode == 1
    assert_one_sentence(ended.stderr, 'No space left')


@on_linux
def test_with_stderr_on_a_full_disk_its_status_is_left(toy):
    with open('/dev/full', 'w') as full:
        assert run(*toy, 'print', stdout=full, stderr=full).returncode == 1


@on_linux
@pytest.mark.parametrize('closed', ['>&-', '2>&-', '>&- 2>&-', '--help >&-'])
def test_closed_streams_end_nothing(toy, closed):
    "As some schedulers start a program; Python has no `sys.stdout` then."
    ended = run('sh', '-c', f'"$@" {closed}', 'sh', *toy, 'print')
    assert (ended.returncode, ended.stderr) == (0, '')


@on_linux
@pytest.mark.parametrize('action', ['json', 'torch'])
def test_a_file_that_cannot_be_written_is_one_sentence(toy, tmp_path, action):
    ended = run(*toy, action, '--out-dir', tmp_path)
    assert (ended.returncode, ended.stdout) == (1, '')
    assert_one_sentence(ended.stderr, 'tut_toy: ')
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_without_accents_shows_the_path_all_the_same(toy, tmp_path):
    env = os.environ | {'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '0'}
    ended = run(*toy, 'show', '--out-dir', tmp_path / 'modèles', env=env)
    assert (ended.returncode, ended.stderr) == (0, '')
    assert r'mod\xe8les' in ended.stdout


def test_a_path_is_made_whole_once(toy, tmp_path):
    env = os.environ | {'HOME': str(tmp_path)}
    ended = run(*toy, 'show', '--out-dir', '~/models', env=env)
    assert ended.stdout == f'{tmp_path / "models"}\n'


WRONG = [
    ('--threads -1', 'threads must be at least 0, got -1'),
    ('--devices 99', 'devices must be from 1 to'),
    ('--devices two', 'devices must be a number'),
    ('--seed 4000000000000000000', 'seed must be at most 4294967295, got 4000000000000000000'),
    ('--seed many', 'many'),
    ('--action', 'action'),
    ('--colour red', 'colour'),
]


@pytest.mark.parametrize('words, message', WRONG, ids=[words for words, _ in WRONG])
def test_wrong_options_are_named(toy_main, capsys, words, message):
    assert toy_main(['--accelerator', 'cpu', *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == '' and message in unboxed(err) and 'Traceback' not in err


@on_linux
def test_ctrl_c_while_importing(tmp_path):
    entry = tmp_path / 'tut_reverse'
    entry.write_text('from transformers_tut.settings import run_command; run_command()')
    process = subprocess.Popen([sys.executable, entry, '--help'], stderr=subprocess.PIPE, text=True)
    maps = Path(f'/proc/{process.pid}/maps')
    while 'libtorch' not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert_one_sentence(err, 'tut_reverse: interrupted')


TASK = [('--model-dim 1000000000000', 1, 'not enough memory'), ('--lr -1', 2, 'lr must be')]


@pytest.mark.parametrize('words, status, message', TASK, ids=[words for words, *_ in TASK])
def test_a_task_names_what_is_wrong(tmp_path, capsys, words, status, message):
    from transformers_tut.reverse import main

    options = ['--accelerator', 'cpu', '--no-progress', '--out-dir', str(tmp_path)]
    assert main([*words.split(), *options]) == status
    out, err = capsys.readouterr()
    assert out == '' and message in unboxed(err) and 'Traceback' not in err
    assert not list(tmp_path.rglob('*.ckpt'))


def test_numbers_too_large_for_the_machine_are_named():
    from transformers_tut.reverse import ReverseSettings

    for settings, name in [(Machine, 'threads'), (ReverseSettings, 'model_dim')]:
        with pytest.raises(ValueError, match=f'{name} must be at most'):
            settings(**{name: 10**21})
    with pytest.raises(ValueError, match='threads must be at most'):
        Machine(threads=100_000)  # that many end the process


def test_runs_trained_earlier_are_found_again():
    from transformers_tut.anomaly import AnomalySettings
    from transformers_tut.reverse import ReverseSettings

    small = dict(standardize=True, model_dim=128, num_layers=2, dropout=0.0, input_dropout=0.0)
    fast = AnomalySettings(**small, norm_first=True, lr=2e-3, epochs=6)
    assert run_name(ReverseSettings()) == 'run-05455538'
    assert run_name(ReverseSettings(lr=5e-3, epochs=2)) == 'run-b368f809'
    assert run_name(AnomalySettings()) == 'run-61c9e5e2'
    assert run_name(fast) == 'run-89b3b3c5'


@pytest.mark.parametrize('task', ['reverse', 'anomaly', 'speed'])
def test_help_says_something_about_each_option(task, capsys):
    main = importlib.import_module(f'transformers_tut.{task}').main
    assert main(['--help']) == 0
    out, err = capsys.readouterr()
    # a formatter that puts a field's comment into brackets hides it from the help
    assert re.findall(r'--[\w-]+(?: [A-Z]+)? \(default', unboxed(out)) == []
    assert '--out-dir' in out and err == ''
