"""What `20_speed` compares gives the same answers, and `tut_speed` runs; no time is tested."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from transformers_tut import speed
from transformers_tut.anomaly import AnomalySettings, SetAnomalyDataset, anomaly_model
from transformers_tut.encoder import TransformerEncoder
from transformers_tut.fast import CrossEntropyLoss, faster
from transformers_tut.reverse import ReverseSettings, reverse_data, reverse_model

COMMAND = Path(sys.executable).with_name('tut_speed')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def outcome(call, x):
    """The result, and the gradient of the input."""
    x = x.clone().requires_grad_()
    out = call(x)
    weights = torch.arange(out.numel()).view_as(out).cos()
    return out.detach(), *torch.autograd.grad((out * weights).sum(), x)


@pytest.mark.parametrize('norm_first', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_twins_agree_under_every_mask(norm_first, training):
    shape = dict(input_dim=16, num_heads=4, dim_feedforward=32)
    ours = TransformerEncoder(2, norm_first=norm_first, **shape).train(training)
    plain = speed._naive_twin(ours)
    x = torch.randn(3, 12, 16)
    pad = torch.arange(12) < torch.tensor([[12], [7], [1]])
    causal, padded = torch.ones(12, 12).tril().bool(), pad[:, None, None]
    masks = [
        (dict(), None),
        (dict(is_causal=True), causal),
        (dict(key_padding_mask=pad), padded),
        (dict(key_padding_mask=pad, is_causal=True), causal & padded),
    ]
    for kwargs, mask in masks:
        expected = outcome(lambda x, mask=mask: plain(x, mask), x)
        got = outcome(lambda x, kwargs=kwargs: ours(x, **kwargs), x)
        assert_close(got, expected, atol=1e-5, rtol=1e-4)
        maps = ours.get_attention_maps(x, **kwargs)
        assert_close(maps, plain.get_attention_maps(x, mask), atol=1e-6, rtol=1e-5)


def tasks():
    """A model, its naive logits, and eight items, in float64, where rounding plays no part."""
    features = torch.randn(100, 512, dtype=torch.float64)
    sets = SetAnomalyDataset(features, torch.arange(100) % 5)
    settings = AnomalySettings(model_dim=64, num_layers=2, dropout=0.0, input_dropout=0.0)
    yield anomaly_model(settings, 512), speed._naive_anomaly, sets
    sequences = reverse_data(ReverseSettings(train_size=128)).sets['train']
    yield reverse_model(ReverseSettings()), speed._naive_reverse, sequences


def test_three_steps_end_at_the_same_weights():
    for model, naive_logits, data in tasks():
        ours, batch = faster(model.double()), data.collated(range(8))
        plain = speed._naive_twin(ours)

        def naive_loss(plain=plain, naive_logits=naive_logits, batch=batch):
            return F.cross_entropy(*naive_logits(plain, batch))

        def our_loss(ours=ours, batch=batch):
            return CrossEntropyLoss()(*ours.logits_and_targets(batch))

        for trained, loss, fused in [(plain, naive_loss, False), (ours, our_loss, True)]:
            adam = torch.optim.Adam(trained.parameters(), lr=1e-3, fused=fused)
            for _ in range(3):
                adam.zero_grad()
                loss().backward()
                adam.step()
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_batches_fetched_whole_are_the_items_stacked():
    fixed = SetAnomalyDataset(torch.randn(60, 4), torch.arange(60) % 3, train=False)
    for data in fixed, reverse_data(ReverseSettings(train_size=128)).sets['train']:
        some = [3, 1, 4, 15]
        stacked = default_collate([data[i] for i in some])
        for a, b in zip(data.collated(some), stacked, strict=True):
            assert a.equal(b)


def test_each_image_is_the_odd_one_of_its_set_and_sets_are_drawn_anew():
    training = SetAnomalyDataset(torch.randn(60, 4), torch.arange(60) % 3)
    _, members, place = training.collated(list(range(60)))
    assert members.gather(1, place[:, None]).flatten().tolist() == list(range(60))
    assert not training.collated(list(range(60)))[1].equal(members)


@pytest.mark.parametrize('n', [64, 128])
def test_multiplications_of_the_four_layers_are_those_that_pytorch_counts(n):
    x = torch.randn(1, n, 16)
    for name, (layer, count) in speed._layers(16).items():
        if name != 'recurrent':  # PyTorch counts no products inside nn.RNN
            with FlopCounterMode(display=False) as counter:
                layer(x)
            assert counter.get_total_flops() == 2 * count(n), name


def test_restricted_attention_sees_its_block_and_the_one_before():
    x = torch.randn(2, 128, 8)
    apart = torch.arange(128)[:, None] // 32 - torch.arange(128) // 32
    scores = (x @ x.transpose(1, 2) / 8**0.5).masked_fill((apart != 0) & (apart != 1), -torch.inf)
    expected = scores.softmax(-1) @ x
    assert_close(speed._restricted_attention(x)[:, 32:], expected[:, 32:])


def test_mfu_is_a_share():
    rows = speed._mfu_rows(
        'cpu', model_dim=64, num_layers=1, batch_size=2, seq_len=8, compiled=False
    )
    assert [row['variant'] for row in rows] == ['float32', 'bfloat16']
    assert all(row['ms'] > 0 and row['MFU'] > 0 for row in rows)


def test_quick_prints_a_table_and_leaves_two_figures(tmp_path):
    run = subprocess.run(
        [COMMAND, '--quick', '--out-dir', tmp_path / 'speed'], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    table, files = run.stdout.rsplit('\ntable: ', 1)
    lines = ['attention, T = ', 'a batch of 64 sets', 'ResNet34 features', 'resizing']
    lines += ['reverse: a training step', 'anomaly: a training step', 'encoder block']
    assert all(line in table for line in lines), table
    assert len(files.splitlines()) == 3 and 'Traceback' not in run.stderr
    folder = tmp_path / 'speed'
    assert sorted(p.name for p in folder.iterdir()) == ['length.png', 'step.png', 'table.csv']
    rows = pd.read_csv(folder / 'table.csv')
    assert (rows.ours > 0).all() and rows.what.is_unique


def test_usage_errors_name_the_option():
    run = subprocess.run([COMMAND, '--quik'], capture_output=True, text=True)
    assert run.returncode == 2 and '--quik' in run.stderr
