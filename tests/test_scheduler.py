"""The schedule with many optimizers, stopped at every step, in Lightning; what it refuses."""

import inspect
import io
import math
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn as nn
from pytorch_lightning.callbacks import ModelCheckpoint

from transformers_tut.scheduler import CosineWarmupScheduler
from transformers_tut.training import quiet


def adam(lr=1.0):
    return torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=lr)


def rates(optimizer, scheduler, steps):
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return seen


def there_and_back(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize('kind', ['SGD', 'Adam', 'AdamW', 'RMSprop'])
def test_each_group_of_any_optimizer_keeps_its_rate(kind):
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    groups = [{'params': [a]}, {'params': [b], 'lr': 0.01}]
    optimizer = getattr(torch.optim, kind)(groups, lr=0.1)
    scheduler = CosineWarmupScheduler(optimizer, 5, 20)
    for t in range(30):
        f = scheduler.get_lr_factor(t)
        assert [group['lr'] for group in optimizer.param_groups] == [0.1 * f, 0.01 * f]
        assert scheduler.get_last_lr() == [0.1 * f, 0.01 * f]
        a.grad = b.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()


def test_a_rate_may_be_a_tensor():
    "As compiled optimizers like it."
    optimizer = adam(torch.tensor(0.1))
    scheduler = CosineWarmupScheduler(optimizer, 2, 10)
    assert optimizer.param_groups[0]['lr'] == torch.tensor(0.0)
    optimizer.step()
    scheduler.step()
    expected = torch.tensor(0.1 * scheduler.get_lr_factor(1))
    torch.testing.assert_close(optimizer.param_groups[0]['lr'], expected)


def test_past_the_end_the_rate_stays_at_zero():
    optimizer = adam()
    scheduler = CosineWarmupScheduler(optimizer, 2, 10)
    assert rates(optimizer, scheduler, 50)[10:] == [0.0] * 40
    assert scheduler.get_lr_factor(10**9) == 0.0


@pytest.mark.parametrize('lr', [0.1, np.float64(0.1), 1])
def test_plain_numbers(lr):
    optimizer = adam(lr)
    scheduler = CosineWarmupScheduler(optimizer, np.int64(5), 20)
    assert {type(rate) for rate in rates(optimizer, scheduler, 25)} == {float}
    for epoch in (3, np.float64(3), np.int64(30), np.float32(8)):
        assert type(scheduler.get_lr_factor(epoch)) is float
    plain = (int, float, bool, list)
    assert all(type(value) in plain for value in scheduler.state_dict().values())


@pytest.mark.parametrize('lr', [0.1, np.float64(0.1), 1])
@pytest.mark.parametrize('stop', range(25))
def test_resumed_at_any_step(lr, stop):
    def start():
        optimizer = adam(lr)
        return optimizer, CosineWarmupScheduler(optimizer, 5, 20)

    uninterrupted = rates(*start(), 25)
    optimizer, scheduler = start()
    begun = rates(optimizer, scheduler, stop)
    saved = there_and_back([optimizer.state_dict(), scheduler.state_dict()])
    optimizer, scheduler = start()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert begun + rates(optimizer, scheduler, 25 - stop) == uninterrupted


@pytest.fixture
def stopped():
    "All rates of 20 steps, and both states after 8 of them."
    optimizer = adam(0.1)
    full = rates(optimizer, CosineWarmupScheduler(optimizer, 5, 20), 20)
    optimizer = adam(0.1)
    scheduler = CosineWarmupScheduler(optimizer, 5, 20)
    rates(optimizer, scheduler, 8)
    return full, *there_and_back([optimizer.state_dict(), scheduler.state_dict()])


def scheduler_first(optimizer, states):
    scheduler = CosineWarmupScheduler(optimizer, 5, 20)
    scheduler.load_state_dict(states[1])
    optimizer.load_state_dict(states[0])
    return scheduler


def optimizer_before_building(optimizer, states):
    optimizer.load_state_dict(states[0])
    scheduler = CosineWarmupScheduler(optimizer, 5, 20)
    scheduler.load_state_dict(states[1])
    return scheduler


def other_arguments(optimizer, states):
    scheduler = CosineWarmupScheduler(optimizer, 1, 3)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    return scheduler


def counter_only(optimizer, states):
    optimizer.load_state_dict(states[0])
    return CosineWarmupScheduler(optimizer, 5, 20, last_epoch=7)  # 8 steps done: 0 to 7


@pytest.mark.parametrize(
    'resume', [scheduler_first, optimizer_before_building, other_arguments, counter_only]
)
def test_the_order_of_loading_does_not_matter(stopped, resume):
    full, *states = stopped
    optimizer = adam(0.1)
    assert rates(optimizer, resume(optimizer, states), 12) == full[8:]


def test_a_tensor_is_filled_and_not_replaced(stopped):
    full, _, state = stopped
    optimizer = adam(torch.tensor(0.1))
    scheduler = CosineWarmupScheduler(optimizer, 5, 20)
    rate = optimizer.param_groups[0]['lr']
    scheduler.load_state_dict(state)
    assert optimizer.param_groups[0]['lr'] is rate
    torch.testing.assert_close(rate, torch.tensor(full[8]))


class Tiny(pl.LightningModule):
    "One linear layer that records the rates it is trained with."

    def __init__(self, max_iters=None):
        super().__init__()
        self.layer, self.max_iters, self.rates = nn.Linear(2, 1), max_iters, []

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        steps = self.max_iters or int(self.trainer.estimated_stepping_batches)
        schedule = CosineWarmupScheduler(optimizer, 5, steps)
        return [optimizer], [{'scheduler': schedule, 'interval': 'step'}]

    def training_step(self, batch):
        return self.layer(batch).square().mean()

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]['lr'])


def expected(steps, max_iters):
    factor = CosineWarmupScheduler(adam(), 5, max_iters).get_lr_factor
    return [0.1 * factor(t) for t in range(steps)]


def fit(module, folder, ckpt_path=None, every=None, **options):
    "Train on nine batches of 4."
    safe = {}
    if 'weights_only' in inspect.signature(pl.Trainer.fit).parameters:
        safe['weights_only'] = True
    keep = ModelCheckpoint(folder, filename='{step}', save_top_k=-1, every_n_train_steps=every)
    with quiet():
        trainer = pl.Trainer(
            accelerator='auto',
            devices=1,
            logger=False,
            callbacks=[keep],
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        batches = torch.utils.data.DataLoader(torch.randn(36, 2), batch_size=4)
        trainer.fit(module, batches, ckpt_path=ckpt_path, **safe)
    return trainer


@pytest.mark.parametrize(('accumulate', 'steps'), [(1, 27), (2, 15), (4, 9)])
def test_lightning_runs_the_whole_schedule(tmp_path, accumulate, steps):
    module = Tiny()
    trainer = fit(module, tmp_path, max_epochs=3, accumulate_grad_batches=accumulate)
    assert trainer.global_step == steps
    assert module.rates == expected(steps, max_iters=steps)
    assert trainer.optimizers[0].param_groups[0]['lr'] == 0.0


@pytest.mark.parametrize(('accumulate', 'stop'), [(1, 9), (1, 13), (1, 3), (2, 5), (2, 7)])
def test_lightning_resumes_exactly(tmp_path, accumulate, stop):
    "At the end of an epoch and in the middle of one, with and without accumulation."
    steps = {1: 27, 2: 15}[accumulate]
    options = dict(accumulate_grad_batches=accumulate)
    first = Tiny(max_iters=steps)
    fit(first, tmp_path, every=stop, max_steps=stop, **options)
    assert first.rates == expected(stop, steps)
    (checkpoint,) = Path(tmp_path).glob(f'step={stop}.ckpt')
    state = torch.load(checkpoint, weights_only=True)
    assert state['lr_schedulers'][0]['last_epoch'] == stop

    second = Tiny(max_iters=steps)
    trainer = fit(second, tmp_path, checkpoint, max_steps=steps, **options)
    assert trainer.global_step == steps
    assert first.rates + second.rates == expected(steps, steps)


def test_lightning_plans_up_to_max_steps(tmp_path):
    module = Tiny()
    fit(module, tmp_path, max_steps=8)
    assert module.rates == expected(8, max_iters=8)


def make(*args, **kwargs):
    return CosineWarmupScheduler(adam(), *args, **kwargs)


def two_groups():
    groups = [{'params': [nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    return CosineWarmupScheduler(torch.optim.SGD(groups, lr=1), 5, 20)


@pytest.mark.parametrize(
    ('call', 'error', 'message'),
    [
        (lambda: CosineWarmupScheduler(nn.Linear(2, 2), 5, 20), TypeError, 'got Linear'),
        (lambda: CosineWarmupScheduler([], 5, 20), TypeError, 'got list'),
        (lambda: make(-1, 20), ValueError, 'warmup must be at least 0, got -1'),
        (lambda: make(5.0, 20), TypeError, 'warmup must be an integer, got 5.0'),
        (lambda: make(True, 20), TypeError, 'warmup must be an integer'),
        (lambda: make(None, 20), TypeError, 'warmup must be an integer'),
        (lambda: make(0, 0), ValueError, 'max_iters must be at least 1, got 0'),
        (lambda: make(0, -20), ValueError, 'max_iters must be at least 1'),
        (lambda: make(0, 20.0), TypeError, 'max_iters must be an integer'),
        (lambda: make(0, math.inf), TypeError, 'max_iters must be an integer'),
        (lambda: make(21, 20), ValueError, 'warmup=21 and max_iters=20'),
        (lambda: make(5, 20, last_epoch=-2), ValueError, 'last_epoch must be at least -1'),
        (lambda: make(5, 20, last_epoch=0.5), TypeError, 'last_epoch must be an integer'),
        (lambda: make(5, 20, last_epoch=3), ValueError, 'has no initial_lr'),
        (lambda: make(5, 20, 3), TypeError, 'positional'),
        (lambda: make(5, 20).get_lr_factor('3'), TypeError, "must be a number, got '3'"),
        (lambda: make(5, 20).get_lr_factor(None), TypeError, 'epoch must be a number'),
        (lambda: make(5, 20).get_lr_factor(True), TypeError, 'epoch must be a number'),
        (lambda: make(5, 20).get_lr_factor(-1), ValueError, 'epoch must be at least 0'),
        (lambda: make(5, 20).get_lr_factor(math.nan), ValueError, 'got nan'),
        (
            lambda: two_groups().load_state_dict(make(5, 20).state_dict()),
            ValueError,
            r'state_dict is of 1 parameter group\(s\)',
        ),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
