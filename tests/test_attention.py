"""Attention against PyTorch's, in all shapes, masks and precisions; what it refuses."""

import copy
import io

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

from transformers_tut import attention
from transformers_tut.attention import (
    MultiheadAttention,
    from_torch,
    fused_attention,
    scaled_dot_product,
    to_torch,
)

CLOSE = dict(atol=1e-5, rtol=1e-5)
PAD = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 1, 1], [0] * 7]


@pytest.fixture(autouse=True)
def g():
    "A generator, and the same global random state for every test."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield torch.Generator().manual_seed(0)


def explicit(*inputs, **options):
    return scaled_dot_product(*inputs, **options)[0]


def with_grads(f, *inputs, **options):
    "The output of `f`, and the gradients of a weighted sum of it."
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = f(*inputs, **options)
    weights = torch.arange(out.numel(), device=out.device).view_as(out).cos()
    out.float().mul(weights).sum().backward()
    return out.detach(), *[x.grad for x in inputs]


def qkv(g, *lead, Tq=7, Tk=7, d=4, d_v=4, dtype=torch.float32):
    shapes = [(*lead, Tq, d), (*lead, Tk, d), (*lead, Tk, d_v)]
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


# Scaled dot product


@pytest.mark.parametrize('lead', [(), (2,), (2, 3), (2, 3, 4)])
def test_any_leading_dimensions(g, lead):
    values, attention = scaled_dot_product(*qkv(g, *lead, Tq=5, Tk=7, d=8, d_v=6))
    assert values.shape == (*lead, 5, 6) and attention.shape == (*lead, 5, 7)
    assert_close(attention.sum(-1), torch.ones(*lead, 5))


def test_values_and_gradients_are_torchs(g):
    torchs = F.scaled_dot_product_attention
    q, k, v = qkv(g, 3, 3, Tq=5, Tk=7, d_v=6)  # B == H on purpose
    keep = torch.rand(3, 3, 5, 7, generator=g) < 0.6
    keep[..., 0] = True  # no empty row: torch's kernels differ there
    cases = [(None, None), (keep[0, 0],) * 2, (keep[:, 0], keep[:, :1]), (keep, keep)]
    for ours, theirs in cases:
        expected = with_grads(torchs, q, k, v, attn_mask=theirs)
        assert_close(with_grads(explicit, q, k, v, mask=ours), expected, **CLOSE)
    expected = with_grads(torchs, q, k, v, is_causal=True)
    assert_close(with_grads(explicit, q, k, v, is_causal=True), expected, **CLOSE)


def test_gradients_by_finite_differences(g):
    inputs = [x.requires_grad_() for x in qkv(g, 2, Tq=3, Tk=3, dtype=torch.float64)]
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 0]])
    assert torch.autograd.gradcheck(lambda *x: explicit(*x, mask=mask), inputs)
    with (
        pytest.warns(UserWarning, match='Anomaly'),
        torch.autograd.detect_anomaly(),
    ):  # no NaN on the way, either
        explicit(*inputs, mask=mask).sum().backward()


def test_masks_of_all_forms(g):
    q, k, v = qkv(g, 2, 2, Tq=3, Tk=3)  # B == H: nothing can be told from sizes
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    first_only = torch.stack([causal, torch.ones_like(causal)])

    def seen(**masks):
        return scaled_dot_product(q, k, v, **masks)[1] > 0

    assert seen().all()
    assert (seen(is_causal=True) == causal).all()
    assert (seen(mask=causal.int()) == causal).all()
    assert (seen(mask=first_only) == first_only[:, None]).all()  # never across heads
    assert (seen(mask=first_only[:1]) == causal).all()
    pad = torch.tensor([[1, 1, 0], [1, 0, 0]])
    both = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 0]])
    assert (seen(mask=causal, key_padding_mask=pad)[0] == both).all()


def test_the_smallest_score_beats_a_masked_one():
    low = torch.finfo(torch.float16).min
    q, k = torch.ones(1, 1), torch.tensor([[low], [low], [1.0]])
    mask = torch.tensor([[1, 1, 0]])
    _, attention = scaled_dot_product(q.half(), k.half(), k.half(), mask)
    assert attention[0].tolist() == [0.5, 0.5, 0]


@pytest.mark.parametrize('f', [explicit, fused_attention])
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(g, way, f, causal, dtype):
    masks = dict(key_padding_mask=torch.tensor(PAD), is_causal=causal)
    q, k, v = qkv(g, 4, 2, d=16, d_v=16)
    exact = explicit(q, k, v, **masks)
    assert exact[3].abs().max() == 0  # a sequence that is all padding
    half = with_grads(f, *[x.to(dtype) for x in (q, k, v)], **masks)
    assert {x.dtype for x in half} == {dtype}
    assert all(x.isfinite().all() for x in half)
    tolerance = 8 * torch.finfo(dtype).eps  # a few units of the type's own precision
    assert_close(half[0].float(), exact, atol=tolerance, rtol=tolerance)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert_close(f(q, k, v, **masks).float(), exact, atol=2**-5, rtol=2**-5)


def test_dropout_on_weights(g):
    q, k, v = qkv(g, 4, 4, Tq=32, Tk=32, d=8, d_v=8)
    _, plain = scaled_dot_product(q, k, v)
    values, dropped = scaled_dot_product(q, k, v, dropout_p=0.25)
    kept = dropped != 0
    assert abs(kept.float().mean().item() - 0.75) < 0.02  # six standard errors
    assert_close(dropped[kept], plain[kept] / 0.75)
    assert_close(values, dropped @ v)


# The fused kernel


def forms(g):
    keep = torch.rand(4, 3, 7, 7, generator=g) < 0.6
    keep[1, 2, 3] = False  # an empty row
    pad = torch.tensor(PAD).bool()
    return [
        dict(),
        dict(is_causal=True),
        dict(mask=keep[0, 0]),
        dict(mask=keep[:, 0]),
        dict(mask=keep),
        dict(key_padding_mask=pad),
        dict(mask=keep, key_padding_mask=pad),
        dict(key_padding_mask=pad, is_causal=True),
        dict(key_padding_mask=pad.int(), is_causal=True),
        dict(mask=keep[:, 0].int(), is_causal=True),
        dict(mask=keep, key_padding_mask=pad, is_causal=True),
    ]


@pytest.fixture(params=['kernel', 'vectors', 'wider vectors'])
def way(request, monkeypatch):
    "The ways in which a causal mask and padding are put together: on a CPU, traced, on a GPU."
    if request.param != 'kernel':
        monkeypatch.setattr(attention, '_cpu_kernel_fits', lambda *_: False)
    if request.param == 'wider vectors':
        vectors = attention._padding_in_vectors
        monkeypatch.setattr(attention, '_padding_in_vectors', lambda *args: vectors(*args[:-1], 8))
    return request.param


@pytest.mark.parametrize('backend', [None, SDPBackend.MATH])
def test_fused_is_explicit(g, way, backend):
    kernels = [backend] if backend else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    q, k, v = qkv(g, 4, 3)
    for form in forms(g):
        plain = with_grads(explicit, q, k, v, **form)
        with sdpa_kernel(kernels):
            fused = with_grads(fused_attention, q, k, v, **form)
        assert all(x.isfinite().all() for x in fused)
        assert_close(fused, plain, **CLOSE)


@pytest.mark.parametrize('lead', [(4,), (4, 2), (4, 2, 3)])
@pytest.mark.parametrize('sizes', [dict(), dict(Tq=9), dict(Tq=3), dict(d_v=6), dict(d=1, d_v=1)])
def test_causal_and_padded(g, way, lead, sizes):
    masks = dict(key_padding_mask=torch.tensor(PAD), is_causal=True)
    inputs = qkv(g, *lead, **sizes)
    plain = with_grads(explicit, *inputs, **masks)
    fused = with_grads(fused_attention, *inputs, **masks)
    assert_close(fused, plain, **CLOSE)


def test_causal_and_padded_ignores_what_padding_holds(g, way):
    pad = torch.tensor(PAD).bool()
    hidden = ~pad[:, None, :, None]
    q, k, v = qkv(g, 4, 2)
    masks = dict(key_padding_mask=pad, is_causal=True)
    values = fused_attention(q, k, v, **masks)
    for junk in [1e4, -1e4, 1e30]:
        changed = fused_attention(
            q, k.masked_fill(hidden, junk), v.masked_fill(hidden, junk), **masks
        )
        assert torch.equal(changed, values)
    large = fused_attention(q * 100, k * 100, v, **masks)  # scores of tens of thousands
    assert_close(large, explicit(q * 100, k * 100, v, **masks), **CLOSE)


@pytest.mark.parametrize('T', [300, 1024])
def test_no_matrix_of_weights_is_kept(g, way, T):
    pad = (torch.arange(T) < T - 9)[None]
    mask = torch.ones(T, T, dtype=torch.bool)

    def largest_saved(f, **masks):
        sizes = []

        def note(x):
            sizes.append(x.numel())
            return x

        q, k, v = (x.requires_grad_() for x in qkv(g, 1, 1, Tq=T, Tk=T, d=8, d_v=8))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            f(q, k, v, **masks)
        return max(sizes)

    assert largest_saved(explicit) == T * T
    assert largest_saved(fused_attention) == T * 8
    assert largest_saved(fused_attention, is_causal=True) == T * 8
    padded = largest_saved(fused_attention, key_padding_mask=pad)
    assert padded == T * 8  # the mask stays [B, 1, 1, T]
    both = largest_saved(fused_attention, key_padding_mask=pad, is_causal=True)
    assert both == T * {'kernel': 8, 'vectors': 9, 'wider vectors': 16}[way]
    assert largest_saved(fused_attention, mask=mask) == T * T  # given by the caller


def test_causal_and_padded_builds_no_matrix(g, way):
    "Not even for a moment: no tensor of the forward pass is as large as [T, T]."
    T = 512
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            sizes.extend(
                x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x)
            )
            return out

    inputs = qkv(g, 2, 1, Tq=T, Tk=T, d=8, d_v=8)
    pad = torch.arange(T) < torch.tensor([[T], [40]])
    with Watch():
        fused_attention(*inputs, key_padding_mask=pad, is_causal=True)
    assert max(sizes) == 2 * T * {'kernel': 8, 'vectors': 9, 'wider vectors': 16}[way]


# Second derivatives and forward mode


HIGHER = [dict(), dict(is_causal=True), dict(key_padding_mask=torch.tensor([[1, 0, 1], [0, 1, 0]]))]


@pytest.mark.parametrize('masks', [*HIGHER, HIGHER[1] | HIGHER[2]])
def test_one_switch_gives_higher_derivatives(g, masks):
    mha = MultiheadAttention(3, 4, 2).double()
    x = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    tangent = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)

    def f(x):
        return mha(x, **masks)

    def loss(x):
        return f(x).square().sum()

    with pytest.raises((RuntimeError, NotImplementedError), match='flash_attention'):
        jvp(f, (x,), (tangent,))
    with sdpa_kernel(SDPBackend.MATH):
        _, derivative = jvp(f, (x,), (tangent,))
        step = 1e-6 * tangent
        expected = (f(x + step) - f(x - step)) / 2e-6
        assert_close(derivative, expected, atol=1e-6, rtol=1e-6)
        hessian = torch.autograd.functional.hessian(loss, x).view(18, 18)
        assert_close(hessian, hessian.T)
        y = x.clone().requires_grad_()
        assert torch.autograd.gradgradcheck(f, y, fast_mode=True)
        (grad,) = torch.autograd.grad(loss(y), y, create_graph=True)
        grad.norm().backward()  # a penalty on the gradient
        assert y.grad.isfinite().all() and mha.qkv_proj.weight.grad.abs().max() > 0


# Multi-head attention


def test_initial_weights_are_xaviers():
    mha = MultiheadAttention(13, 323, 19)
    for proj in (mha.qkv_proj, mha.o_proj):
        bound = (6 / (proj.in_features + proj.out_features)) ** 0.5
        assert proj.bias.abs().max() == 0
        assert 0.95 * bound < proj.weight.abs().max() <= bound


def test_padding_may_hold_anything(g):
    mha, x = MultiheadAttention(13, 323, 19), torch.randn(3, 11, 13, generator=g)
    pad = torch.arange(11) < torch.tensor([[11], [6], [1]])
    noise = torch.where(pad[..., None], x, 100 * torch.randn(3, 11, 13, generator=g))
    for causal in [False, True]:
        masks = dict(key_padding_mask=pad, is_causal=causal)
        assert_close(mha(noise, **masks)[pad], mha(x, **masks)[pad])
    assert mha(x[:0]).shape == (0, 11, 323)


@pytest.mark.parametrize('explicit', [False, True])
def test_sizes_cannot_be_confused(g, explicit):
    "With B == H == T all masks are square, and each still means what it says."
    n = 4
    mha, x = MultiheadAttention(n, n, n), torch.randn(n, n, n, generator=g)
    one = torch.rand(n, n, generator=g) < 0.5
    batch = torch.rand(n, n, n, generator=g) < 0.5

    def run(x, **masks):
        out = mha(x, return_attention=explicit, **masks)
        return out[0] if explicit else out

    for b in range(n):  # element b of a batch is what it would be alone
        alone = x[b : b + 1]
        assert_close(run(x, mask=one)[b], run(alone, mask=one)[0])
        assert_close(run(x, mask=batch)[b], run(alone, mask=batch[b])[0])
        row = one[b].expand(n, n)
        assert_close(run(x, key_padding_mask=one)[b], run(alone, mask=row)[0])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('causal', [False, True])
def test_module_in_half_precision(g, dtype, causal):
    pad = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])
    mha, x = (MultiheadAttention(8, 16, 4).to(dtype), torch.randn(2, 4, 8, generator=g).to(dtype))
    masks = dict(key_padding_mask=pad, is_causal=causal)
    for out in [mha(x, **masks), mha(x, None, True, **masks)[0]]:
        assert out.dtype == dtype
        assert_close(out[1], mha.o_proj.bias.expand(4, 16))  # nothing seen: only the bias is left
        out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in mha.parameters())
    with torch.autocast('cpu', dtype=dtype):
        out, attention = mha.float()(x.float(), None, True, **masks)
    assert out.dtype == dtype and attention[1].abs().max() == 0


def test_saved_copied_and_moved(g):
    mha, x = MultiheadAttention(8, 16, 4), torch.randn(2, 5, 8, generator=g)
    file = io.BytesIO()
    torch.save(mha.state_dict(), file)
    file.seek(0)
    twin = MultiheadAttention(8, 16, 4)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert_close(twin(x), mha(x))
    assert_close(copy.deepcopy(mha)(x), mha(x))
    if torch.cuda.is_available():  # the same numbers on a GPU; TF32 is off by default
        pad = torch.arange(5) < torch.tensor([[5], [2]])
        for causal in [False, True]:
            here = mha(x, key_padding_mask=pad, is_causal=causal)
            there = twin.cuda()(x.cuda(), key_padding_mask=pad.cuda(), is_causal=causal)
            assert_close(there.cpu(), here, atol=1e-4, rtol=1e-4)


def test_from_the_meta_device(g):
    mha, x = MultiheadAttention(8, 16, 4), torch.randn(2, 5, 8, generator=g)
    with torch.device('meta'):
        bare = MultiheadAttention(8, 16, 4)
    assert bare(x.to('meta'), is_causal=True).is_meta
    loaded = copy.deepcopy(bare).to_empty(device='cpu')
    loaded.load_state_dict(mha.state_dict(), strict=True)
    assert torch.equal(loaded(x), mha(x))
    fresh = bare.to_empty(device='cpu')
    fresh.apply(lambda m: getattr(m, 'reset_parameters', lambda: None)())
    bound = (6 / (8 + 48)) ** 0.5
    assert 0.9 * bound < fresh.qkv_proj.weight.abs().max() <= bound
    assert fresh.qkv_proj.bias.abs().max() == fresh.o_proj.bias.abs().max() == 0


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


CHANGES = {
    'a forward hook': lambda mha: mha.qkv_proj.register_forward_hook(lambda m, i, o: 2 * o),
    'a forward pre-hook': lambda mha: mha.qkv_proj.register_forward_pre_hook(
        lambda m, i: (2 * i[0],)
    ),
    'pruning': lambda mha: prune.l1_unstructured(mha.qkv_proj, 'weight', 0.5),
    'a parametrisation': lambda mha: parametrize.register_parametrization(
        mha.qkv_proj, 'weight', Doubled()
    ),
    'weight norm': lambda mha: parametrizations.weight_norm(mha.qkv_proj),
    'another layer': lambda mha: setattr(mha, 'qkv_proj', nn.Sequential(mha.qkv_proj, Doubled())),
}


@pytest.mark.parametrize('change', CHANGES)
def test_maps_are_those_of_the_pass_whatever_is_attached(g, change):
    mha, x = MultiheadAttention(8, 16, 4), torch.randn(2, 5, 8, generator=g)
    before = mha(x, return_attention=True)[1]
    CHANGES[change](mha)
    out, attention = mha(x, return_attention=True)
    if change != 'weight norm':  # which changes the parameters, not their product
        assert (attention - before).abs().max() > 0.01
    _, _, v = mha.project(x)
    assert_close(mha.o_proj((attention @ v).transpose(1, 2).flatten(2)), mha(x))
    assert_close(out, mha(x))


# torch.compile


@pytest.fixture
def compiled():
    "An attention layer, and the same as one compiled graph."
    torch._dynamo.reset()
    mha = MultiheadAttention(8, 16, 4)
    return mha, torch.compile(mha, fullgraph=True, backend='aot_eager')


EYE = torch.eye(5, dtype=torch.bool)
HALF = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
COMPILED = [
    dict(),
    dict(is_causal=True),
    dict(key_padding_mask=HALF.bool(), is_causal=True),
    dict(mask=EYE.int(), key_padding_mask=HALF),
    dict(mask=EYE.expand(2, 5, 5), return_attention=True),
]


@pytest.mark.parametrize('masks', COMPILED)
def test_compiles_as_one_graph(g, compiled, masks):
    x = torch.randn(2, 5, 8, generator=g)
    expected, out = (f(x, **masks) for f in compiled)
    assert_close(out, expected, **CLOSE)
    out = out[0] if 'return_attention' in masks else out
    out.sum().backward()
    assert compiled[0].qkv_proj.weight.grad.isfinite().all()


def test_compiled_code_refuses_other_integers(g, compiled):
    x = torch.randn(2, 5, 8, generator=g)
    for call in [dict(mask=2 * EYE.int()), dict(mask=EYE, key_padding_mask=-HALF)]:
        for f in compiled:
            with pytest.raises((ValueError, RuntimeError), match='integers other than 0 and 1'):
                f(x, **call)


# The same as PyTorch's


@pytest.mark.parametrize('B, T, E, H', [(1, 1, 4, 1), (2, 5, 12, 3), (4, 4, 8, 4), (3, 17, 32, 8)])
def test_parity_with_torch(g, B, T, E, H):
    ours = MultiheadAttention(E, E, H)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3, generator=g)
    theirs = to_torch(ours)

    def torchs(x, **masks):
        return theirs(x, x, x, need_weights=False, **masks)[0]

    def with_maps(x, **masks):
        return ours(x, return_attention=True, **masks)[0]

    x = torch.randn(B, T, E, generator=g)
    keep = torch.rand(B, H, T, T, generator=g) < 0.6
    keep |= torch.eye(T, dtype=torch.bool)  # elsewhere nn.MultiheadAttention gives NaN
    pad = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    each_head = ~keep[:, :1].expand(B, H, T, T).flatten(0, 1)
    cases = [
        ({}, {}),
        (dict(mask=keep[0, 0]), dict(attn_mask=~keep[0, 0])),
        (dict(mask=keep[:, 0]), dict(attn_mask=each_head)),
        (dict(mask=keep), dict(attn_mask=~keep.flatten(0, 1))),
        (dict(key_padding_mask=pad), dict(key_padding_mask=~pad)),
        (dict(is_causal=True), dict(attn_mask=~causal)),
        (
            dict(is_causal=True, key_padding_mask=pad),
            dict(attn_mask=~causal, key_padding_mask=~pad),
        ),
    ]
    for a, b in cases:
        expected = with_grads(torchs, x, **b)
        assert_close(with_grads(ours, x, **a), expected, **CLOSE)
        assert_close(with_grads(with_maps, x, **a), expected, **CLOSE)
        maps = theirs(x, x, x, average_attn_weights=False, **b)[1]
        assert_close(ours(x, return_attention=True, **a)[1], maps, **CLOSE)


def test_gradients_of_weights_are_torchs(g):
    E, H = 12, 3
    ours = MultiheadAttention(E, E, H).double()
    x = torch.randn(2, 5, E, generator=g, dtype=torch.float64)
    theirs = to_torch(ours)
    ours(x).square().sum().backward()
    theirs(x, x, x)[0].square().sum().backward()
    grad = ours.qkv_proj.weight.grad.view(H, 3, E // H, E).transpose(0, 1).reshape(3 * E, E)
    assert_close(grad, theirs.in_proj_weight.grad)
    assert_close(ours.o_proj.weight.grad, theirs.out_proj.weight.grad)


def test_carried_over_with_all_that_both_have(g):
    ours = MultiheadAttention(8, 8, 2, dropout=0.1).double().eval()
    ours.o_proj.half()
    ours.qkv_proj.bias.requires_grad_(False)
    before = torch.get_rng_state()
    theirs = to_torch(ours)
    back = from_torch(theirs)
    assert torch.equal(torch.get_rng_state(), before)  # no random numbers are drawn
    assert (theirs.dropout, back.dropout, theirs.training, back.training) == (
        0.1,
        0.1,
        False,
        False,
    )
    assert (theirs.in_proj_weight.dtype, theirs.out_proj.weight.dtype) == (
        torch.float64,
        torch.float16,
    )
    assert not theirs.in_proj_bias.requires_grad and theirs.in_proj_weight.requires_grad
    for (name, p), (same, q) in zip(ours.named_parameters(), back.named_parameters()):
        assert (name, p.dtype, p.requires_grad) == (same, q.dtype, q.requires_grad)
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()
    assert all(not p.is_meta for p in [*theirs.parameters(), *back.parameters()])


NOT_TAKEN = {
    'batch_first=False': dict(batch_first=False),
    'bias=False': dict(bias=False),
    'kdim or vdim': dict(kdim=6),
    'kdim or vdim,': dict(vdim=6, batch_first=False),
    'add_bias_kv=True': dict(add_bias_kv=True),
    'add_zero_attn=True': dict(add_zero_attn=True),
}


@pytest.mark.parametrize('name', NOT_TAKEN)
def test_options_of_torch_that_are_refused(name):
    theirs = nn.MultiheadAttention(4, 2, **{'batch_first': True, **NOT_TAKEN[name]})
    with pytest.raises(ValueError, match=f'cannot be carried over with .*{name}'):
        from_torch(theirs)


@pytest.mark.parametrize('change', CHANGES)
def test_changed_modules_are_refused(change):
    ours, theirs = (MultiheadAttention(8, 8, 2), nn.MultiheadAttention(8, 2, batch_first=True))
    CHANGES[change](ours)
    with pytest.raises(ValueError, match='its qkv_proj (is a|has hooks)'):
        to_torch(ours)
    theirs.out_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match='its out_proj has hooks'):
        from_torch(theirs)


def test_other_modules_are_refused():
    class Mine(MultiheadAttention):
        pass

    patched = MultiheadAttention(8, 8, 2)
    patched.forward = lambda x: x
    biasless = MultiheadAttention(8, 8, 2)
    biasless.o_proj = nn.Linear(8, 8, bias=False)
    compiled = torch.compile(MultiheadAttention(8, 8, 2))
    for module, message in [
        (Mine(8, 8, 2), 'it is a Mine'),
        (patched, 'it has a forward of its own'),
        (biasless, 'its o_proj has bias=False'),
        (MultiheadAttention(4, 8, 2), 'needs input_dim == embed_dim'),
        (compiled, 'got OptimizedModule'),
        (nn.Linear(2, 2), 'to_torch takes one of this'),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            to_torch(module)
    with pytest.raises(TypeError, match='from_torch takes an attention, encoder layer'):
        from_torch(nn.Linear(2, 2))


# What is refused


def refused():
    q = torch.zeros(2, 3, 4)
    mha, x = MultiheadAttention(4, 8, 2), torch.zeros(2, 5, 4)
    sdp = scaled_dot_product
    return [
        (lambda: sdp([[1.0]], q, q), 'q must be a floating tensor [..., T, d], got list'),
        (lambda: sdp(q.int(), q, q), 'got torch.int32'),
        (lambda: sdp(q[0, 0], q, q), 'q must have the shape [..., T, d], got [4]'),
        (lambda: sdp(q, torch.zeros(2, 3, 5), q), 'must agree in d_k'),
        (lambda: sdp(q, q, torch.zeros(2, 4, 4)), 'got [2, 3, 4], [2, 3, 4] and [2, 4, 4]'),
        (lambda: sdp(q, q, q, dropout_p=1.0), 'dropout_p must be in [0, 1), got 1.0'),
        (lambda: fused_attention(q, q[:1], q), 'all leading dimensions'),
        (lambda: sdp(q, q, q, mask=2 * torch.eye(3).int()), 'integers other than 0 and 1'),
        (lambda: sdp(q, q, q, mask=[[True]]), 'mask must be a tensor, got list'),
        (
            lambda: sdp(q[0], q[0], q[0], key_padding_mask=torch.ones(2, 3) > 0),
            'key_padding_mask must have the shape [B, Tk]',
        ),
        (lambda: MultiheadAttention(0, 8, 2), 'input_dim must be at least 1, got 0'),
        (lambda: MultiheadAttention(4, 8, 3), 'embed_dim must be a multiple of num_heads'),
        (lambda: MultiheadAttention(4, 8.0, 2), 'embed_dim must be an integer, got 8.0'),
        (lambda: MultiheadAttention(4, 8, 2, dropout=-0.1), 'dropout must be in [0, 1), got -0.1'),
        (lambda: mha(x[..., :3]), 'x must have the shape [B, T, 4], got [2, 5, 3]'),
        (lambda: mha(x[0]), 'got [5, 4]'),
        (
            lambda: mha(x, torch.ones(2, 5) > 0),
            '[5, 5] or [B, Tq, Tk] = [2, 5, 5] or [2, 2, 5, 5], got [2, 5]',
        ),
        (lambda: mha(x, torch.ones(3, 5, 5) > 0), 'got [3, 5, 5]'),
        (
            lambda: mha(x, key_padding_mask=torch.ones(5, 5) > 0),
            'key_padding_mask must have the shape [B, Tk]',
        ),
        (
            lambda: mha(x, key_padding_mask=torch.ones(5, 5) > 0, is_causal=True),
            'key_padding_mask must have the shape [B, Tk]',
        ),
    ]


@pytest.mark.parametrize('case', range(len(refused())))
def test_refused(case):
    call, message = refused()[case]
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize(
    'values, advice',
    [
        ([0.0, 1.0], 'it holds 0 and 1: pass mask.bool()'),
        ([1.0, 1.0], 'it holds 0 and 1: pass mask.bool()'),
        ([0.0, -torch.inf], 'added to the scores: pass mask == 0'),
        ([0.0, -1e9], 'added to the scores: pass mask == 0'),
        ([0.0, 0.0], 'pass mask.bool() if 0 hides a key, mask == 0 if 0 is added'),
        ([0.5, -2.0], 'adding a bias to the scores is not offered'),
        ([0.0, 0.0 + 1j], 'pass a boolean tensor'),
    ],
)
def test_advice_fits_the_values(values, advice):
    mask = torch.tensor([values, values])
    q = torch.zeros(2, 4)
    with pytest.raises(TypeError) as error:
        scaled_dot_product(q, q, q, mask)
    assert advice in str(error.value)


@pytest.mark.parametrize('name, shape', [('mask', (5, 5)), ('key_padding_mask', (2, 5))])
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('explicit', [False, True])
def test_a_mask_elsewhere_is_named_with_both_devices(name, shape, causal, explicit):
    mha, x = MultiheadAttention(4, 8, 2), torch.zeros(2, 5, 4)
    mask = torch.ones(shape, dtype=torch.bool, device='meta')
    with pytest.raises(ValueError, match=f'^{name} must be .* on cpu, but is on meta'):
        mha(x, is_causal=causal, return_attention=explicit, **{name: mask})


def test_works_as_a_function_of_its_parameters(g):
    mha, x = MultiheadAttention(8, 16, 4), torch.randn(2, 5, 8, generator=g)
    doubled = {name: 2 * p for name, p in mha.named_parameters()}
    assert not torch.equal(functional_call(mha, doubled, x), mha(x))
