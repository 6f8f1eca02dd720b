"""A names run on small sizes: its batches, an interruption, two processes' shares, the command."""

import pytest
import torch

from transformers_tut import names
from transformers_tut.names import (
    NameDataset,
    NamePredictor,
    NamesSettings,
    invent,
    main,
    name_nats,
    names_data,
    train_names,
    unicode_names,
)

SMALL = dict(
    train_size=256,
    val_size=20,
    test_size=20,
    model_dim=16,
    num_heads=2,
    num_layers=1,
    warmup=2,
    epochs=2,
    progress=False,
)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_old_names_are_always_the_same():
    old, later = unicode_names()
    assert (len(old), len('\n'.join(old)), len(set('\n'.join(old)))) == (12_771, 352_131, 39)
    assert not set(old) & set(later)
    first, second = (names_data(NamesSettings(seed=seed)).sets for seed in (0, 1))
    for name in ('train', 'val', 'test'):
        assert first[name].names == second[name].names


def test_each_epoch_has_other_batches_and_each_process_its_share():
    lengths = torch.arange(100) % 7
    whole, part = (names._SimilarLengths(lengths, 4, 0, ranks) for ranks in [(1, 0), (2, 1)])
    first, share = list(whole), list(part)
    assert [batch[1::2] for batch in first] == share and len(first) == len(whole) == 25
    assert sorted(sum(first, [])) == list(range(100))
    whole.set_epoch(1)
    assert list(whole) != first and list(whole) == list(whole)


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole, metrics = train_names(**SMALL, out_dir=tmp_path / 'whole')

    def interrupt(self):
        if self.current_epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NamePredictor, 'on_train_epoch_start', interrupt)
        with pytest.raises(KeyboardInterrupt, match='to go on'):
            train_names(**SMALL, out_dir=tmp_path / 'cut')
    resumed, again = train_names(**SMALL, out_dir=tmp_path / 'cut')
    assert torch.equal(weights(whole), weights(resumed)) and metrics == again
    assert set(metrics) == {'val_acc', 'val_loss', 'test_acc', 'test_loss'}


def test_the_loss_of_a_batch_is_that_of_its_names():
    torch.manual_seed(0)
    model = NamePredictor(16, 2, 1, 1e-3, 2)
    words = ['COMET', 'WHITE CHESS KNIGHT', 'A']
    logits, targets = model.logits_and_targets(NameDataset(words).collated([0, 1, 2]))
    surprise = torch.cat(name_nats(model, words))
    assert len(targets) == len(surprise) == sum(map(len, words)) + 3
    torch.testing.assert_close(model.loss(logits, targets), surprise.mean())
    assert name_nats(model, []) == [] and invent(model, 0) == []


def test_drawn_names_end_and_depend_on_the_seed_alone():
    torch.manual_seed(0)
    model = NamePredictor(16, 2, 1, 1e-3, 2)
    drawn = invent(model, 20, seed=3)
    assert drawn == invent(model, 20, seed=3) and max(map(len, drawn)) <= 112
    assert '\n' not in ''.join(drawn)


def test_the_command_trains_and_finds(tmp_path, capsys):
    options = [f'--{key.replace("_", "-")}={value}' for key, value in SMALL.items()]
    options[-1] = '--no-progress'
    for done in ('trained 16 steps', 'found a model trained for 16 steps'):
        assert main([*options, '--out-dir', str(tmp_path)]) == 0
        assert capsys.readouterr().out.startswith(done)
    assert main(['--train-size', '12000', '--out-dir', str(tmp_path)]) == 2
    assert 'there are 12771 names' in capsys.readouterr().err
