"""Dates: splits and ceilings of several seeds; padding, cache and mask; `tut_dates`."""

import json
from datetime import date

import pytest
import torch
from torch.testing import assert_close

from transformers_tut.dates import (
    FORMATS,
    DateDataset,
    DateReader,
    DateSettings,
    best_possible,
    decode_texts,
    encode_texts,
    main,
    mirror,
    split_dates,
    train_dates,
)
from transformers_tut.settings import run_name

SMALL = dict(
    train_size=256, warmup=2, val_days=3, test_days=5, epochs=2, model_dim=16, num_layers=1
)
DAYS = [date(1999, 3, 4), date(1999, 4, 3), date(2024, 2, 29), date(2069, 12, 31)]


@pytest.fixture(scope='module')
def reader():
    torch.manual_seed(0)
    return DateReader(model_dim=32).eval()


@pytest.fixture(scope='module')
def batch():
    data = DateDataset(DAYS)
    return data.collated(range(len(data)))


def test_every_format_is_plain_text_that_comes_back():
    for d in DAYS:
        texts = [write(d) for write in FORMATS.values()]
        assert decode_texts(encode_texts(texts)) == texts


@pytest.mark.parametrize('seed', range(3))
def test_no_text_is_in_two_parts(seed):
    val, test, train = split_dates((100, 200), seed)
    assert len(val) in (100, 101) and len(test) in (200, 201)
    texts = [{text for text, _ in DateDataset(part)} for part in (val, test, train)]
    assert not texts[0] & texts[1] and not texts[2] & (texts[0] | texts[1])


@pytest.mark.parametrize('seed', range(3))
def test_the_ceiling_of_a_part_is_that_of_its_ambiguous_texts(seed):
    test, _ = split_dates((300,), seed)
    data = DateDataset(test)
    _, _, clear = data.collated(range(len(data)))
    doubtful = sum(mirror(d) != d for d in test)
    assert (~clear).sum() == 2 * doubtful
    assert best_possible([*data]) == pytest.approx(1 - doubtful / len(data))


def test_padding_of_the_text_changes_nothing(reader, batch):
    text, iso, _ = batch
    wider = torch.nn.functional.pad(text, (0, 32 - text.shape[1]))
    assert_close(reader.taught(text, iso), reader.taught(wider, iso), atol=1e-5, rtol=1e-5)
    alone = [reader.write(encode_texts([t])) for t in decode_texts(text)[:12]]
    assert torch.equal(torch.cat(alone), reader.write(text[:12]))


def test_what_is_written_depends_on_nothing_later(reader, batch):
    text, iso, _ = batch
    for place in range(1, 10):
        other = iso.clone()
        other[:, place:] = 2 + torch.arange(10 - place)
        before = slice(None), slice(0, place + 1)
        assert_close(reader.taught(text, iso)[before], reader.taught(text, other)[before])


def test_with_and_without_a_cache_the_same_is_written(reader, batch):
    text, _, _ = batch
    written = reader.write(text)
    assert torch.equal(reader.taught(text, written).argmax(-1), written)


def test_maps_are_weights_of_the_text(reader):
    maps, keys, queries = reader.looks('3 Apr 1999')
    assert keys == [*'3 Apr 1999'] and len(maps) == 2 and len(queries) <= 10
    for m in maps:
        assert m.shape == (4, 10, 10)
        assert_close(m.sum(-1), torch.ones(4, 10))


def test_the_same_settings_give_the_same_model(tmp_path):
    runs = [train_dates(**SMALL, out_dir=tmp_path / name, progress=False) for name in 'ab']
    assert runs[0][1] == runs[1][1]
    for name, value in runs[0][0].state_dict().items():
        assert torch.equal(value, runs[1][0].state_dict()[name]), name


def test_stopped_after_an_epoch_it_goes_on_to_the_same_end(tmp_path, monkeypatch):
    model, whole = train_dates(**SMALL, out_dir=tmp_path / 'whole', progress=False)
    draw = DateDataset.set_epoch

    def stop(self, epoch):
        draw(self, epoch)
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises((KeyboardInterrupt, SystemExit)):
        m.setattr(DateDataset, 'set_epoch', stop)
        train_dates(**SMALL, out_dir=tmp_path / 'cut', progress=False)
    assert list(tmp_path.glob('cut/DatesTask/*/last.ckpt'))
    resumed, result = train_dates(**SMALL, out_dir=tmp_path / 'cut', progress=False)
    assert result == whole
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_command_trains_then_finds(tmp_path, capsys):
    options = [f'--{name.replace("_", "-")}={value}' for name, value in SMALL.items()]
    options += [f'--out-dir={tmp_path}', '--no-progress']
    for done in ['trained 4 steps', 'found a model trained for 4 steps']:
        assert main(options) == 0
        out = capsys.readouterr().out
        assert done in out and 'the most that is possible: ' in out
    run = tmp_path / 'DatesTask' / run_name(DateSettings(**SMALL))
    result = json.loads((run / 'result.json').read_text())
    assert {'val_acc', 'val_tokens', 'test_acc', 'test_clear', 'steps'} <= set(result)
    assert (run / 'attention_map.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('wrong', [['--num-heads=3'], ['--val-days=0'], ['--recipe=quick']])
def test_wrong_arguments_end_in_a_sentence(wrong, tmp_path, capsys):
    assert main([*wrong, f'--out-dir={tmp_path}', '--no-progress']) == 2
    assert 'Traceback' not in capsys.readouterr().err


@pytest.mark.parametrize('text', ['', '3. März 1999', 'x' * 33, '3:4:1999'])
def test_texts_of_other_characters_are_refused(text):
    with pytest.raises(ValueError, match='a text must have 1 to 32 characters'):
        encode_texts(['3.4.1999', text])
