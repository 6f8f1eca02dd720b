"""`tut_reverse` as installed, killed, interrupted, on two processes; what it refuses; seeds."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from transformers_tut.reverse import (
    ReverseDataset,
    ReversePredictor,
    ReverseSettings,
    evaluate_published,
    main,
    reverse_data,
    train_reverse,
)

COMMAND = Path(sys.executable).with_name('tut_reverse')
# sizes that neither two processes nor a batch divide
SMALL = [
    *('--train-size', '12800', '--val-size', '333', '--test-size', '1001'),
    *('--accelerator', 'cpu', '--no-progress'),
]
# six epochs of 100 steps each, enough for 100 %
WHOLE = [*SMALL, '--epochs', '6', '--validations', '1', '--no-stop-when-perfect']


def start(folder, *options, settings=WHOLE):
    env = os.environ | {'PATH_CHECKPOINT': str(folder), 'PYTHONUNBUFFERED': '1'}
    return subprocess.Popen(
        [COMMAND, *settings, *options],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f'{out}\n{err}'
    return out


def runs(folder):
    return sorted(path.name for path in (folder / 'ReverseTask').iterdir())


def weights(folder):
    (run,) = (folder / 'ReverseTask').iterdir()
    return torch.load(run / 'best.ckpt', weights_only=True)['state_dict']


def wait_for(folder, pattern, process):
    "Until a file is there."
    for _ in range(3000):
        if list(folder.glob(pattern)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f'{pattern} never came')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An undisturbed run."
    folder = tmp_path_factory.mktemp('whole')
    return folder, finish(start(folder))


PERFECT = [('validation accuracy', '100.00 %'), ('test accuracy', '100.00 %')]


def test_the_command_reports_where_everything_is(whole):
    folder, out = whole
    assert re.findall(r'(\S+ accuracy): (\S+ %)', out) == PERFECT
    for name in ['checkpoint', 'result', 'attention map']:
        path = re.search(rf'^{name}: (.+)$', out, flags=re.M)[1]
        assert Path(path).stat().st_size > 0
    assert 'found a model trained for 600 steps' in finish(start(folder))
    assert len(runs(folder)) == 1


def test_fresh_keeps_the_older_files(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (run,) = (folder / 'ReverseTask').iterdir()
    finish(start(tmp_path, '--fresh'))
    old = f'{run.name}.old-1'
    assert runs(tmp_path) == [run.name, old]
    for path in run.iterdir():
        kept = tmp_path / 'ReverseTask' / old / path.name
        assert path.read_bytes() == kept.read_bytes()


def test_killed_in_mid_epoch_it_ends_with_the_same_weights(whole, tmp_path):
    process = start(tmp_path)
    # the first epoch is done, the second under way
    wait_for(tmp_path, 'ReverseTask/*/last.ckpt', process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.rglob('result.json'))
    out = finish(start(tmp_path))
    assert out.count('100.00 %') == 2 and 'trained 600 steps' in out
    for name, value in weights(whole[0]).items():
        assert torch.equal(value, weights(tmp_path)[name]), name
    assert not [path.name for path in tmp_path.rglob('.*')], 'scratch files were left'


@pytest.mark.parametrize(('sent', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_says_how_to_go_on(tmp_path, sent, status):
    process = start(tmp_path)
    wait_for(tmp_path, 'ReverseTask/*/last.ckpt', process)
    os.killpg(process.pid, sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert 'start again with the same settings to go on' in err
    assert 'Traceback' not in err
    (last,) = tmp_path.rglob('last.ckpt')
    assert torch.load(last, weights_only=True)['global_step'] >= 100
    assert finish(start(tmp_path)).count('100.00 %') == 2


def test_two_processes_give_one_right_result(whole, tmp_path):
    out = finish(start(tmp_path, '--strategy', 'ddp', '--devices', '2'))
    assert out.count('validation accuracy') == 1, 'both processes reported'
    # of 333 and 1001 sequences, both odd
    assert re.findall('accuracy: .*', out) == re.findall('accuracy: .*', whole[1])
    assert runs(tmp_path) == runs(whole[0])
    (run,) = (tmp_path / 'ReverseTask').iterdir()
    names = 'attention_map.png best.ckpt last.ckpt result.json settings.json'
    assert sorted(path.name for path in run.iterdir()) == names.split()
    result = json.loads((run / 'result.json').read_text())
    assert result['steps'] == 600  # a batch is shared out, not multiplied
    # one process finds the model, and agrees on the loss of every sample
    assert 'found a model trained for 600 steps' in finish(start(tmp_path))
    other = whole[0] / 'ReverseTask' / run.name / 'result.json'
    assert result['test_acc'] == json.loads(other.read_text())['test_acc'] == 1


def test_fast_stops_when_all_is_right(tmp_path):
    process = start(tmp_path, settings=[])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f'{out}\n{err}'
    assert re.findall(r'(\S+ accuracy): (\S+ %)', out) == PERFECT
    assert (out + err).count('100.00 %') == 2  # as many as .ci/run counts
    steps, seconds = re.search(r'trained (\d+) steps in (\S+) s', out).groups()
    assert int(steps) in (156, 234, 312, 390)
    assert float(seconds) < 60
    assert re.search(r'^all in all: \d+\.\d s$', out, flags=re.M)


def test_published_says_in_one_sentence_that_there_is_no_network(tmp_path):
    nowhere = 'http://127.0.0.1:9'
    env = {'PATH_CHECKPOINT': str(tmp_path), 'https_proxy': nowhere, 'HTTPS_PROXY': nowhere}
    run = subprocess.run(
        [COMMAND, '--published', '--no-progress'],
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (1, '')
    assert len(run.stderr.splitlines()) == 1
    assert 'it needs a network connection' in run.stderr
    assert not list(tmp_path.rglob('*.ckpt'))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('--seq-len 0', 'seq_len must be at least 1, got 0'),
        ('--num-categories 1', 'num_categories must be at least 2, got 1'),
        ('--epochs 0', 'epochs must be at least 1, got 0'),
        ('--validations 0', 'validations must be at least 1, got 0'),
        ('--lr fast', 'fast'),
        ('--lr -1', 'lr must be positive and finite, got -1.0'),
        ('--num-heads 3', 'embed_dim must be a multiple of num_heads'),
        ('--dropout 1', 'dropout must be in [0, 1), got 1.0'),
        ('--warmup -1', 'warmup must be at least 0, got -1'),
        ('--train-size 100', 'batch_size must be at most the number of training samples'),
        ('--gradient-clip-val -1', 'gradient_clip_val must be at least 0, got -1.0'),
        ('--recipe quick', 'quick'),
        ('--devices 0', 'devices'),
        ('--accelerator abacus', 'abacus'),
        ('--strategy ddp_spawn', 'as auto and ddp do'),
        ('--colour red', '--colour'),
    ],
)
def test_the_command_refuses(arguments, message, tmp_path, capsys):
    where = ['--no-progress', '--out-dir', str(tmp_path)]
    assert main([*arguments.split(), *where]) == 2
    out, err = capsys.readouterr()
    assert message in err and 'Traceback' not in err and out == ''


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: ReverseDataset(0, 16, 10), 'num_categories must be at least 1, got 0'),
        (lambda: ReverseDataset(10, 1.5, 10), 'seq_len must be an integer, got 1.5'),
        (lambda: ReverseDataset(10, 16, -1), 'size must be at least 1, got -1'),
        (lambda: ReverseDataset(10, 16, 10, seed=-1), 'seed must be at least 0, got -1'),
        (lambda: train_reverse(recipe='quick'), 'recipe must be one of'),
        (lambda: train_reverse(input_dim=10, num_classes=9), 'are the same number here'),
        (lambda: train_reverse(num_categories=8, input_dim=9), 'are the same number here'),
        (lambda: train_reverse(learning_rate=0.1), 'learning_rate'),
        (lambda: train_reverse(norm_first='post'), 'norm_first must be True or False'),
    ],
)
def test_functions_refuse(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_published_model_of_other_symbols_is_refused(tmp_path):
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.strategy.connect(ReversePredictor(10, 32, 10, 1, 1, 5e-4, 50, 3900))
    trainer.save_checkpoint(tmp_path / 'other.ckpt')
    with pytest.raises(ValueError, match='knows 10 symbols, num_categories is 8'):
        evaluate_published(tmp_path / 'other.ckpt', ReverseSettings(num_categories=8))


def test_datasets_without_a_seed_differ():
    "The course's own lines: validation and test were once the first rows of the training data."
    dataset = partial(ReverseDataset, 10, 16)
    train, val, test = dataset(50000).data, dataset(1000).data, dataset(10000).data
    assert not torch.equal(train[:1000], val)
    assert not torch.equal(train[:10000], test)
    assert not torch.equal(test[:1000], val)
    assert not torch.equal(dataset(1000).data, val)


def test_without_a_seed_they_follow_torch():
    pl.seed_everything(42, verbose=False)
    first = ReverseDataset(10, 16, 100).data
    pl.seed_everything(42, verbose=False)
    assert torch.equal(ReverseDataset(10, 16, 100).data, first)


def test_with_a_seed_all_that_tells_two_sets_apart_counts():
    base = ReverseDataset(10, 16, 1000, seed=0).data
    assert torch.equal(ReverseDataset(10, 16, 1000, seed=0).data, base)
    others = [
        ReverseDataset(10, 16, 1000, seed=1).data,
        ReverseDataset(10, 16, 1001, seed=0).data[:1000],
        ReverseDataset(10, 17, 1000, seed=0).data[:, :16],
        ReverseDataset(11, 16, 1000, seed=0).data.clamp(max=9),
    ]
    for other in others:
        assert (other == base).float().mean() < 0.15  # a tenth by chance


def test_with_a_seed_nobody_elses_numbers_change():
    before = torch.get_rng_state()
    ReverseDataset(10, 16, 9, seed=2**40)
    assert torch.equal(before, torch.get_rng_state())


def test_the_sets_of_a_run_share_no_sequence():
    same = ReverseSettings(train_size=1000, val_size=1000, test_size=1000)
    for settings in (ReverseSettings(), same):
        sets = reverse_data(settings).sets
        rows = [set(map(tuple, sets[name].data.tolist())) for name in ('train', 'val', 'test')]
        assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
