"""Fast twins: PyTorch's transformations work on them as on PyTorch's modules."""

import pytest
import torch
import torch.nn as nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from transformers_tut.fast import _FEW_ELEMENTS, CrossEntropyLoss, Dropout, faster

MANY = 2 * _FEW_ELEMENTS  # elements, so that Dropout's own code runs


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('p', [0.1, 0.5, 0.9])
def test_dropout_drops_as_often_as_it_should_and_independently(p):
    x = torch.ones(999, 333)  # no multiple of four
    kept = (out := Dropout(p)(x)) != 0
    spread = (p * (1 - p)) ** 0.5
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * spread / kept.numel() ** 0.5
    torch.testing.assert_close(
        out[kept], torch.full_like(out[kept], 1 / (1 - p)), atol=0, rtol=2e-4
    )
    assert (
        kept.float().mean(1).std() < 1.2 * spread / 333**0.5
    )  # neighbours know nothing of each other
    assert kept.float().mean(0).std() < 1.2 * spread / 999**0.5


def test_the_same_seed_gives_the_same_mask_and_another_seed_another():
    def masked(seed):
        torch.manual_seed(seed)
        return Dropout()(torch.ones(MANY))

    assert masked(1).equal(masked(1)) and not masked(1).equal(masked(2))


@pytest.mark.parametrize('p, left', [(0.0, 1.0), (1.0, 0.0), (1e-9, 1.0)])
def test_all_or_nothing(p, left):
    assert (Dropout(p)(torch.ones(MANY)) == left).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype):
    assert Dropout()(torch.ones(MANY, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize('n', [0, 1, 100, _FEW_ELEMENTS - 1])
def test_few_elements_take_pytorchs_own_path(n):
    results = []
    for layer in Dropout(0.3), nn.Dropout(0.3):
        torch.manual_seed(0)
        results.append(layer(torch.ones(n)))
    assert results[0].equal(results[1])


def test_inplace():
    x = torch.ones(MANY)
    out = Dropout(inplace=True)(x)
    assert out.data_ptr() == x.data_ptr() and 0 < (x == 0).float().mean() < 1
    w = torch.ones(MANY, requires_grad=True)
    out = Dropout(inplace=True)(2 * w)
    out.sum().backward()
    assert w.grad.equal(out)


@pytest.mark.parametrize('n', [8, MANY])
def test_vmap(n):
    x = torch.ones(4, n)
    different = torch.vmap(Dropout(), randomness='different')(x)
    assert not different[0].equal(different[1])
    same = torch.vmap(Dropout(), randomness='same')(x)
    assert same[0].equal(same[1])
    with pytest.raises(RuntimeError, match='randomness'):
        torch.vmap(Dropout())(x)


@pytest.mark.parametrize('n', [8, MANY])
def test_tracing_keeps_it_random(n):
    x = torch.ones(n)
    for mode in ('real', 'fake', 'symbolic'):
        graph = make_fx(Dropout(), tracing_mode=mode)(x)
        assert not graph(x).equal(graph(x)), mode
    exported = torch.export.export(Dropout(), (x,)).module()
    assert not exported(x).equal(exported(x))


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore:.*torch.jit')
@pytest.mark.parametrize('n', [8, MANY])
def test_jit_trace_does_not_freeze_the_mask(n):
    traced = torch.jit.trace(Dropout(), torch.ones(n), check_trace=False)
    assert not traced(torch.ones(n)).equal(traced(torch.ones(n)))
    assert traced(torch.ones(3, 2 * n)).shape == (3, 2 * n)


def test_fake_meta_and_nested_tensors():
    with FakeTensorMode() as mode:
        assert Dropout()(mode.from_tensor(torch.ones(2, MANY))).shape == (2, MANY)
    assert Dropout()(torch.ones(MANY, device='meta')).shape == (MANY,)
    nested = torch.nested.nested_tensor([torch.ones(MANY), torch.ones(5)], layout=torch.jagged)
    assert Dropout()(nested).is_nested


def test_derivatives_of_every_kind():
    x = torch.ones(MANY)
    torch.manual_seed(0)
    mask = Dropout()(x)
    torch.manual_seed(0)
    out, tangent = torch.func.jvp(Dropout(), (x,), (3 * x,))
    assert out.equal(mask) and tangent.equal(3 * mask)
    w = torch.ones(MANY, requires_grad=True)
    (first,) = torch.autograd.grad((Dropout()(w) ** 2).sum(), w, create_graph=True)
    first.sum().backward()
    assert set(w.grad.tolist()) == {0.0, 8.0}


def test_compiled_without_a_break():
    out = torch.compile(Dropout(), backend='eager', fullgraph=True)(torch.ones(MANY))
    assert 0 < (out == 0).float().mean() < 1


SHAPES = [  # of logits and of targets
    *[((n, c), (n,)) for n, c in [(5, 10), (500, 100)]],
    *[((2048, c), (2048,)) for c in (2, 10, 15, 16)],
    ((10,), ()),
    ((3, 10, 700), (3, 700)),
    ((3, 10, 20, 30), (3, 20, 30)),
]


@pytest.mark.parametrize('shape, target_shape', SHAPES)
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_the_loss_is_pytorchs(shape, target_shape, reduction):
    classes = shape[1] if len(shape) > 1 else shape[0]
    logits, target = (torch.randn(shape, dtype=torch.float64), torch.randint(classes, target_shape))
    for options in [
        {},
        dict(label_smoothing=0.1),
        dict(ignore_index=1, weight=torch.rand(classes).double()),
    ]:
        results = []
        for kind in CrossEntropyLoss, nn.CrossEntropyLoss:
            z = logits.clone().requires_grad_()
            loss = kind(reduction=reduction, **options)(z, target=target)
            results.append((loss, *torch.autograd.grad(loss.sum(), z)))
        torch.testing.assert_close(*results)


def test_the_loss_takes_probabilities():
    logits, target = torch.randn(2048, 10), torch.rand(2048, 10).softmax(-1)
    torch.testing.assert_close(
        CrossEntropyLoss()(logits, target), nn.CrossEntropyLoss()(logits, target)
    )


def test_a_model_keeps_hooks_modes_and_checkpoints():
    model, seen = (
        nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2), nn.Sequential(nn.Dropout(0.3))),
        [],
    )
    model[1].register_forward_hook(lambda module, *_: seen.append(type(module)))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert faster(model) is model and faster(model) is model  # twice does no harm
    model(torch.ones(2, 3))
    assert seen == [Dropout] and not model[2][0].training
    assert model.state_dict().keys() == before.keys()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_single_module_can_be_made_faster():
    assert (
        type(faster(nn.Dropout())) is Dropout
        and type(faster(nn.CrossEntropyLoss())) is CrossEntropyLoss
    )
