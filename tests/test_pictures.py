"""The picture set where a notebook has no room: damaged files, interrupted drawing, bad calls."""

from pathlib import Path

import numpy as np
import pytest
import torch

from transformers_tut.files import atomic_write
from transformers_tut.pictures import CharacterPictures


def small(root, **kwargs):
    settings = {'train': False, 'per_class': 2, 'progress': False}
    return CharacterPictures(root, **settings | kwargs)


@pytest.fixture
def pictures(tmp_path):
    return small(tmp_path)


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_a_damaged_file_is_reported_and_left_alone(pictures, tmp_path):
    content = pictures.path.read_bytes()
    middle = len(content) // 2
    damaged = [content[:middle], b'', b'no such format']
    damaged += [flipped(content, at) for at in (0, middle, len(content) - 20)]
    for bad in damaged:
        pictures.path.write_bytes(bad)
        with pytest.raises(ValueError, match='is damaged'):
            small(tmp_path)
        assert pictures.path.read_bytes() == bad


def test_a_flip_in_a_header_matters_and_is_noticed_or_does_not(pictures, tmp_path):
    content = pictures.path.read_bytes()
    for at in range(0, 250, 25):
        pictures.path.write_bytes(flipped(content, at))
        try:
            assert np.array_equal(small(tmp_path).data, pictures.data)
        except ValueError as e:
            assert 'is damaged' in str(e)


def test_another_array_in_the_file_is_refused(pictures, tmp_path):
    for data in (pictures.data[:-1], pictures.data.astype(np.int16)):
        with open(pictures.path, 'wb') as file:
            np.savez(file, data=data)
        with pytest.raises(ValueError, match='is damaged .it holds'):
            small(tmp_path)


def test_an_interrupted_drawing_leaves_nothing(tmp_path):
    class Interrupted(CharacterPictures):
        def _draw(self, progress):
            with atomic_write(self.path) as scratch:
                scratch.write_bytes(b'the beginning')
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted(tmp_path, train=False)
    assert list((tmp_path / 'CharacterPictures').iterdir()) == []


def test_a_folder_may_be_spelt_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert small('~/mine').path.parents[1] == tmp_path / 'mine'
    monkeypatch.setenv('PATH_DATASETS', '~/yours')
    assert small(None).path.parents[1] == tmp_path / 'yours'


def test_pixels_are_those_of_earlier_versions(tmp_path):
    data = torch.from_numpy(small(tmp_path).data).double()
    # rounding may differ between versions of the libraries that draw, and not more
    assert abs(data.mean() - 124.4175) < 0.05 and abs(data.std() - 75.9994) < 0.05


def test_batches_come_from_a_data_loader(tmp_path):
    def as_tensor(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    data = small(tmp_path, transform=as_tensor, target_transform=lambda t: -t)
    images, targets = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8
    assert targets.tolist() == [0, 0, -1, -1]


@pytest.mark.parametrize(
    'kwargs, message',
    [
        ({'train': 1}, 'train must be True or False'),
        ({'per_class': 0}, 'per_class must be at least 1'),
        ({'per_class': 2.0}, 'per_class must be an int'),
        ({'seed': -1}, 'seed must be at least 0'),
        ({'characters': ['a', 'b']}, 'characters must be a string'),
        ({'characters': ''}, 'at least one character'),
        ({'characters': 'aba'}, "['a']"),
        ({'characters': 'a b'}, "[' ']"),
        ({'characters': '漢字'}, 'known to all'),
        ({'root': ''}, 'a path must not be empty'),
    ],
)
def test_what_is_refused(tmp_path, kwargs, message):
    with pytest.raises((TypeError, ValueError)) as error:
        small(**{'root': tmp_path} | kwargs)
    assert message in str(error.value)
    assert not list(Path(tmp_path).iterdir())
