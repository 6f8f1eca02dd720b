"""What is too long for the notebook of set anomaly detection: grids of cases, processes."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from transformers_tut import anomaly
from transformers_tut.anomaly import (
    AnomalyPredictor,
    AnomalySettings,
    DeepSets,
    ImageSource,
    SetAnomalyDataset,
    anomaly_model,
    centroid_rule,
    draw_sets,
    main,
    plot_sets,
    split_by_class,
    train_anomaly,
    wilson_interval,
)

COMMAND = Path(sys.executable).with_name('tut_anomaly')
LABELS = torch.tensor([0] * 12 + [1] * 8 + [2] * 10)
FEATURES = torch.arange(30.0)[:, None].repeat(1, 4)  # image i has the features i, i, i, i


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def members_of(data, order=range(30)):
    return torch.stack([data[i][1] for i in order])


# Drawing


@pytest.mark.parametrize('n, k', [(4, 4), (6, 3), (5, 1), (7, 5)])
def test_each_choice_of_k_from_n_is_equally_likely(n, k):
    ways = list(map(list, itertools.combinations(range(n), k)))
    chosen = anomaly._choose(torch.full((1000 * len(ways),), n), k, generator())
    found, counts = chosen.sort(1).values.unique(dim=0, return_counts=True)
    assert found.tolist() == ways and (counts - 1000).abs().max() < 4 * 32


def test_the_odd_image_stands_anywhere_and_each_other_class_is_the_company():
    labels, odd = torch.arange(20_000) % 5, torch.arange(20_000)
    sets, place = draw_sets(labels, odd, 10, generator())
    assert torch.equal(sets[odd, place], odd)
    assert (place.bincount() - 2000).abs().max() < 4 * 45
    company = labels[sets[odd, place - 1]]
    assert (company != labels).all() and (company.bincount() - 4000).abs().max() < 4 * 60
    steps = (company - labels) % 5
    assert (steps.bincount()[1:] - 5000).abs().max() < 4 * 70
    assert (sets.sort(1).values.diff(dim=1) > 0).all()
    sets, place = draw_sets(labels, odd, 10, generator(), shuffle=False)
    assert (place == 9).all() and torch.equal(sets[:, 9], odd)


def test_all_companions_of_the_smallest_class():
    data = SetAnomalyDataset(FEATURES, LABELS, 9, train=False, seed=0)
    for odd, (sets, place) in enumerate(zip(data.sets, data.place)):
        company = LABELS[sets[torch.arange(9) != place]].unique()
        assert len(company) == 1 and company != LABELS[odd] and len(sets.unique()) == 9


# The dataset


def test_with_a_seed_sets_follow_from_seed_and_epoch_alone():
    data = SetAnomalyDataset(FEATURES, LABELS, 8, seed=3)
    fixed = SetAnomalyDataset(FEATURES, LABELS, 8, train=False, seed=3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first, second = members_of(data), members_of(data)
    assert not torch.equal(first, second)
    data.set_epoch(1)
    other = members_of(data)
    data.set_epoch(0)
    torch.rand(9)
    assert torch.equal(members_of(data, reversed(range(30))).flip(0), first)
    assert torch.equal(members_of(data), second)  # again, and again the same
    assert not torch.equal(other, first) and not torch.equal(other, second)
    assert torch.equal(data.collated(range(30))[1], members_of_epoch(3, 0, skip=2))
    again = SetAnomalyDataset(FEATURES, LABELS, 8, train=False, seed=3)
    assert torch.equal(again.sets, fixed.sets)
    torch.set_rng_state(before[0])
    members_of(data)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def members_of_epoch(seed, epoch, skip):
    "Sets of a fresh dataset, after some rounds in single steps"
    data = SetAnomalyDataset(FEATURES, LABELS, 8, seed=seed)
    data.set_epoch(epoch)
    for _ in range(skip):
        members_of(data)
    return data.collated(range(30))[1]


def test_what_is_different_gets_different_sets():
    "Defaults that made validation and test sets the first rows of the training sets"
    torch.manual_seed(0)
    made = [SetAnomalyDataset(FEATURES, LABELS, 8, train=t) for t in (True, True, False, False)]
    torch.manual_seed(0)
    again = [SetAnomalyDataset(FEATURES, LABELS, 8, train=t) for t in (True, True, False, False)]
    assert torch.equal(made[2].sets, again[2].sets) and torch.equal(made[3].sets, again[3].sets)
    for a, b in itertools.combinations(made, 2):
        assert not torch.equal(members_of(a), members_of(b))
    big = SetAnomalyDataset(torch.zeros(60, 1), torch.arange(60) % 2, 8, train=False, seed=0)
    small = SetAnomalyDataset(torch.zeros(40, 1), torch.arange(40) % 2, 8, train=False, seed=0)
    learnt = SetAnomalyDataset(torch.zeros(40, 1), torch.arange(40) % 2, 8, seed=0)
    assert not torch.equal(big.place[:40], small.place)
    assert not torch.equal(learnt.collated(range(40))[2], small.place)


def test_fixed_sets_stay_fixed():
    for seed in (None, 0):
        data = SetAnomalyDataset(FEATURES, LABELS, 8, train=False, seed=seed)
        first = members_of(data)
        data.set_epoch(4)
        assert torch.equal(members_of(data), first) and torch.equal(data.sets, first)


def test_only_what_is_asked_for_is_drawn(monkeypatch):
    "Each repeat used to draw all 45,000 sets anew"
    rows = []

    def counted(labels, odd, *args, **kwargs):
        rows.append(len(odd))
        return draw_sets(labels, odd, *args, **kwargs)

    monkeypatch.setattr(anomaly, 'draw_sets', counted)
    labels = torch.arange(45_000) % 100
    data = SetAnomalyDataset(torch.randn(45_000, 4), labels, seed=0)
    sampler = RandomSampler(data, replacement=True, num_samples=6400)
    for _ in DataLoader(data, 64, sampler=sampler):
        pass
    for _ in range(100):
        data[0]
    assert rows[0] == 45_000 and sum(rows[1:]) < 6400 + 100
    assert data.epoch == 0


def test_what_is_read_again_costs_a_fraction_of_a_millisecond():
    data = SetAnomalyDataset(torch.randn(45_000, 128), torch.arange(45_000) % 100, seed=0)
    data[0]
    times = []
    for _ in range(200):
        start = time.perf_counter()
        data[0]
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-4  # 0.2 ms where nothing else runs


def test_drawn_in_inference_mode_and_used_in_another():
    with torch.inference_mode():
        data = SetAnomalyDataset(FEATURES, LABELS, 8)
        data[0]
    features, sets, place = data.collated([0, 1, 0])
    assert not features.is_inference() and not sets.is_inference()


def epochs(workers, seed, n=2):
    torch.manual_seed(0)
    data = SetAnomalyDataset(FEATURES, LABELS, 8, seed=seed)
    loader = DataLoader(data, 10, shuffle=True, num_workers=workers, generator=generator())
    odd, members = [], []
    for _ in range(n):
        batches = [(sets, place) for _, sets, place in loader]
        sets, place = (torch.cat(part) for part in zip(*batches))
        odd.append(sets.gather(1, place[:, None]).flatten())
        members.append(sets)
    return odd, members


@pytest.mark.parametrize('seed', [None, 0])
@pytest.mark.parametrize('workers', [0, 2])
def test_loaders_get_other_sets_in_each_epoch_and_two_runs_agree(workers, seed):
    odd, members = epochs(workers, seed)
    for o in odd:
        assert torch.equal(o.sort().values, torch.arange(30))
    in_order = [m[o.argsort()] for o, m in zip(odd, members)]
    assert not torch.equal(*in_order)
    again = epochs(workers, seed)[1]
    assert all(map(torch.equal, again, members))


def test_with_a_seed_the_number_of_workers_does_not_matter():
    (odd, *_), (members, *_) = epochs(2, 0)
    (odd_of_1, *_), (members_of_1, *_) = epochs(1, 0)
    assert torch.equal(odd, odd_of_1) and torch.equal(members, members_of_1)


# Models


def test_padding_changes_no_score():
    angles = torch.deg2rad(torch.tensor([0.0, 10, 20, 90]))
    fan = torch.stack([angles.cos(), angles.sin()], -1)[None]
    padded = torch.cat([fan, torch.full((1, 2, 2), 9.0)], 1)
    scores = centroid_rule(padded, torch.arange(6)[None] < 4)
    torch.testing.assert_close(scores[:, :4], centroid_rule(fan))
    assert (scores[:, 4:] == -torch.inf).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_dtype(dtype):
    "They used to end in an error of a matrix product"
    x = torch.randn(2, 5, 4, generator=generator())
    args = {'lr': 1e-3, 'warmup': 1, 'max_iters': 9}
    transformer = AnomalyPredictor(4, 8, 1, num_heads=2, num_layers=1, **args).eval()
    deep_sets = DeepSets(4, 8, num_layers=2, **args).eval()
    rounded = x.to(dtype)
    for net in (transformer, deep_sets):
        logits = net.set_logits(rounded)
        torch.testing.assert_close(logits, net.set_logits(rounded.float()))
        data = SetAnomalyDataset(torch.randn(30, 4).to(dtype), LABELS, 5)
        net.loss(*net.logits_and_targets(data.collated([0, 1]))).backward()
    assert transformer.get_attention_maps(rounded)[0].shape == (2, 2, 5, 5)
    assert transformer.probabilities(rounded).dtype == torch.float32
    assert transformer.double().set_logits(rounded).dtype == torch.float64
    torch.testing.assert_close(centroid_rule(rounded).float(), centroid_rule(x), rtol=0, atol=0.02)


def test_equivariant_in_batches_of_sets_of_different_sizes():
    torch.manual_seed(0)
    args = {'lr': 1e-3, 'warmup': 1, 'max_iters': 9, 'dropout': 0.1, 'input_dropout': 0.1}
    x = 3 * torch.randn(4, 10, 16)
    real = torch.arange(10) < torch.tensor([10, 5, 7, 3])[:, None]
    model = AnomalyPredictor(16, 32, 1, num_heads=4, num_layers=2, **args)
    straight = model.probabilities(x, real)
    for _ in range(20):
        order = torch.randperm(10)
        permuted = model.probabilities(x[:, order], real[:, order])
        assert (permuted - straight[:, order]).abs().max() < 1e-5
    figure = model.example_figure((x, None, torch.tensor([3, 0, 0, 0]), real))
    assert len(figure.axes) == 2 * 4 + 1  # a panel for each head, and the colour bar


def test_a_checkpoint_in_the_published_format_loads_by_name(tmp_path):
    names = ['input_dim', 'model_dim', 'num_classes', 'num_heads', 'num_layers']
    names += ['lr', 'warmup', 'max_iters', 'dropout', 'input_dropout']
    values = [512, 256, 1, 4, 4, 5e-4, 100, 70_300, 0.1, 0.1]
    model = AnomalyPredictor(**dict(zip(names, values)))
    content = {
        'epoch': 99,
        'global_step': 70_300,
        'pytorch-lightning_version': '1.0.2',
        'hparams_name': 'kwargs',
        'state_dict': model.state_dict(),
        'hyper_parameters': dict(zip(names, values)),
    }
    torch.save(content, tmp_path / 'SetAnomalyTask.ckpt')
    loaded = AnomalyPredictor.load_from_checkpoint(tmp_path / 'SetAnomalyTask.ckpt')
    x = torch.randn(2, 10, 512, generator=generator())
    assert torch.equal(loaded.probabilities(x), model.probabilities(x))
    ours = anomaly_model(AnomalySettings(), 512).hparams
    assert {name: ours[name] for name in names if name != 'max_iters'} == {
        name: model.hparams[name] for name in names if name != 'max_iters'
    }


def test_the_published_settings_give_the_published_optimizer_and_schedule():
    s = AnomalySettings()
    assert (s.batch_size, s.gradient_clip_val, s.set_size) == (64, 2, 10)
    assert not s.norm_first and not s.standardize and 45_000 // 64 * s.epochs == 70_300
    model = anomaly_model(s, 512)
    model.hparams.max_iters = 70_300  # which a trainer would say
    (optimizer,), (schedule,) = model.configure_optimizers()
    assert type(optimizer) is torch.optim.Adam and schedule['interval'] == 'step'
    assert optimizer.defaults['betas'] == (0.9, 0.999)
    assert optimizer.defaults['weight_decay'] == 0
    for step in range(4):
        cosine = 0.5 * (1 + np.cos(np.pi * step / 70_300))
        rate = schedule['scheduler'].get_last_lr()[0]
        assert rate == pytest.approx(5e-4 * step / 100 * cosine, abs=1e-12)
        optimizer.step()
        schedule['scheduler'].step()


@pytest.mark.parametrize('rate, n', [(0.98, 10_000), (0.5, 20), (1.0, 300)])
def test_the_ends_of_the_interval_are_1_96_standard_deviations_away(rate, n):
    for end in wilson_interval(rate, n):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(end - rate) / (end * (1 - end) / n) ** 0.5 == pytest.approx(1.96)


# What is refused

X, Y = torch.randn(30, 4), torch.arange(30) % 3
HYPER = {'lr': 1e-3, 'warmup': 1, 'max_iters': 9}


def dataset(features=X, labels=Y, **kwargs):
    return SetAnomalyDataset(features, labels, **{'set_size': 5} | kwargs)


def one(**kwargs):
    return AnomalyPredictor(4, 8, **{'num_classes': 1} | kwargs, num_heads=1, num_layers=1, **HYPER)


def deep(num_layers=1, **kwargs):
    return DeepSets(4, 8, num_layers, **HYPER | kwargs)


REFUSED = [
    (lambda: dataset(features=X.tolist()), 'img_feats must be a floating tensor [N, D], got list'),
    (lambda: dataset(features=X.long()), 'img_feats must be a floating tensor [N, D], got torch.i'),
    (lambda: dataset(features=X[0]), 'img_feats must have the shape [N, D], got [4]'),
    (lambda: dataset(labels=Y[:20]), 'one for each of 30 images, got the shape [20]'),
    (lambda: dataset(labels=Y.float()), 'labels must be integers, got torch.float32'),
    (lambda: dataset(labels=Y > 1), 'labels must be integers, got torch.bool'),
    (lambda: dataset(labels=['a'] * 30), 'labels must be integers, one for each image'),
    (lambda: dataset(labels=Y - 1), 'labels must be at least one number from 0 upwards'),
    (lambda: dataset(X[:0], Y[:0]), 'labels must be at least one number from 0 upwards'),
    (lambda: dataset(labels=torch.zeros(30).long()), 'at least two classes'),
    (lambda: dataset(labels=2 * Y), '[1, 3] have no image'),
    (lambda: dataset(set_size=12), 'sets of 12 take 11 images of a class, class 0 has 10'),
    (lambda: dataset(set_size=2), 'set_size must be at least 3, got 2'),
    (lambda: dataset(set_size=5.0), 'set_size must be an integer, got 5.0'),
    (lambda: dataset(train='yes'), 'train must be True or False'),
    (lambda: dataset(shuffle=1), 'shuffle must be True or False'),
    (lambda: dataset(seed=-1), 'seed must be at least 0, got -1'),
    (lambda: dataset().set_epoch(-1), 'epoch must be at least 0, got -1'),
    (lambda: one(num_classes=2).set_logits(X[None]), 'num_classes must be 1'),
    (lambda: one().set_logits(X), 'features must have the shape [B, S, 4], got [30, 4]'),
    (lambda: one().set_logits(torch.randn(1, 5, 3)), 'features must have the shape [B, S, 4]'),
    (lambda: deep(num_layers=0), 'num_layers must be at least 1, got 0'),
    (lambda: deep(lr=-1), 'lr must be positive and finite, got -1'),
    (lambda: deep(dropout=1), 'dropout must be in [0, 1), got 1'),
    (lambda: deep().set_logits(X), 'features must have the shape [B, S, 4]'),
    (lambda: wilson_interval(1.2, 10), 'rate must be from 0 to 1, got 1.2'),
    (lambda: wilson_interval(0.5, 0), 'n must be at least 1, got 0'),
    (lambda: split_by_class(Y, 1), 'share must be between 0 and 1, got 1'),
    (lambda: plot_sets(None, Y, 0), 'members must be [B, S] and place [B]'),
    (
        lambda: plot_sets(None, Y[None], Y[:1], torch.rand(1, 5)),
        'probabilities must be one for each member',
    ),
]


@pytest.mark.parametrize('call, message', REFUSED, ids=[message for _, message in REFUSED])
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert message in str(error.value)


# Training: stripes of three directions, and an extractor that averages rows and columns


class Stripes(torch.utils.data.Dataset):
    def __init__(self, n, seed, classes=3):
        noise = torch.rand(n, 3, 8, 8, generator=generator(seed))
        i, j = torch.meshgrid(torch.arange(8), torch.arange(8), indexing='ij')
        kinds = torch.arange(n) % 3
        stripes = (torch.stack([i, j, i + j]) % 2)[kinds, None]
        self.targets = [k % classes for k in range(n)]
        self.data = (255 * (0.3 * noise + 0.7 * stripes)).byte()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i], self.targets[i]


class Averages(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x.float().mean((1, 2)), x.float().mean((1, 3))], 1) / 255


STRIPES = ImageSource(Stripes(600, 0), Stripes(60, 1), Averages())
SMALL = {'model_dim': 16, 'num_heads': 2, 'num_layers': 1, 'set_size': 5, 'batch_size': 32}
SMALL |= {'epochs': 2, 'warmup': 10, 'accelerator': 'cpu', 'progress': False}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH_DATASETS', str(tmp_path / 'data'))
    monkeypatch.setenv('PATH_CHECKPOINT', str(tmp_path / 'models'))
    return tmp_path


def trained(**kwargs):
    return train_anomaly(**{'data': 'stripes', 'source': STRIPES} | SMALL | kwargs)


def test_a_model_is_found_again_for_the_same_images_and_classes_only(folder):
    model, metrics = trained()
    assert set(metrics) == {'train_acc', 'val_acc', 'test_acc'} and model.hparams.input_dim == 16
    assert trained()[1] == metrics
    assert trained(input_dim=16, num_classes=1)[1] == metrics
    runs = folder / 'models' / 'SetAnomalyTask'
    assert len(list(runs.glob('anomaly_model-*/*'))) == 1
    relabelled = ImageSource(Stripes(600, 0, classes=2), Stripes(60, 1), Averages())
    trained(source=relabelled)
    assert len(list(runs.glob('anomaly_model-*/*'))) == 2
    for kwargs in ({'data': 'imagenet', 'source': None}, {'recipe': 'slow'}, {'lr': -1}):
        with pytest.raises(ValueError):
            trained(**kwargs)
    assert len(list(runs.glob('*/*'))) == 2


TRAINING = [
    ({'data': 'imagenet', 'source': None}, "data must be one of ['pictures', 'cifar100'], or come"),
    ({'source': (1, 2, 3)}, 'source must be an ImageSource(train, test, extractor), got tuple'),
    ({'recipe': 'slow'}, "recipe must be one of ['published', 'fast'], got 'slow'"),
    ({'num_classes': 10}, 'num_classes must be 1'),
    ({'input_dim': 512}, 'input_dim must be the number of features of the extractor, 16, got 512'),
    ({'set_size': 201}, 'sets of 201 take 200 images of a class'),
    ({'batch_size': 10_000}, 'batch_size must be at most the number of training samples'),
    ({'learning_rate': 0.1}, "unexpected keyword argument 'learning_rate'"),
]


@pytest.mark.parametrize('kwargs, message', TRAINING, ids=[m for _, m in TRAINING])
def test_bad_arguments_of_training_are_refused_before_it(kwargs, message, folder):
    with pytest.raises((TypeError, ValueError)) as error:
        trained(**kwargs)
    assert message in str(error.value) and not (folder / 'models').exists()


# The command


def test_the_command_reports_and_leaves_its_figures(folder, monkeypatch, capsys):
    monkeypatch.setitem(anomaly._SOURCES, 'pictures', lambda progress: STRIPES)
    options = '--model-dim 16 --num-heads 2 --num-layers 1 --set-size 5 --epochs 1 --warmup 10'
    options += ' --batch-size 32 --accelerator cpu --no-progress'
    assert main([*options.split(), '--out-dir', str(folder / 'out')]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line.split(':')[0] for line in lines if ':' in line]
    assert titles[:6] == [
        'train accuracy',
        'validation accuracy',
        'test accuracy',
        '95 % interval',
        'centroid rule',
        'DeepSets',
    ]
    (run,) = (folder / 'out').glob('SetAnomalyTask/anomaly_model-*/run-*')
    assert {'attention_maps.png', 'mistakes.png', 'sets.png'} <= {p.name for p in run.iterdir()}
    assert {'best.ckpt', 'last.ckpt', 'result.json'} <= {p.name for p in run.iterdir()}
    assert main([*options.split(), '--out-dir', str(folder / 'out')]) == 0
    assert capsys.readouterr().out.startswith('found a model trained for ')


USAGE = [
    (['--data', 'imagenet'], "data must be one of ['pictures', 'cifar100']"),
    (['--lr', '-1'], 'lr must be positive and finite, got -1'),
    (['--set-size', '2'], 'set_size must be at least 3, got 2'),
    (['--num-heads', '3'], 'embed_dim must be a multiple of num_heads'),
    (['--epochs', '0'], 'epochs must be at least 1, got 0'),
]


@pytest.mark.parametrize('argv, message', USAGE, ids=[' '.join(argv) for argv, _ in USAGE])
def test_usage_errors_name_the_option(argv, message, folder, capsys):
    assert main([*argv, '--no-progress']) == 2
    assert message in capsys.readouterr().err and not list(folder.iterdir())


def test_offline_the_published_setting_names_the_way_without_a_network(tmp_path):
    proxy = 'http://127.0.0.1:9'
    env = os.environ | {'PATH_DATASETS': str(tmp_path), 'https_proxy': proxy, 'HTTPS_PROXY': proxy}
    argv = [COMMAND, '--data', 'cifar100', '--no-progress']
    run = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ''
    assert len(run.stderr.splitlines()) == 1 and '--data pictures' in run.stderr
    assert not list(tmp_path.rglob('*.gz'))


# Processes: real pictures and features, few of them; sizes that neither two processes nor a
# batch divide: 1,395 / 155 / 279

SCRIPT = """
import json, sys
from transformers_tut.anomaly import ImageSource, train_anomaly
from transformers_tut.features import picture_cnn
from transformers_tut.pictures import CHARACTERS, CharacterPictures

def pictures(train, n):
    return CharacterPictures(train=train, per_class=n, characters=CHARACTERS[:31], progress=False)

source = ImageSource(pictures(True, 50), pictures(False, 9), picture_cnn())
small = dict(data='few', source=source, set_size=5, batch_size=30, epochs=8)
options = json.loads(sys.argv[1])
_, metrics = train_anomaly(**small, accelerator='cpu', progress=False, **options)
print('\\nRESULT', json.dumps(metrics), flush=True)  # on a line of its own, whoever else prints
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tmp_path_factory.mktemp('data')


def start(folder, data, **options):
    env = os.environ | {'PATH_CHECKPOINT': str(folder), 'PATH_DATASETS': str(data)}
    (folder / 'run.py').write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, folder / 'run.py', json.dumps(options)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def results(process):
    "What each process reported"
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f'{out}\n{err}'
    found = [line for line in out.splitlines() if line.startswith('RESULT ')]
    assert found, f'{out}\n{err}'
    return [json.loads(line.removeprefix('RESULT ')) for line in found]


def run_folder(folder):
    (run,) = folder.glob('SetAnomalyTask/*/run-*')
    return run


def weights(folder):
    return torch.load(run_folder(folder) / 'best.ckpt', weights_only=True)['state_dict']


@pytest.fixture(scope='module')
def whole(tmp_path_factory, data):
    "An undisturbed run"
    folder = tmp_path_factory.mktemp('whole')
    (metrics,) = results(start(folder, data))
    return folder, metrics


def test_killed_in_mid_epoch_it_ends_with_the_same_weights(whole, tmp_path, data):
    process = start(tmp_path, data)
    for _ in range(3000):
        if list(tmp_path.rglob('last.ckpt')):
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.rglob('result.json'))
    assert results(start(tmp_path, data)) == [whole[1]]  # sets follow from seed and epoch
    for name, value in weights(whole[0]).items():
        assert torch.equal(value, weights(tmp_path)[name]), name


def test_two_processes_give_one_right_result(tmp_path, data):
    first, second = results(start(tmp_path, data, strategy='ddp', devices='2'))
    assert first == second and set(first) == {'train_acc', 'val_acc', 'test_acc'}
    assert first['test_acc'] > 0.5  # of sets of five: chance is 0.2
    report = json.loads((run_folder(tmp_path) / 'result.json').read_text())
    assert report['steps'] == 8 * 46  # a batch is shared out, not multiplied
    (alone,) = results(start(tmp_path, data))  # finds the model, and counts the same
    assert alone == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize(
    'score', [centroid_rule, DeepSets(8, 8, 1, 1e-3, 1, 1).set_logits], ids=['rule', 'DeepSets']
)
@pytest.mark.parametrize(
    'real, message',
    [
        (torch.tensor([[0.0, 0, 0, -1e9, -1e9]]), 'pass mask == 0'),  # additive: 0 means attend
        (torch.tensor([[1, 1, 1, 2, 0]]), 'integers other than 0 and 1'),
        (torch.ones(2, 5).bool(), 'real must have the shape [B, S] = [1, 5], got [2, 5]'),
    ],
    ids=['additive', 'twos', 'shape'],
)
def test_a_mask_of_another_kind_is_refused(score, real, message):
    with pytest.raises((TypeError, ValueError)) as refusal:
        score(torch.randn(1, 5, 8), real)
    assert message in str(refusal.value)


def test_sets_are_found_from_the_end_as_well():
    sets = SetAnomalyDataset(torch.randn(30, 4), torch.arange(30) % 3, 5, seed=0)
    assert torch.equal(
        sets[-1][1], SetAnomalyDataset(sets.img_feats, sets.labels, 5, seed=0)[29][1]
    )
    assert sets[-1][0].shape == (5, 4)  # a second time, drawn anew
    with pytest.raises(IndexError):
        sets[30]
