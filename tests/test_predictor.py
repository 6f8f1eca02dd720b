"""What the predictor refuses and takes, at length."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from transformers_tut.predictor import TransformerPredictor
from transformers_tut.training import quiet

ARGS = dict(input_dim=10, model_dim=32, num_classes=7, num_heads=2, num_layers=2)
ARGS |= dict(lr=5e-4, warmup=50, max_iters=1000)


def build(**kwargs):
    return TransformerPredictor(**ARGS | kwargs)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(input_dim=0), 'input_dim must be at least 1, got 0'),
        (dict(model_dim=33), 'must be a multiple of num_heads'),
        (dict(num_classes=2.5), 'num_classes must be an integer, got 2.5'),
        (dict(num_layers=-1), 'num_layers must be at least 1, got -1'),
        (dict(lr=0), 'lr must be positive and finite, got 0'),
        (dict(lr='1e-3'), "lr must be a number, got '1e-3'"),
        (dict(warmup=-5), 'warmup must be at least 0, got -5'),
        (dict(max_iters=0), 'max_iters must be at least 1, got 0'),
        (dict(dropout=1), r'dropout must be in \[0, 1\), got 1'),
        (dict(input_dropout=-0.1), r'input_dropout must be in \[0, 1\), got -0.1'),
    ],
)
def test_bad_settings_are_refused_by_name(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build(**kwargs)


@pytest.mark.parametrize(
    'x, message',
    [
        (torch.zeros(2, 3, 9), r'x must have the shape \[B, T, 10\], got \[2, 3, 9\]'),
        (torch.zeros(2, 3, 10).long(), 'got torch.int64'),
        (torch.zeros(1, 5001, 10), '5001'),
    ],
)
def test_bad_input_is_refused_by_name(x, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build()(x)


def test_hyper_parameters_are_plain_numbers():
    numpy = {name: np.int64(value) for name, value in ARGS.items() if name != 'lr'}
    model = build(**numpy, lr=np.float64(1e-3), dropout=np.float32(0.5))
    kinds = {name: type(value) for name, value in model.hparams.items()}
    floats = {'lr', 'dropout', 'input_dropout'}
    assert kinds == {
        name: float if name in floats else bool if name == 'norm_first' else int for name in kinds
    }


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_precision_are_taken(dtype):
    model, x = build().eval(), torch.randn(2, 5, 10).to(dtype)
    torch.testing.assert_close(model(x), model(x.float()))
    assert model.double()(x).dtype == torch.float64


@pytest.mark.parametrize('precision, fused', [('32-true', True), ('bf16-mixed', None)])
def test_adam_is_fused_where_gradients_can_be_clipped_all_the_same(precision, fused):
    class Task(TransformerPredictor):
        def logits_and_targets(self, batch):
            logits = self(batch).flatten(0, 1)
            return logits, torch.zeros(len(logits), dtype=torch.long)

    model, data = Task(**ARGS), DataLoader(torch.randn(16, 5, 10), 8)
    off = ['logger', 'enable_progress_bar', 'enable_model_summary', 'enable_checkpointing']
    with quiet():
        trainer = pl.Trainer(
            accelerator='cpu',
            precision=precision,
            max_epochs=1,
            gradient_clip_val=1.0,
            **dict.fromkeys(off, False),
        )
        trainer.fit(model, data, data)
    assert trainer.optimizers[0].defaults['fused'] is fused
    assert trainer.callback_metrics['val_loss'].isfinite()
