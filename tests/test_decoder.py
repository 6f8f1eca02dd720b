"""One property in grids, what `decoder` refuses, and what it shares with PyTorch's layer."""

import copy
import itertools

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

from transformers_tut.attention import from_torch, to_torch
from transformers_tut.decoder import (
    CausalSelfAttention,
    CrossAttention,
    DecoderBlock,
    KVCache,
    Positions,
    TransformerDecoder,
)


class Everywhere(Positions):
    "Acts in all three places, differently at each position."

    def embed(self, x, index):
        return x + torch.sin(index.unsqueeze(-1) + torch.arange(x.shape[-1])).to(x.dtype)

    def rotate(self, x, index):
        angle = index[:, None, :, None].to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def bias(self, query_index, key_index):
        distance = (query_index[:, None, :, None] - key_index[:, None, None, :]).abs()
        return -distance * torch.tensor([0.1, 0.2, 0.4, 0.8]).view(1, 4, 1, 1)


class Turning(Everywhere):
    def bias(self, query_index, key_index):
        return None


POSITIONS = {'none': Positions, 'everywhere': Everywhere, 'turning': Turning}
ARGS = dict(input_dim=16, num_heads=4, dim_feedforward=24)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.15}


def made(positions='everywhere', dtype=torch.float32, **args):
    torch.manual_seed(0)
    decoder = TransformerDecoder(2, positions=POSITIONS[positions](), **ARGS, **args)
    return decoder.to(dtype).eval()


def inputs(dtype=torch.float32, B=3, T=9, Tc=5, D_c=None):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, 16, generator=g).to(dtype)
    return x, None if D_c is None else torch.randn(B, Tc, D_c, generator=g).to(dtype)


def in_chunks(decoder, x, context, sizes, mask=None):
    cache, out = KVCache(), []
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
    for piece, real in zip(x.split(sizes, 1), masks):
        out.append(decoder(piece, context, key_padding_mask=real, cache=cache))
    assert cache.length == x.shape[1]
    return torch.cat(out, 1)


def near(a, b):
    assert_close(a, b, atol=TOLERANCE[a.dtype], rtol=0)


GRID = list(itertools.product(POSITIONS, [None, 2, 1], [None, 7], [True, False]))


@pytest.mark.parametrize(('positions', 'kv', 'D_c', 'norm_first'), GRID)
def test_one_property(positions, kv, D_c, norm_first):
    decoder = made(positions, num_kv_heads=kv, context_dim=D_c, norm_first=norm_first)
    x, context = inputs(D_c=D_c)
    full = decoder(x, context)
    for sizes in [[1] * 9, [4, 5], [3, 3, 3], [8, 1], [1, 8], [9]]:
        near(in_chunks(decoder, x, context, sizes), full)
    for i in range(3):
        near(
            decoder(x[i : i + 1], None if context is None else context[i : i + 1]), full[i : i + 1]
        )
    near(decoder(x, context, return_attention=True)[0], full)
    for t in range(1, 9):  # the future changes nothing
        near(decoder(x[:, :t], context), full[:, :t])


@pytest.mark.parametrize(('positions', 'kv', 'D_c', 'norm_first'), GRID)
def test_padding(positions, kv, D_c, norm_first):
    "Each row with its own padding, on the left, on the right, and between two chunks."
    decoder = made(positions, num_kv_heads=kv, context_dim=D_c, norm_first=norm_first)
    x, context = inputs(D_c=D_c)
    full = decoder(x, context)
    for before, between, after in [([0, 3, 1], 0, 2), ([2, 2, 2], 0, 0), ([0, 1, 0], 2, 1)]:
        T = 9 + max(before) + between + after
        tokens, real = torch.full((3, T, 16), 7.0), torch.zeros(3, T, dtype=torch.bool)
        for i, n in enumerate(before):
            real[i, n : n + 4] = True
            real[i, n + 4 + between : n + 9 + between] = True
            tokens[i, real[i]] = x[i]
        ways = [decoder(tokens, context, key_padding_mask=real)]
        for sizes in [[1] * T, [4, T - 4], [T - 1, 1]]:
            ways.append(in_chunks(decoder, tokens, context, sizes, real))
        for way in ways:
            assert way.isfinite().all()
            near(way[real].view(3, 9, 16), full)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('D_c', [None, 7])
def test_precisions(dtype, D_c):
    decoder = made(dtype=dtype, context_dim=D_c)
    x, context = inputs(dtype, D_c=D_c)
    full = decoder(x, context)
    assert full.dtype == dtype
    near(in_chunks(decoder, x, context, [2, 6, 1]), full)
    near(decoder(x, context, return_attention=True)[0], full)


def test_maps():
    decoder = made(context_dim=7, num_kv_heads=2)
    x, context = inputs(D_c=7)
    real = torch.arange(5) < torch.tensor([[5], [3], [1]])
    tokens = torch.arange(9) >= torch.tensor([[0], [2], [4]])
    masks = dict(key_padding_mask=tokens, context_padding_mask=real)
    own, cross = decoder.train().get_attention_maps(x, context, **masks)
    assert decoder.training and not own[0].requires_grad
    for m in own:
        assert m.shape == (3, 4, 9, 9) and m.triu(1).abs().max() == 0
        assert m.transpose(1, 3)[~tokens].abs().max() == 0
        assert_close(m.sum(-1).transpose(1, 2)[tokens], torch.ones(21, 4))
    for m in cross:
        assert m.shape == (3, 4, 9, 5) and m.permute(0, 3, 1, 2)[~real].abs().max() == 0
        assert_close(m.sum(-1), torch.ones(3, 4, 9))
    assert made().get_attention_maps(x)[1] == [None, None]


def test_maps_with_a_cache():
    decoder, cache = made(), KVCache()
    x, _ = inputs()
    whole = decoder(x, return_attention=True)[1]
    decoder(x[:, :6], cache=cache)
    late = decoder(x[:, 6:], cache=cache, return_attention=True)[1]
    for a, b in zip(late, whole):
        near(a, b[:, :, 6:])


def test_gradients():
    decoder = made(context_dim=7).train()
    x, context = inputs(D_c=7)
    grads = []
    for sizes in [[9], [4, 5], [1] * 9]:
        decoder.zero_grad()
        in_chunks(decoder, x, context, sizes).square().sum().backward()
        grads.append([p.grad.clone() for p in decoder.parameters()])
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_dropout():
    "Weights are dropped in training only, with and without a bias, shown or not."
    for positions in POSITIONS:
        decoder = made(positions, attention_dropout=0.5).train()
        x, _ = inputs()
        assert not torch.equal(decoder(x), decoder(x))
        assert not torch.equal(
            decoder(x, return_attention=True)[0], decoder(x, return_attention=True)[0]
        )
        decoder.eval()
        assert torch.equal(decoder(x), decoder(x))


def test_nothing_seen():
    "A sequence of padding alone is finite, and so are its gradients."
    decoder = made()
    x = inputs()[0].requires_grad_()
    decoder(x, key_padding_mask=torch.zeros(3, 9, dtype=torch.bool)).sum().backward()
    assert x.grad.isfinite().all()


def test_cache_bytes_and_select():
    decoder, cache = made(num_kv_heads=2), KVCache()
    x, _ = inputs()
    assert (cache.length, cache.nbytes) == (0, 0)
    real = torch.arange(6) >= torch.tensor([[0], [1], [2]])
    decoder(x[:, :6], cache=cache, key_padding_mask=real)
    assert cache.nbytes == 2 * 2 * (3 * 2 * 6 * 4) * 4
    cache.select(torch.tensor([2, 0, 2, 1]))
    out = decoder(x[[2, 0, 2, 1], 6:], cache=cache)
    full = decoder(x, key_padding_mask=torch.cat([real, torch.ones(3, 3).bool()], 1))
    near(out, full[[2, 0, 2, 1], 6:])


@torch.no_grad()
def test_the_context_is_projected_once():
    "As long as it is the same: another one, or one changed in place, is read anew."
    decoder = made(context_dim=7)
    x, context = inputs(D_c=7)
    other, calls, cache = context + 1, [], KVCache()
    for layer in decoder.layers:
        layer.cross_attn.kv_proj.register_forward_hook(lambda *_: calls.append(1))
    in_chunks(decoder, x, context, [1] * 9)
    assert len(calls) == 2
    decoder(x[:, :4], context, cache=cache)
    near(decoder(x[:, 4:5], other, cache=copy.copy(cache)), changed(decoder, x, context, other))
    expected = changed(decoder, x, context, other)
    context.add_(1)
    near(decoder(x[:, 4:5], context, cache=cache), expected)
    with torch.inference_mode():
        x, context = inputs(D_c=7)
        near(in_chunks(decoder, x, context, [4, 5]), decoder(x, context))


def changed(decoder, x, context, other):
    "Four tokens with one context and one with another, without keeping either."
    cache = KVCache()
    decoder(x[:, :4], context.clone(), cache=cache)
    return decoder(x[:, 4:5], other.clone(), cache=cache)


def test_a_failure_leaves_the_cache():
    decoder, cache = made(), KVCache()
    x, _ = inputs()
    decoder(x[:, :4], cache=cache)
    hook = decoder.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoder(x[:, 4:], cache=cache)
    hook.remove()
    assert cache.length == 4
    near(decoder(x[:, 4:], cache=cache), decoder(x)[:, 4:])


def test_a_copy_goes_its_own_way():
    decoder, cache = made(), KVCache()
    x, _ = inputs()
    decoder(x[:, :4], cache=cache)
    other = copy.copy(cache)
    other.select(torch.tensor([1]))
    decoder(x[:1, :3], cache=other)
    assert (cache.length, other.length) == (4, 7)
    near(decoder(x[:, 4:], cache=cache), decoder(x)[:, 4:])


def layer(**args):
    args = dict(batch_first=True, dropout=0.1) | args
    return nn.TransformerDecoderLayer(16, 4, 24, **args)


@pytest.mark.parametrize('norm_first', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_torch(norm_first, dtype):
    theirs = layer(norm_first=norm_first).to(dtype).eval()
    ours = from_torch(theirs)
    x, context = inputs(dtype, D_c=16)
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
    real, known = torch.arange(9) < torch.tensor([[9], [6], [1]]), torch.arange(5) < 4
    known = known.expand(3, 5)
    expected = theirs(
        x, context, tgt_mask=causal, tgt_key_padding_mask=~real, memory_key_padding_mask=~known
    )
    out = ours(x, context, key_padding_mask=real, context_padding_mask=known)
    assert_close(out[real], expected[real], atol=1e-5, rtol=1e-5)
    assert not ours.training and ours.dropout.p == ours.linear_net[1].p == 0.1
    again = to_torch(ours).state_dict()
    assert theirs.state_dict().keys() == again.keys()
    for name, p in theirs.state_dict().items():
        assert torch.equal(p, again[name])


def test_torch_keeps_dropout_mode_and_frozen_weights():
    ours = DecoderBlock(16, 4, 24, 0.2, context_dim=16, attention_dropout=0.3)
    ours.cross_attn.q_proj.weight.requires_grad_(False)
    ours.self_attn.eval()
    back = from_torch(to_torch(ours))
    assert (back.dropout.p, back.self_attn.dropout, back.cross_attn.dropout) == (0.2, 0.3, 0.3)
    assert not back.cross_attn.q_proj.weight.requires_grad and back.training
    assert not back.self_attn.training


def hooked():
    out = layer()
    out.linear1.register_forward_hook(lambda *_: None)
    return out


def other_dropout():
    out = layer()
    out.dropout3.p = 0.3
    return out


def other_mha(**args):
    out = layer()
    out.multihead_attn = nn.MultiheadAttention(16, 4, batch_first=True, **args)
    return out


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: layer(batch_first=False), 'batch_first=False'),
        (lambda: layer(activation='gelu'), 'an activation other than relu'),
        (lambda: layer(bias=False), 'bias=False'),
        (hooked, 'its linear1 has hooks'),
        (other_dropout, 'dropout1.p, dropout2.p and dropout3.p that differ'),
        (lambda: other_mha(add_zero_attn=True), 'add_zero_attn=True'),
        (lambda: other_mha(kdim=8, vdim=8), 'kdim or vdim'),
        (
            lambda: type('Mine', (nn.TransformerDecoderLayer,), {})(16, 4, batch_first=True),
            'is a Mine',
        ),
    ],
)
def test_from_torch_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        from_torch(make())


def test_eps_is_kept():
    theirs = layer(layer_norm_eps=0.1).eval()
    x, context = inputs(D_c=16)
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert_close(from_torch(theirs)(x, context), theirs(x, context, tgt_mask=causal))


def without_bias():
    block = DecoderBlock(16, 4, 24, context_dim=16)
    block.cross_attn.kv_proj = nn.Linear(16, 32, bias=False)
    return block


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: DecoderBlock(16, 4, 24), r'context_dim=None \(no cross-attention\)'),
        (lambda: DecoderBlock(16, 4, 24, context_dim=16, num_kv_heads=2), 'num_kv_heads=2'),
        (lambda: DecoderBlock(16, 4, 24, context_dim=7), 'that differ, got 16, 7 and 16'),
        (lambda: CausalSelfAttention(16, 16, 4, num_kv_heads=1), 'num_kv_heads=1'),
        (lambda: CausalSelfAttention(8, 16, 4), 'needs input_dim == embed_dim'),
        (lambda: CrossAttention(16, 7, 16, 4), 'that differ, got 16, 7 and 16'),
        (without_bias, 'its cross_attn.kv_proj has bias=False'),
    ],
)
def test_to_torch_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        to_torch(make())


@pytest.mark.parametrize(
    ('make', 'error', 'message'),
    [
        (lambda: CrossAttention(0, 8, 8, 2), ValueError, 'input_dim must be at least 1'),
        (lambda: CrossAttention(8, 8.0, 8, 2), TypeError, 'context_dim must be an integer'),
        (lambda: CrossAttention(8, 8, 9, 2), ValueError, 'a multiple of num_heads'),
        (lambda: CrossAttention(8, 8, 8, 2, dropout=1), ValueError, r'in \[0, 1\)'),
        (
            lambda: CausalSelfAttention(8, 8, 4, num_kv_heads=3),
            ValueError,
            'multiple of num_kv_heads',
        ),
        (
            lambda: CausalSelfAttention(8, 8, 4, num_kv_heads=0),
            ValueError,
            'num_kv_heads must be at least 1',
        ),
        (
            lambda: CausalSelfAttention(8, 8, 4, num_kv_heads=8),
            ValueError,
            'multiple of num_kv_heads',
        ),
        (
            lambda: DecoderBlock(16, 4, 24, context_dim=0),
            ValueError,
            'context_dim must be at least 1',
        ),
        (
            lambda: DecoderBlock(16, 4, 24, norm_first='post'),
            TypeError,
            'norm_first must be True or',
        ),
        (lambda: TransformerDecoder(0, **ARGS), ValueError, 'num_layers must be at least 1'),
        (
            lambda: TransformerDecoder(1, **ARGS, positions='rotary'),
            TypeError,
            'must be a Positions or None, got str',
        ),
    ],
)
def test_building_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


X, C = torch.zeros(2, 3, 16), torch.zeros(2, 5, 7)
ONES = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ('D_c', 'args', 'options', 'error', 'message'),
    [
        (None, (X[0],), {}, ValueError, r'x must have the shape \[B, T, 16\], got \[3, 16\]'),
        (None, (X.long(),), {}, TypeError, 'x must be a floating tensor'),
        (None, (X, C), {}, ValueError, 'built without context_dim'),
        (None, (X,), dict(context_padding_mask=ONES), ValueError, 'there is no context'),
        (7, (X,), {}, ValueError, r'context \[B, Tc, 7\] is missing'),
        (7, (X, C[..., :6]), {}, ValueError, r'context must have the shape \[2, Tk, 7\]'),
        (7, (X, C[:1]), {}, ValueError, r'context must have the shape \[2, Tk, 7\]'),
        (7, (X, C), dict(context_padding_mask=ONES), ValueError, r'\[B, Tk\]'),
        (None, (X,), dict(key_padding_mask=ONES.float()), TypeError, 'boolean or 0/1 integers'),
        (None, (X,), dict(key_padding_mask=ONES[:, :2]), ValueError, r'\[B, T\] = \[2, 3\]'),
        (None, (X,), dict(key_padding_mask=[[True]]), TypeError, 'must be a tensor, got list'),
        (None, (X,), dict(cache=[]), TypeError, 'cache must be a KVCache or None, got list'),
    ],
)
def test_forward_refused(D_c, args, options, error, message):
    with pytest.raises(error, match=message):
        made(context_dim=D_c)(*args, **options)


def test_foreign_caches_refused():
    cache = KVCache()
    made()(X, cache=cache)
    cases = [
        (made(), X[:1], 'cache holds 2 sequences, x has 1'),
        (made(num_kv_heads=2), X, 'cache holds 4 heads of 4 numbers, this model has 2 of 4'),
        (made(dtype=torch.float64), X.double(), 'cache holds torch.float32 on cpu'),
        (TransformerDecoder(3, **ARGS), X, 'cache holds 2 layers, this model has 3'),
    ]
    for decoder, x, message in cases:
        with pytest.raises(ValueError, match=message):
            decoder(x, cache=cache)
        assert cache.length == 3


def test_cross_attention_alone():
    for Tq, Tk in [(1, 1), (3, 7), (7, 3), (0, 2)]:
        cross = CrossAttention(5, 7, 12, 3)
        out, weights = cross(torch.randn(2, Tq, 5), torch.randn(2, Tk, 7), return_attention=True)
        assert out.shape == (2, Tq, 12) and weights.shape == (2, 3, Tq, Tk)
    hidden = cross(
        torch.randn(2, 3, 5), torch.randn(2, 4, 7), context_padding_mask=torch.zeros(2, 4).bool()
    )
    assert_close(hidden, cross.o_proj.bias.expand(2, 3, 12))  # nothing to look at
