"""Features where a notebook has no room: killed, of changed models, damaged, and cut downloads."""

import functools
import hashlib
import http.server
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from PIL import Image
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.models import resnet34
from torchvision.transforms import v2

from transformers_tut import features
from transformers_tut.features import (
    IMAGENET,
    Preprocess,
    cifar100,
    extract_features,
    imagenet_resnet34,
    labels_of,
    picture_cnn,
    train_picture_cnn,
)
from transformers_tut.pictures import CharacterPictures
from transformers_tut.settings import Machine

ROOT = Path(__file__).resolve().parents[1]
QUIET = Machine('cpu', progress=False)
GENERATOR = torch.Generator().manual_seed(0)
PICTURES = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8, generator=GENERATOR)  # [N, C, H, W]
GREY = Image.fromarray(PICTURES[0, 0].numpy())


class Net(nn.Module):
    "Four features of an image"

    scale = 1.0

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = self.conv(x.to(self.conv.weight) / 255).relu()
        return self.scale * x.mean((-1, -2))


class Items:
    "A dataset of one's own, which lists `data` and `targets`"

    def __init__(self, data=PICTURES, transform=None):
        self.data, self.targets = data, list(range(len(data)))
        self.transform = transform or (lambda x: x)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.transform(self.data[i]), self.targets[i]


@pytest.fixture
def photos(tmp_path):
    "Makes an ImageFolder: one cat and twelve dogs"

    def folder(**kwargs):
        return ImageFolder(tmp_path / 'photos', **kwargs)

    for i in range(13):
        file = tmp_path / 'photos' / ('dog' if i else 'cat') / f'{i:02}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PICTURES[i].permute(1, 2, 0).numpy()).save(file)
    return folder


def extract(tmp_path, dataset=PICTURES, file='f.pt', model=None, **kwargs):
    kwargs = {'batch_size': 8, 'machine': QUIET} | kwargs
    return extract_features(dataset, tmp_path / file, model or Net(), **kwargs)


# ---- ended from outside, and several processes ----

# Each batch leaves a line with its size, each process what it got
SCRIPT = """
import os, sys, time, torch
from torch import nn
from transformers_tut.features import extract_features
from transformers_tut.settings import Machine

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
    def forward(self, x):
        time.sleep(float(os.environ['PAUSE']))
        with open("calls", "a") as f: print(len(x), file=f)
        return self.conv(x.float() / 255).relu().mean((-1, -2))

if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (150, 3, 8, 8), dtype=torch.uint8, generator=generator)[:<n>]
    machine = Machine("cpu", <devices>, "<strategy>", progress=False)
    for rebuild in <rebuild>:
        how = dict(batch_size=8, machine=machine, rebuild=rebuild)
        features = extract_features(images, "f.pt", Slow(), **how)
    torch.save(features, f"got-{os.environ.get('LOCAL_RANK', 0)}")
"""


def start(folder, n=150, devices=1, strategy='auto', pause=0.0, rebuild=(False,)):
    values = {'n': n, 'devices': devices, 'strategy': strategy, 'rebuild': rebuild}
    text = SCRIPT
    for name, value in values.items():
        text = text.replace(f'<{name}>', str(value))
    folder.mkdir(exist_ok=True)
    (folder / 'script.py').write_text(text)
    env = {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'PAUSE': str(pause)}
    return subprocess.Popen(
        [sys.executable, 'script.py'],
        cwd=folder,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f'{out}\n{err}'
    return out + err


def calls(folder):
    "Sizes of the batches that were computed, without the four rows that are looked at again"
    return [int(line) for line in (folder / 'calls').read_text().split() if line != '4']


def wait_for_parts(folder, process, number=3):
    for _ in range(3000):
        if len(list(folder.glob('f.pt.parts/0*.pt'))) >= number:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError('the parts never came')


def left(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(('f.pt', '.')))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An undisturbed extraction"
    folder = tmp_path_factory.mktemp('whole')
    assert finish(start(folder)) == ''  # and a quiet one
    assert calls(folder) == [8] * 18 + [6]
    return torch.load(folder / 'got-0')


STATUS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: None}


@pytest.mark.parametrize('kill', STATUS)
def test_stopped_in_the_middle_it_goes_on(whole, tmp_path, kill):
    process = start(tmp_path, pause=0.1)
    wait_for_parts(tmp_path, process)
    os.killpg(process.pid, kill)
    _, err = process.communicate(timeout=60)
    assert process.returncode == STATUS[kill] or not STATUS[kill]
    assert process.returncode != 0
    said = f'what was done is kept in {tmp_path / "f.pt.parts"}: start again'
    assert kill == signal.SIGKILL or said in err
    done = len(list(tmp_path.glob('f.pt.parts/0*.pt')))
    assert 3 <= done < 19 and not (tmp_path / 'f.pt').exists()
    (tmp_path / 'calls').unlink()
    finish(start(tmp_path))
    assert len(calls(tmp_path)) == 19 - done
    assert torch.load(tmp_path / 'got-0').equal(whole)
    assert left(tmp_path) == ['f.pt']


# one batch for two processes; 19, an odd number, a file found, and one made anew while both run
@pytest.mark.parametrize('n, rebuild', [(7, [False]), (150, [False, False, True])])
def test_two_processes_give_what_one_does(whole, tmp_path, n, rebuild):
    finish(start(tmp_path, n, 2, 'ddp', rebuild=rebuild))
    first, second = torch.load(tmp_path / 'got-0'), torch.load(tmp_path / 'got-1')
    assert first.equal(second) and first.shape == (n, 4)
    assert first.equal(whole) if n == 150 else torch.allclose(first, whole[:n])
    times = 1 + rebuild.count(True)
    once = [8] * (n // 8) + [n % 8]
    assert sorted(calls(tmp_path)) == sorted(once * times)  # no batch twice
    assert left(tmp_path) == ['f.pt', 'f.pt.old-1'][:times]


def test_two_processes_stop_and_go_on_together(whole, tmp_path):
    process = start(tmp_path, devices=2, strategy='ddp', pause=0.2)
    wait_for_parts(tmp_path, process)
    process.send_signal(signal.SIGTERM)  # to the first process only
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and 'what was done is kept in' in err
    done = len(list(tmp_path.glob('f.pt.parts/0*.pt')))
    (tmp_path / 'calls').unlink()
    finish(start(tmp_path, devices=2, strategy='ddp'))
    assert len(calls(tmp_path)) == 19 - done
    assert torch.load(tmp_path / 'got-1').equal(whole)


# ---- keys of models ----


def test_a_run_whose_parts_a_faster_one_took_away_takes_its_features(tmp_path, monkeypatch):
    expected = extract(tmp_path, file='faster.pt')
    real = features._features_of

    def while_another_ends(*args):
        (tmp_path / 'faster.pt').rename(tmp_path / 'f.pt')
        shutil.rmtree(tmp_path / 'f.pt.parts', ignore_errors=True)
        monkeypatch.setattr(features, '_features_of', real)
        return real(*args)

    monkeypatch.setattr(features, '_features_of', while_another_ends)
    taken_away = features._Extraction.load
    monkeypatch.setattr(features._Extraction, 'load', lambda self: [None] + taken_away(self)[1:])
    assert torch.equal(extract(tmp_path), expected)


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def hook(factor, model):
    model.register_forward_hook(lambda module, x, out: factor * out)


def pre_hook(factor, model):
    model.conv.register_forward_pre_hook(lambda module, x: (factor * x[0],))


def parametrise(factor, model):
    torch.nn.utils.parametrize.register_parametrization(model.conv, 'weight', Times(factor))


def set_attribute(factor, model):
    model.scale = factor


def keep_a_tensor(factor, model):
    model.factors = [torch.full((4,), factor)]


def keep_an_object(factor, model):
    model.helper = type('Helper', (), {})()
    model.helper.settings = {'deep': {'inside': (factor,)}}


def exchange_forward(factor, model):
    model.forward = functools.partial(lambda x, by: by * Net.forward(model, x), by=factor)


def closure_forward(factor, model):
    model.forward = lambda x: factor * Net.forward(model, x)


def change_weights(factor, model):
    model.conv.weight.data *= factor


def prune(factor, model):
    mask = torch.ones_like(model.conv.weight)
    mask[0, 0, 0, 0] = factor
    torch.nn.utils.prune.custom_from_mask(model.conv, 'weight', mask)


CHANGES = [hook, pre_hook, parametrise, set_attribute, keep_a_tensor, keep_an_object]
CHANGES += [exchange_forward, closure_forward, change_weights, prune]


@pytest.mark.parametrize('change', CHANGES)
def test_a_model_changed_by_one_percent_is_another(change, tmp_path):
    def model(factor):
        net = Net()
        change(factor, net)
        return net

    extract(tmp_path, model=model(1.0))
    extract(tmp_path, model=model(1.0))  # the same again is found
    with pytest.raises(ValueError, match='is of another model'):
        extract(tmp_path, model=model(1.01))


FORWARD = """
SCALE = {scale}

def helper(x):
    "{text}"
    return {factor} * x  # {comment}

class Model(Net):
    LIMITS = {limits}
    def forward(self, x):
        return SCALE * helper(super().forward(x))

    @property
    def extra(self):
        return {extra}
"""
CODE = {'scale': 1.0, 'factor': 1.0, 'limits': [1, 2], 'extra': 3, 'text': '', 'comment': ''}


def written(**kwargs):
    "The key of a model of which some code was edited"
    names = {'Net': Net, '__name__': 'written'}
    exec(FORWARD.format(**CODE | kwargs), names)
    return features._model_key(names['Model']())


def test_code_that_forward_reaches_is_part_of_the_key():
    edits = [{}, {'scale': 1.01}, {'factor': 1.01}, {'limits': [1, 3]}, {'extra': 4}]
    assert len({written(**edit) for edit in edits}) == len(edits)
    assert written(comment='another comment') == written()


SAME_KEY = """
import sys
sys.path.insert(0, {tests!r})
from test_features import *
import torch.nn as nn
model = Net()
for change in CHANGES:
    if change is not prune: change(1.5, model)
words = {{'some', 'words', 'in', 'a', 'set'}}
model.anything = dict(words=words, layer=nn.Linear, print=print, o=object())
print(features._model_key(model), features._data_key(Items(transform=transforms.Resize(4))))
print(features._model_key(picture_cnn()))
"""


def test_keys_are_the_same_in_every_process():
    text = SAME_KEY.format(tests=str(ROOT / 'tests'))
    seen = set()
    for seed in ('1', '2'):
        env = os.environ | {'PYTHONHASHSEED': seed, 'PYTHONPATH': str(ROOT)}
        run = subprocess.run([sys.executable, '-c', text], env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        seen.add(run.stdout)
    assert len(seen) == 1


def test_modes_gradients_and_training_decide_no_key():
    model, key = Net(), features._model_key(Net())
    model(PICTURES).sum().backward()
    assert features._model_key(model) == key
    assert features._model_key(model.eval().requires_grad_(False)) == key
    assert features._model_key(model.double()) != key
    assert features._model_key(nn.ReLU()) != features._model_key(nn.Tanh())


def test_a_lightning_module_has_the_same_key_under_a_trainer():
    import pytorch_lightning as pl

    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            return self.net(x)

    model, key = Lit(), features._model_key(Lit())
    model.trainer = pl.Trainer(logger=False, enable_checkpointing=False)
    assert features._model_key(model) == key


def test_what_no_key_shows_the_rows_do(tmp_path, monkeypatch):
    monkeypatch.setenv('FACTOR', '1')

    class Outside(Net):
        def forward(self, x):
            return float(os.environ['FACTOR']) * super().forward(x)

    whole = extract(tmp_path, model=Outside())
    for factor in ('1.01', '0.99'):
        monkeypatch.setenv('FACTOR', factor)
        with pytest.raises(ValueError, match='the code of the model has changed'):
            extract(tmp_path, model=Outside())
    rebuilt = extract(tmp_path, model=Outside(), rebuild=True)
    assert torch.allclose(rebuilt, 0.99 * whole)


def test_old_parts_are_noticed_by_their_rows(tmp_path, monkeypatch):
    class Outside(Net):
        def forward(self, x):
            factor = os.environ['FACTOR']
            if factor == '1' and len(list(parts.iterdir())) == 3:
                raise RuntimeError('power cut')
            return float(factor) * super().forward(x)

    parts = tmp_path / 'f.pt.parts'
    parts.mkdir()
    monkeypatch.setenv('FACTOR', '1')
    with pytest.raises(RuntimeError, match='power cut'):
        extract(tmp_path, model=Outside())
    monkeypatch.setenv('FACTOR', '1.01')
    with pytest.raises(ValueError, match='the code of the model has changed'):
        extract(tmp_path, model=Outside())


# ---- keys of data ----


def brighten_one(image, number=7):
    "A change of one photograph, which no sample of eight out of thirteen need notice"
    marked = np.asarray(image).tobytes() == PICTURES[number].permute(1, 2, 0).numpy().tobytes()
    return image.point(lambda value: value // 2) if marked else image


def test_transforms_are_looked_into(photos):
    one, other = (functools.partial(brighten_one, number=i) for i in (5, 8))
    kinds = [{}, {'transform': one}, {'transform': other}, {'transform': transforms.Resize(4)}]
    kinds += [{'transform': transforms.Resize(5)}, {'loader': lambda path: Image.open(path)}]
    for wrap in (transforms.Compose, v2.Compose):
        kinds += [{'transform': wrap([one])}, {'transform': wrap([other])}]
    kinds += [{'transform': v2.Lambda(one)}, {'transform': v2.Lambda(other)}]
    keys = [features._data_key(photos(**kwargs)) for kwargs in kinds]
    assert len(set(keys)) == len(keys)
    assert keys == [features._data_key(photos(**kwargs)) for kwargs in kinds]
    # labels decide no features
    assert features._data_key(photos(target_transform=str)) == keys[0]


def test_parts_of_datasets_keep_their_transforms(photos):
    def nested(**kwargs):
        inner = Subset(photos(**kwargs), range(12, 0, -1))
        return [Subset(inner, [7, 2, 1]), ConcatDataset([inner, photos()])]

    plain, changed = (nested(), nested(transform=functools.partial(brighten_one, number=8)))
    keys = [features._data_key(dataset) for dataset in plain + changed]
    assert len(set(keys)) == 4
    again = [features._data_key(dataset) for dataset in nested()]
    assert keys[:2] == again


def test_a_file_written_anew_is_another(photos):
    key = features._data_key(photos())
    assert key == features._data_key(photos())
    os.utime(photos().samples[4][0], ns=(1, 1))
    assert key != features._data_key(photos())


def test_unknown_datasets_are_read_as_they_come():
    key = features._data_key(Items())
    assert key == features._data_key(Items(PICTURES.clone()))
    one_pixel = PICTURES.clone()
    one_pixel[17, 2, 3, 4] += 1

    class Hidden(Items):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return (255 - image if i == 17 else image), label

    others = [Items(one_pixel), Items(PICTURES[:49]), Hidden(), Subset(Items(), range(49))]
    others.append(Items(transform=lambda x: 255 - x))
    assert len({key, *map(features._data_key, others)}) == 6
    pairs = [(image, 0) for image in PICTURES]
    assert features._data_key(list(PICTURES)) == features._data_key(pairs)
    tensors = TensorDataset(PICTURES, torch.arange(50))
    assert features._data_key(tensors) == features._data_key(pairs)


def test_a_random_transform_is_refused():
    flip = transforms.RandomHorizontalFlip()
    with pytest.raises(ValueError, match='frozen features need a fixed one'):
        features._data_key(Items(transform=flip))


# ---- labels ----


def ten_more(label):
    return label + 10


def test_labels_pass_their_transform(photos, tmp_path):
    expected = [10] + [11] * 12
    assert labels_of(photos(target_transform=ten_more)).tolist() == expected
    pictures = CharacterPictures(
        tmp_path, False, target_transform=ten_more, characters='abc', per_class=1
    )
    assert labels_of(pictures).tolist() == [10, 11, 12]
    assert labels_of(Subset(pictures, [2, 0])).tolist() == [12, 10]
    twice = ConcatDataset([pictures, Subset(Subset(pictures, [2, 1]), [1])])
    assert labels_of(twice).tolist() == [10, 11, 12, 11]


def test_labels_are_those_of_the_items(photos):
    class Odd(Items):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return image, 2 * label + 1

    assert labels_of(Odd()).tolist() == list(range(1, 100, 2))
    edited = photos()
    edited.samples = edited.samples[::-1]
    assert labels_of(edited).tolist() == [1] * 12 + [0]


# ---- precision ----


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(dtype, tmp_path):
    exact = extract(tmp_path)
    tolerance = {'rtol': 0.02, 'atol': 2e-3}
    stored = extract(tmp_path, file='stored.pt', dtype=dtype)
    assert stored.dtype == dtype and torch.allclose(stored.float(), exact, **tolerance)
    assert extract(tmp_path, file='stored.pt', dtype=dtype).equal(stored)

    computed = extract(tmp_path, file='computed.pt', model=Net().to(dtype))
    assert computed.dtype == torch.float32
    assert torch.allclose(computed, exact, **tolerance)
    with pytest.raises(ValueError, match='is of another model'):
        extract(tmp_path, file='computed.pt')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_extractors_in_other_precisions(dtype, tmp_path):
    exact = extract(tmp_path, file='cnn.pt', model=picture_cnn())
    got = extract(tmp_path, file=f'{dtype}.pt', model=picture_cnn().to(dtype))
    assert ((got - exact).norm(dim=1) < 0.02 * exact.norm(dim=1)).all()
    layer = Preprocess(16, **IMAGENET).to(dtype)
    assert layer(PICTURES).dtype == dtype


# ---- paths ----


def test_paths_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    extract_features(PICTURES, '~/kept/f.pt', Net(), machine=QUIET)
    assert (tmp_path / 'kept/f.pt').exists()
    monkeypatch.setenv('PATH_DATASETS', '~/data')
    extract_features(PICTURES, None, Net(), machine=QUIET)
    assert len(list((tmp_path / 'data/features').iterdir())) == 1

    monkeypatch.setenv('PATH_CHECKPOINT', '~/runs')
    small = {'per_class': 1, 'epochs': 1, 'batch_size': 50, 'machine': QUIET}
    report = train_picture_cnn('~/cnn.pt', **small)
    assert set(report) == {'val_acc', 'test_acc'}
    train_picture_cnn('~/cnn.pt', **small)
    assert {'cnn.pt', 'cnn.pt.old-1', 'runs'} <= {p.name for p in tmp_path.iterdir()}
    assert picture_cnn('~/cnn.pt')(PICTURES).shape == (50, 128)
    assert not (tmp_path / '~').exists()


# ---- files ----


class Payload:
    "Unpickled, it makes a folder"

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


KEY = {'data': 'd', 'model': 'm', 'dtype': 'torch.float32'}


def test_damaged_files_are_refused_unread_and_untouched(tmp_path):
    file, executed = tmp_path / 'f.pt', tmp_path / 'executed'
    features._save_features(file, torch.ones(5, 2), KEY)
    whole = file.read_bytes()
    middle = whole.index(torch.ones(5, 2).numpy().tobytes()) + 7
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    hostile = pickle.dumps(Payload(executed), protocol=2)
    for content in [whole[:-100], whole[:50], b'', b'garbage', flipped, hostile]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match='f.pt is damaged'):
            features._load_features(file, KEY, 5)
        assert file.read_bytes() == content

    torch.save({'features': Payload(executed), 'key': KEY, 'sha256': ''}, file)
    with pytest.raises(ValueError, match='UnpicklingError'):
        features._load_features(file, KEY, 5)
    assert not executed.exists()
    torch.save(torch.ones(5, 2), file)  # a bare tensor, as in a naive cache
    with pytest.raises(ValueError, match='no feature file'):
        features._load_features(file, KEY, 5)


# ---- downloads ----


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        archive = self.server.archive
        self.server.asked.append(self.path)
        if self.path == '/missing':
            return self.send_error(404)
        self.send_response(200)
        self.send_header('Content-Length', str(len(archive)))
        self.end_headers()
        corrupt = archive[:500] + b'X' + archive[501:]
        bodies = {'/cut': archive[:500], '/corrupt': corrupt}
        self.wfile.write(bodies.get(self.path, archive))

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    server.archive, server.asked = b'', []
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def archive_of(contents):
    "A gzipped tar of pickles in CIFAR100's folder"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w:gz') as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f'cifar-100-python/{name}')
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def split(n, classes=3):
    data = torch.randint(256, (n, 3072), dtype=torch.uint8).numpy()
    return {'data': data, 'fine_labels': [i % classes for i in range(n)]}


@pytest.fixture
def small_cifar(server, monkeypatch):
    "CIFAR100 with ten photographs, from a server on this machine"
    names = {'fine_label_names': [f'class {i}' for i in range(3)]}
    contents = {'train': split(6), 'test': split(4), 'meta': names}
    contents = {name: pickle.dumps(x, protocol=2) for name, x in contents.items()}
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    server.archive = archive_of(contents)
    monkeypatch.setattr(CIFAR100, 'url', f'{server.url}/good')
    monkeypatch.setattr(CIFAR100, 'tgz_md5', hashlib.md5(server.archive).hexdigest())
    monkeypatch.setattr(CIFAR100, 'train_list', [['train', md5['train']]])
    monkeypatch.setattr(CIFAR100, 'test_list', [['test', md5['test']]])
    monkeypatch.setattr(CIFAR100, 'meta', CIFAR100.meta | {'md5': md5['meta']})
    return server


def test_one_download_serves_both_parts(small_cifar, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    train = cifar100('~/photos', progress=False)
    asked = len(small_cifar.asked)
    test = cifar100(tmp_path / 'photos', train=False, progress=False)
    assert asked == len(small_cifar.asked)
    assert (len(train), len(test), train.classes[2]) == (6, 4, 'class 2')
    assert labels_of(train).tolist() == [0, 1, 2, 0, 1, 2]
    assert capsys.readouterr().err == ''
    with torch.random.fork_rng(devices=[]):
        net = imagenet_resnet34(resnet34().state_dict())
    got = extract_features(test, tmp_path / 'f.pt', net, machine=QUIET)
    assert got.shape == (4, 512)


MODES = {'cut': 'cut or damaged', 'corrupt': 'cut or damaged', 'missing': '404'}


@pytest.mark.parametrize('mode', MODES)
def test_bad_downloads_are_not_taken_for_good(small_cifar, tmp_path, mode, monkeypatch):
    monkeypatch.setattr(CIFAR100, 'url', f'{small_cifar.url}/{mode}')
    with pytest.raises(ConnectionError, match=MODES[mode]):
        cifar100(tmp_path, progress=False)
    assert not (tmp_path / 'cifar-100-python').exists()
    monkeypatch.setattr(CIFAR100, 'url', f'{small_cifar.url}/good')
    assert len(cifar100(tmp_path, progress=False)) == 6


def test_offline(small_cifar, tmp_path, monkeypatch):
    cifar100(tmp_path / 'there', progress=False)
    monkeypatch.setattr(CIFAR100, 'url', 'http://127.0.0.1:1/good')
    message = 'needs a network connection, once; offline, the picture set needs none'
    with pytest.raises(ConnectionError, match=message):
        cifar100(tmp_path / 'not there', progress=False)
    assert len(cifar100(tmp_path / 'there', progress=False)) == 6  # what is there serves on
    (tmp_path / 'there/cifar-100-python/train').write_bytes(b'damaged')
    assert len(cifar100(tmp_path / 'there', progress=False)) == 6  # unpacked again


def test_a_folder_that_cannot_be_written_is_no_matter_of_the_network(small_cifar, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError) as error:
        cifar100(tmp_path / 'file', progress=False)
    assert 'network' not in str(error.value)


def test_no_pickle_is_opened_that_is_not_the_published_one(small_cifar, tmp_path, monkeypatch):
    executed = tmp_path / 'executed'
    hostile = pickle.dumps(Payload(executed))
    small_cifar.archive = archive_of(dict.fromkeys(['train', 'test', 'meta'], hostile))
    md5 = hashlib.md5(small_cifar.archive).hexdigest()
    monkeypatch.setattr(CIFAR100, 'tgz_md5', md5)
    with pytest.raises(ConnectionError, match='corrupted'):
        cifar100(tmp_path, progress=False)
    assert (tmp_path / 'cifar-100-python/train').exists() and not executed.exists()


def test_weights_are_checked_each_time(tmp_path, server, monkeypatch):
    file = tmp_path / 'resnet34-b627a593.pth'
    file.write_bytes(b'something else')
    with pytest.raises(ValueError, match='is not the file expected'):
        imagenet_resnet34(folder=tmp_path, progress=False)
    assert file.read_bytes() == b'something else'


# ---- what is refused ----


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(PICTURES)


def flat(x):
    return x.float().flatten(1)


def three(targets):
    data = Items(PICTURES[:3])
    data.targets = targets
    return data


def images(*batch):
    return lambda: features._as_batch(batch)


REFUSED = [
    (images(), 'must have one size and dtype, got []'),
    (images('cat.png'), 'a PIL image, or a uint8 or floating tensor [C, H, W], got str'),
    (images(torch.ones(3, 4, 4, dtype=torch.int64)), 'got torch.int64'),
    (images(torch.rand(4, 4)), 'must have the shape [C, H, W], got [4, 4]'),
    (images(torch.rand(3, 4, 4), torch.rand(3, 5, 4)), 'must have one size and dtype'),
    (images(torch.rand(3, 8, 8), PICTURES[0]), "('torch.uint8', (3, 8, 8))"),
    (lambda: labels_of(three([1.0, 2.0, 3.0])), 'must be integers, got torch.float32'),
    (lambda: labels_of(three(['cat', 'dog', 'dog'])), 'labels must be integers'),
    (lambda: labels_of(three([[1, 2]] * 3)), 'for each of 3 items, got the shape [3, 2]'),
    (lambda: labels_of([GREY, GREY]), 'labels must be integers'),
    (lambda: labels_of([]), 'at least one item, got none'),
    (lambda: features._data_key(Endless()), 'with len() and an index, got Endless'),
    (lambda: features._data_key(7), 'with len() and an index, got int'),
    (lambda: features._model_key('resnet34'), 'must be a torch.nn.Module, got str'),
    (lambda: Preprocess(0, **IMAGENET), 'size must be at least 1, got 0'),
    (
        lambda: Preprocess(9, **IMAGENET)(torch.rand(1, 3, 8, 8)),
        'must be uint8 [B, 3, h, w], got torch.float32 [1, 3, 8, 8]',
    ),
    (lambda: Preprocess(9, **IMAGENET)(PICTURES[:, :1]), 'got torch.uint8 [50, 1, 8, 8]'),
    (lambda: picture_cnn()(PICTURES[:, :1]), 'images must be uint8 [B, 3, H, W]'),
    (lambda: picture_cnn(''), 'a path must not be empty'),
    (lambda: imagenet_resnet34(7), 'state_dict'),
    (lambda: train_picture_cnn('f.pt', rate=1), "unexpected keyword argument 'rate'"),
    (lambda: train_picture_cnn('f.pt', epochs=0), 'epochs must be at least 1, got 0'),
]


@pytest.mark.parametrize('call, message', REFUSED)
def test_what_is_refused(call, message):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert message in str(error.value)


BAD_CALLS = [
    ({'dataset': PICTURES[:0]}, 'at least one item, got none'),
    ({'batch_size': 0}, 'batch_size must be at least 1, got 0'),
    ({'batch_size': 8.0}, 'batch_size must be an integer, got 8.0'),
    ({'dtype': torch.int64}, 'such as torch.float32, got torch.int64'),
    ({'dtype': 'float32'}, "got 'float32'"),
    ({'file': '.'}, 'save_file must be a file, got the folder'),
    ({'machine': Machine(strategy='ddp_spawn')}, 'as auto and ddp do, got'),
    ({'model': Returns(nn.Identity())}, 'got torch.uint8 [8, 3, 8, 8] for [8, 3, 8, 8]'),
    ({'model': nn.Flatten()}, 'must give floating features [B, D]'),
    ({'model': Returns(lambda x: (flat(x), x))}, 'got tuple for [8, 3, 8, 8]'),
    ({'model': Returns(lambda x: flat(x)[:1])}, 'got torch.float32 [1, 192]'),
    ({'model': Returns(lambda x: flat(x) / 0)}, 'finite features'),
    (
        {'model': Returns(lambda x: 1e5 * flat(x)), 'dtype': torch.float16},
        'got infinities or NaN, as torch.float16',
    ),
]


@pytest.mark.parametrize('kwargs, message', BAD_CALLS)
def test_bad_calls(tmp_path, kwargs, message):
    with pytest.raises((TypeError, ValueError)) as error:
        extract(tmp_path, **kwargs)
    assert message in str(error.value)
    assert not (tmp_path / 'f.pt').exists()
