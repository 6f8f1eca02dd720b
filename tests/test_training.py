"""The training routine at length: endings, damage, stale files, SLURM, TensorBoard."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from transformers_tut.checks import evaluating
from transformers_tut.settings import Machine, Settings, Terminated
from transformers_tut.training import Mean, TaskData, interruptible, make_trainer, quiet, train_task

CPU = Machine('cpu', progress=False)


@dataclass(frozen=True)
class ToySettings(Settings):
    lr: float = 1e-2  # Adam's rate
    dropout: float = 0.1  # between the layers
    epochs: int = 4  # passes over the data
    seed: int = 0  # decides every random number


class Toy(pl.LightningModule):
    "Is the first of three numbers above zero?"

    fail = {}  # step: what goes wrong there
    steps_seen = 0

    def __init__(self, lr, dropout):
        super().__init__()
        self.save_hyperparameters()
        layers = nn.Linear(3, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2)
        self.net = nn.Sequential(*layers)
        names = ['val_acc', 'val_loss', 'test_acc', 'test_loss']
        self.means = nn.ModuleDict({name: Mean() for name in names})

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), float(self.hparams.lr))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 32)
        return [optimizer], [{'scheduler': schedule, 'interval': 'step'}]

    def training_step(self, batch, batch_idx):
        Toy.steps_seen += 1
        if self.global_step in Toy.fail:
            Toy.fail.pop(self.global_step)()
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log('train_loss', loss)
        return loss

    def count(self, stage, batch):
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y, reduction='sum')
        self.means[f'{stage}_acc'].update((logits.argmax(-1) == y).sum(), len(y))
        self.means[f'{stage}_loss'].update(loss, len(y))
        for name in ('acc', 'loss'):
            self.log(f'{stage}_{name}', self.means[f'{stage}_{name}'])

    def validation_step(self, batch, batch_idx):
        self.count('val', batch)

    def test_step(self, batch, batch_idx):
        self.count('test', batch)


def toy_set(n, seed):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] > 0).long())


SAMPLE = TensorDataset(*toy_set(512, 1)[:103])


def train_toy(root, cls=Toy, machine=CPU, train=None, options=None, **values):
    s = ToySettings(**values)
    train = train or toy_set(512, 1)
    data = TaskData(train, toy_set(101, 2), toy_set(203, 3), 64, s.seed, train_sample=SAMPLE)
    options = {'max_epochs': s.epochs, 'gradient_clip_val': 1.0} | (options or {})
    return train_task(lambda: cls(s.lr, s.dropout), data, s, root, machine, **options)


def accuracy(model, dataset):
    x, y = dataset.tensors
    with evaluating(model):
        return (model.net(x).argmax(-1) == y).double().mean().item()


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def raising(error):
    def fail():
        raise error

    return fail


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def nothing_fails():
    Toy.fail, Toy.steps_seen = {}, 0


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An undisturbed run"
    return train_toy(tmp_path_factory.mktemp('whole'))


# What a run leaves and reports


def test_a_run_leaves_its_files_and_your_random_numbers(tmp_path):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    level = logging.getLogger('pytorch_lightning').level
    _, run = train_toy(tmp_path)
    assert torch.equal(before, torch.get_rng_state()) and threads == torch.get_num_threads()
    assert logging.getLogger('pytorch_lightning').level == level
    files = ['best.ckpt', 'last.ckpt', 'result.json', 'settings.json']
    assert names(run.folder) == files
    assert json.loads((run.folder / 'settings.json').read_text()) == asdict(ToySettings())
    assert run.seconds > 0 and run.other_seconds > 0


def test_the_report_is_of_every_sample(whole):
    model, run = whole
    order = ['train_acc', 'train_loss', 'val_acc', 'val_loss', 'test_acc', 'test_loss']
    assert list(run.metrics) == order
    assert run.metrics['train_acc'] == accuracy(model, SAMPLE)
    assert run.metrics['test_acc'] == accuracy(model, toy_set(203, 3))
    found = Toy.load_from_checkpoint(run.checkpoint, weights_only=True)
    assert run.metrics['val_acc'] == accuracy(found, toy_set(101, 2))
    report = json.loads((run.folder / 'result.json').read_text())
    assert {name: report[name] for name in order} == run.metrics and report['steps'] == 32


def test_the_best_epoch_is_tested_and_not_the_last(tmp_path):
    class Forgetful(Toy):
        def on_train_epoch_start(self):
            if self.current_epoch == 3:
                for p in self.parameters():
                    nn.init.normal_(p, std=3.0)

    model, run = train_toy(tmp_path, Forgetful)
    last = Forgetful(**model.hparams)
    state = torch.load(run.folder / 'last.ckpt', weights_only=True)['state_dict']
    last.load_state_dict(state)
    assert run.metrics['test_acc'] > accuracy(last, toy_set(203, 3)) + 0.1


def test_a_finished_model_is_found_on_any_device(whole):
    _, run = whole
    Toy.steps_seen = 0
    _, found = train_toy(run.folder.parent, machine=Machine(progress=False))
    assert not found.trained and found.steps == 32 and Toy.steps_seen == 0
    assert found.metrics == pytest.approx(run.metrics, abs=1e-2)  # a borderline sample may tip


def test_another_seed_is_another_model(whole, tmp_path):
    assert not same(whole[0], train_toy(tmp_path, seed=1)[0])


def test_accumulated_gradients_make_fewer_steps(tmp_path):
    assert train_toy(tmp_path, options={'accumulate_grad_batches': 2})[1].steps == 16


def test_numpy_hyper_parameters_are_saved_as_plain_numbers(tmp_path):
    def build():
        return Toy(np.float64(1e-2), np.float32(0.1))

    data = TaskData(toy_set(512, 1), toy_set(101, 2), toy_set(203, 3), 64)
    _, run = train_task(build, data, ToySettings(), tmp_path, CPU, max_epochs=1)
    hparams = Toy.load_from_checkpoint(run.checkpoint, weights_only=True).hparams
    assert type(hparams.lr) is float and type(hparams.dropout) is float


def test_threads_suit_the_model_unless_somebody_says_otherwise(tmp_path):
    used = []

    class Counting(Toy):
        def on_train_start(self):
            used.append(torch.get_num_threads())

    train_toy(tmp_path / 'a', Counting, epochs=1)
    train_toy(tmp_path / 'b', Counting, Machine('cpu', threads=2, progress=False), epochs=1)
    assert used == [1, 2]


# Going on


@pytest.mark.parametrize('error', [RuntimeError('power cut'), KeyboardInterrupt()])
def test_ended_in_mid_epoch_it_goes_on_to_the_same_weights(whole, tmp_path, error):
    Toy.fail = {20: raising(error)}
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(type(error), match='power cut|what was done is kept in'):
        train_toy(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    Toy.steps_seen = 0
    resumed, run = train_toy(tmp_path)
    assert Toy.steps_seen == 16  # two epochs of four were left
    assert run.steps == 32 and same(whole[0], resumed) and run.metrics == whole[1].metrics


def test_sigterm_ends_training_at_once_and_loses_no_epoch(whole, tmp_path, capsys):
    Toy.fail = {20: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with pytest.raises(SystemExit) as end:
        train_toy(tmp_path)
    assert end.value.code == 143 and 'what was done is kept in' in capsys.readouterr().err
    assert Toy.steps_seen == 21  # the batch was not even finished
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert same(whole[0], train_toy(tmp_path)[0])


def test_within_a_command_sigterm_is_left_to_it(tmp_path):
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # as a command has one
    try:
        Toy.fail = {20: lambda: os.kill(os.getpid(), signal.SIGTERM)}
        with pytest.raises(Terminated, match='what was done is kept in'):
            train_toy(tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_before_the_first_epoch_there_is_nothing_to_keep(tmp_path):
    Toy.fail = {0: raising(KeyboardInterrupt())}
    with pytest.raises(KeyboardInterrupt, match='nothing to keep yet'):
        train_toy(tmp_path)
    assert train_toy(tmp_path)[1].trained


def test_data_drawn_anew_are_told_the_epoch_when_training_goes_on(tmp_path):
    class Anew(Dataset):
        epoch, told = 0, []

        def set_epoch(self, epoch):
            self.epoch = epoch
            Anew.told.append(epoch)

        def __len__(self):
            return 512

        def __getitem__(self, i):
            return toy_set(1, 512 * self.epoch + i)[0]

    whole, _ = train_toy(tmp_path / 'whole', train=Anew(), epochs=2)
    Toy.fail = {12: raising(RuntimeError('power cut'))}
    with pytest.raises(RuntimeError, match='power cut'):
        train_toy(tmp_path / 'cut', train=Anew(), epochs=2)
    resumed, _ = train_toy(tmp_path / 'cut', train=Anew(), epochs=2)
    assert Anew.told == [0, 1] + [0, 1] + [1]  # whole, cut in its second epoch, resumed
    assert same(whole, resumed)


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_training import *
Toy.fail = {{step: lambda: time.sleep(60) for step in [20]}} if sys.argv[2] == 'slow' else {{}}
machine = Machine('cpu', strategy=sys.argv[3], devices=sys.argv[4], progress=False)
print(train_toy(sys.argv[1], machine=machine)[1].metrics)
"""


@pytest.mark.parametrize('strategy, devices', [('auto', 1), ('ddp', 2)])
def test_a_script_that_gets_sigterm_has_status_143(whole, tmp_path, strategy, devices):
    if devices > (os.cpu_count() or 1):
        pytest.skip('needs two cores')
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))

    def start(speed):
        command = [sys.executable, script, tmp_path / 'runs', speed, strategy, str(devices)]
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
        return subprocess.Popen(command, start_new_session=True, **pipes)

    process = start('slow')
    for _ in range(1200):
        if list(tmp_path.rglob('last.ckpt')) or process.poll() is not None:
            break
        time.sleep(0.05)
    time.sleep(1)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and 'what was done is kept in' in err, err
    with pytest.raises(ProcessLookupError):  # no process of the group is left
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    out, err = start('fast').communicate(timeout=120)
    assert 'test_acc' in out, err
    if devices == 1:
        assert eval(out) == whole[1].metrics


# Stopping early


def test_it_stops_at_the_first_validation_that_is_good_enough(tmp_path):
    options = {'stop_at': 0.9, 'validations': 4}
    _, run = train_toy(tmp_path, epochs=50, options=options)
    assert run.steps < 50 * 8 and run.steps % 2 == 0 and run.metrics['val_acc'] >= 0.9
    assert not train_toy(tmp_path, epochs=50, options=options)[1].trained


def test_a_perfect_validation_is_within_reach(tmp_path):
    easy = TensorDataset(torch.eye(3)[:2].repeat(256, 1), torch.tensor([1, 0]).repeat(256))
    data = TaskData(easy, easy, easy, 64)
    s = ToySettings(epochs=500)
    options = {'stop_at': 1.0, 'max_epochs': 500}
    _, run = train_task(lambda: Toy(1e-2, 0.0), data, s, tmp_path, CPU, **options)
    assert run.metrics['val_acc'] == 1 and run.steps < 200


def test_killed_between_stopping_and_the_report_it_trains_no_more(tmp_path):
    options = {'stop_at': 0.9, 'validations': 4}
    model, run = train_toy(tmp_path, epochs=50, options=options)
    (run.folder / 'result.json').unlink()
    Toy.steps_seen = 0
    again, found = train_toy(tmp_path, epochs=50, options=options)
    assert Toy.steps_seen == 0 and found.steps == run.steps and same(model, again)
    assert found.metrics == run.metrics


# `fresh`, damage and stale files


def test_fresh_keeps_the_older_run_and_gives_the_same_weights(whole, tmp_path):
    model, run = train_toy(tmp_path)
    anew, fresh = train_toy(tmp_path, options={'fresh': True})
    assert fresh.trained and fresh.folder == run.folder and same(model, anew)
    old = run.folder.with_name(run.folder.name + '.old-1')
    assert names(old) == names(run.folder)
    assert same(model, Toy.load_from_checkpoint(old / 'best.ckpt', weights_only=True))


def test_fresh_moves_nothing_away_before_training_can_start(tmp_path):
    _, run = train_toy(tmp_path, epochs=1)
    few = Subset(toy_set(512, 1), range(10))
    mistakes = [{'cls': lambda *_: 1 / 0}, {'train': few}, {'options': {'max_epochs': -5}}]
    if not torch.cuda.is_available():
        mistakes.append({'machine': Machine('gpu', progress=False)})
    for mistake in mistakes:
        options = {'fresh': True} | mistake.pop('options', {})
        with pytest.raises(
            (ZeroDivisionError, ValueError, pl.utilities.exceptions.MisconfigurationException)
        ):
            train_toy(tmp_path, epochs=1, options=options, **mistake)
        assert names(tmp_path) == [run.folder.name], mistake
    assert not train_toy(tmp_path, epochs=1)[1].trained


def test_damage_is_reported_and_nothing_is_overwritten(tmp_path):
    _, run = train_toy(tmp_path, epochs=1)
    damages = [
        ('best.ckpt', b'garbage'),
        ('best.ckpt', b''),
        ('result.json', b'{'),
        ('result.json', b'{}'),
        ('result.json', b'[]'),
        ('result.json', b'\xff\xfe'),
        ('result.json', b'{"steps": null}'),
        ('best.ckpt', b'\x80\x02.'),
        ('best.ckpt', None),  # cut
    ]
    for name, content in damages:
        right = (run.folder / name).read_bytes()
        content = right[:-10] if content is None else content
        (run.folder / name).write_bytes(content)
        with pytest.raises(ValueError, match='holds a damaged run'):
            train_toy(tmp_path, epochs=1)
        assert (run.folder / name).read_bytes() == content
        (run.folder / name).write_bytes(right)
    assert not train_toy(tmp_path, epochs=1)[1].trained  # whole again, found again
    (run.folder / 'best.ckpt').unlink()
    (run.folder / 'result.json').unlink()
    with pytest.raises(ValueError, match='holds a damaged run'):
        train_toy(tmp_path, epochs=1)
    assert train_toy(tmp_path, epochs=1, options={'fresh': True})[1].trained


def test_weights_alone_are_nothing_to_go_on_from(tmp_path):
    _, run = train_toy(tmp_path, epochs=1)
    (run.folder / 'result.json').unlink()
    shutil.copy(run.folder / 'best.ckpt', run.folder / 'last.ckpt')
    with pytest.raises(ValueError, match='holds a damaged run'):
        train_toy(tmp_path, epochs=1)


def test_means_survive_a_model_built_without_numbers():
    with torch.device('meta'):
        model = Toy(0.1, 0.0)
    model.to_empty(device='cpu')
    model.half()
    mean = model.means['val_acc']
    for _ in range(2):
        mean.update(torch.tensor(3), 4)
        assert mean.compute().item() == 0.75
        mean.to_empty(device='cpu')
        assert mean.compute().item() == 0.75
        mean.reset()


def test_paths_may_be_texts(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    with quiet():
        assert make_trainer('~/a', CPU, 0).default_root_dir == str(tmp_path / 'a')
    ended = pytest.raises(KeyboardInterrupt, match=f'{tmp_path}/a: start again')
    with ended, interruptible('~/a'):
        raise KeyboardInterrupt


def test_the_seed_of_the_data_is_a_plain_number():
    sets = [toy_set(64, seed) for seed in range(3)]
    data = TaskData(*sets, 16, np.int64(3))
    assert len(list(data.train_dataloader())) == 4
    with pytest.raises(TypeError, match='seed must be an integer, got None'):
        TaskData(*sets, 16, None)


def test_a_run_of_a_model_that_has_changed_since_is_refused(tmp_path):
    class Changed(Toy):
        def __init__(self, lr, dropout):
            super().__init__(lr, dropout)
            self.net[0] = nn.Linear(3, 8)
            self.net[3] = nn.Linear(8, 2)

    train_toy(tmp_path, epochs=1)
    with pytest.raises(ValueError, match='or that of another model'):
        train_toy(tmp_path, Changed, epochs=1)


def test_an_old_report_does_not_certify_another_model(tmp_path):
    _, run = train_toy(tmp_path)
    for name in ('best.ckpt', 'last.ckpt'):  # copied without them
        (run.folder / name).unlink()
    Toy.fail = {20: raising(RuntimeError('power cut'))}
    with pytest.raises(RuntimeError, match='power cut'):
        train_toy(tmp_path)
    assert not (run.folder / 'result.json').exists()
    assert train_toy(tmp_path)[1].trained


def test_a_loss_that_is_no_number_is_reported(tmp_path):
    with pytest.raises(ValueError, match='try a lower learning rate'):
        train_toy(tmp_path, epochs=2, lr=1e30)
    assert not list(tmp_path.rglob('result.json'))


# Where it runs, and what it says


def test_slurm_and_the_current_folder_have_no_part_in_it(whole, tmp_path, monkeypatch):
    stray = {'state_dict': {}, 'global_step': 109, 'epoch': 3}
    torch.save(stray, tmp_path / 'hpc_ckpt_1.ckpt')
    monkeypatch.chdir(tmp_path)
    for name, value in dict(
        JOB_NAME='job', NTASKS='1', JOB_ID='7', PROCID='0', LOCALID='0'
    ).items():
        monkeypatch.setenv(f'SLURM_{name}', value)
    monkeypatch.setenv('SLURM_NODEID', '0')
    model, run = train_toy(tmp_path / 'runs')
    assert same(whole[0], model) and run.steps == 32
    assert names(tmp_path) == ['hpc_ckpt_1.ckpt', 'runs']


def test_a_log_file_gets_ten_lines_in_place_of_a_progress_bar(tmp_path, capsys):
    _, run = train_toy(tmp_path, machine=Machine('cpu'), epochs=40)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == '' and len(lines) == 10
    assert lines[-1].startswith('epoch 40 of 40: validation accuracy ')
    train_toy(tmp_path, machine=CPU, epochs=3)
    assert capsys.readouterr() == ('', '')


def test_tensorboard_shows_curves_figures_and_settings_and_changes_nothing(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Drawn(Toy):
        def example_figure(self, batch):
            fig, ax = plt.subplots(figsize=(1, 1))
            ax.imshow(batch[0][:3].cpu())
            return fig

    def written(run):
        return EventAccumulator(str(run.folder / 'tensorboard')).Reload()

    board_on = Machine('cpu', progress=False, tensorboard=True)
    silent, quiet_run = train_toy(tmp_path / 'silent', Drawn)
    assert not (quiet_run.folder / 'tensorboard').exists()
    figures = plt.get_fignums()
    watched, run = train_toy(tmp_path / 'watched', Drawn, board_on)
    assert same(silent, watched) and run.metrics == quiet_run.metrics
    assert plt.get_fignums() == figures

    board = written(run)
    curves = {name for name in board.Tags()['scalars'] if not name.startswith('result/')}
    assert curves == {'epoch', 'lr-Adam', 'train_loss', 'val_acc', 'val_loss'}
    assert [point.step for point in board.Scalars('val_acc')] == [7, 15, 23, 31]
    assert [image.step for image in board.Images('example')] == [0, 1, 2, 3]  # epochs
    for name, value in run.metrics.items():
        assert board.Scalars(f'result/{name}')[0].value == pytest.approx(value)
    hparams = board.summary_metadata['_hparams_/session_start_info'].plugin_data.content
    for name in asdict(ToySettings()):
        assert name.encode() in hparams  # the table's columns

    files = sorted(run.folder.rglob('*'))
    assert not train_toy(tmp_path / 'watched', Drawn, board_on)[1].trained
    assert sorted(run.folder.rglob('*')) == files  # found: nothing new
    _, plain = train_toy(tmp_path / 'plain', machine=board_on)
    assert written(plain).Tags()['images'] == []  # a model that offers no figure


def test_processes_that_cannot_share_are_told_so():
    class ThreeRanks(TaskData):
        rank = 0

        def ranks(self):
            return 3, self.rank

    numbers = TensorDataset(torch.arange(100))
    with pytest.raises(ValueError, match='a multiple of the number of processes, got 8 for 3'):
        ThreeRanks(numbers, numbers, numbers, 8).share('val')
    two = Subset(numbers, range(2))
    with pytest.raises(ValueError, match='a sample for each of 3 processes, got 2'):
        ThreeRanks(numbers, two, numbers, 9).share('val')
    sample = Subset(numbers, range(50, 70))
    data, seen = ThreeRanks(numbers, numbers, numbers, 24, train_sample=sample), []
    for data.rank in range(3):
        seen += torch.cat([x for (x,) in data.share('train_sample')]).tolist()
    assert sorted(seen) == list(range(50, 70))


def test_any_loader_can_have_the_items_of_a_dataset_that_gives_whole_batches():
    class Pairs(Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, i):
            return torch.tensor(i), torch.tensor(2 * i)

    class Batched(Pairs):
        def collated(self, indices):
            raise AssertionError('only TaskData asks for that')

    pairs = zip(DataLoader(Batched(), 24), DataLoader(Pairs(), 24), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_strategies_that_copy_the_process_are_refused(tmp_path):
    machine = Machine('cpu', strategy='ddp_spawn', progress=False)
    with pytest.raises(ValueError, match='as auto and ddp do, got'):
        train_toy(tmp_path, machine=machine)


def test_quiet_puts_levels_back_after_an_error():
    logger = logging.getLogger('pytorch_lightning')
    before = logger.level
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert logger.level == before
