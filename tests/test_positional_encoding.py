"""What `positional_encoding` refuses, and how its table comes back where nothing was filled in."""

import copy
import io

import pytest
import torch
import torch.nn as nn

from transformers_tut.positional_encoding import PositionalEncoding, sinusoid_table
from transformers_tut.predictor import TransformerPredictor


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ((0, 8), ValueError, 'num_positions must be at least 1, got 0'),
        ((10.0, 8), TypeError, 'num_positions must be an integer'),
        ((10, -8), ValueError, 'd_model must be at least 1, got -8'),
    ],
)
def test_tables_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        sinusoid_table(*arguments)


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ((0,), ValueError, 'd_model must be at least 1, got 0'),
        (('8',), TypeError, 'd_model must be an integer'),
        ((8.5,), TypeError, 'd_model must be an integer'),
        ((True,), TypeError, 'd_model must be an integer'),
        ((8, 0), ValueError, 'max_len must be at least 1, got 0'),
        ((8, None), TypeError, 'max_len must be an integer'),
    ],
)
def test_modules_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        PositionalEncoding(*arguments)


@pytest.mark.parametrize(
    ('x', 'error', 'message'),
    [
        ([[1.0] * 8], TypeError, 'x must be a floating tensor'),
        (torch.zeros(1, 4, 8).long(), TypeError, 'got torch.int64'),
        (torch.zeros(4, 8), ValueError, r'\[B, T, 8\]'),
        (torch.zeros(1, 4, 7), ValueError, r'\[B, T, 8\]'),
        (torch.zeros(1, 11, 8), ValueError, r'T=11 .* max_len=10.*\(8, max_len=11\)'),
    ],
)
def test_inputs_refused(x, error, message):
    with pytest.raises(error, match=message):
        PositionalEncoding(8, max_len=10)(x)


def test_devices():
    for device in ['cpu', 'meta'] + ['cuda'] * torch.cuda.is_available():
        moved = PositionalEncoding(48).to(device)
        assert moved.pe.device.type == device
        assert moved(torch.zeros(1, 3, 48, device=device)).device.type == device


def test_a_model_turned_to_16_bits():
    half = PositionalEncoding(48).half()
    assert half.pe.dtype == half(torch.zeros(1, 3, 48).half()).dtype == torch.float16


def test_nothing_depends_on_the_mode():
    encode, x = PositionalEncoding(48), torch.randn(2, 5, 48)
    assert torch.equal(encode(x), encode.eval()(x))


def on_meta(build):
    "Built without numbers, then given memory that holds anything."
    with torch.device('meta'):
        module = build()
    module.to_empty(device='cpu')
    for module_ in module.modules():
        if isinstance(module_, PositionalEncoding):
            module_.pe.fill_(torch.nan)
    return module


def test_reset_after_to_empty():
    encode = on_meta(lambda: PositionalEncoding(7, max_len=30))
    encode.reset_parameters()
    assert torch.equal(encode.pe, PositionalEncoding(7, max_len=30).pe)


def test_strict_loading_after_to_empty():
    encode = on_meta(lambda: PositionalEncoding(48))
    encode.load_state_dict({}, strict=True)
    assert torch.equal(encode.pe, PositionalEncoding(48).pe)


def test_loading_by_assignment():
    "Weights take the place of those without numbers, and nothing else moves."
    model, x = TransformerPredictor(**ARGUMENTS).eval(), torch.randn(2, 7, 5)
    with torch.device('meta'):
        other = TransformerPredictor(**ARGUMENTS).eval()
        other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(x), model(x))


def test_loading_keeps_the_number_type():
    encode = PositionalEncoding(8).double()
    encode.load_state_dict({})
    assert torch.equal(encode.pe[0], sinusoid_table(5000, 8))


def test_copies_and_files():
    encode, x = PositionalEncoding(8, max_len=5), torch.zeros(1, 5, 8)
    file = io.BytesIO()
    torch.save(encode, file)
    file.seek(0)
    for other in (copy.deepcopy(encode), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), encode(x))


ARGUMENTS = dict(
    input_dim=5,
    model_dim=8,
    num_classes=3,
    num_heads=2,
    num_layers=2,
    lr=1e-3,
    warmup=2,
    max_iters=10,
)


def test_a_predictor_loads_weights_after_to_empty():
    model, x = TransformerPredictor(**ARGUMENTS).eval(), torch.randn(2, 7, 5)
    other = on_meta(lambda: TransformerPredictor(**ARGUMENTS)).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), model(x))


def test_a_predictor_resets_after_to_empty():
    "As `torch.nn.utils.skip_init` and sharded training do: every module fills itself in."
    model = on_meta(lambda: TransformerPredictor(**ARGUMENTS))
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    for module in model.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model(torch.randn(2, 7, 5)).isfinite().all()
