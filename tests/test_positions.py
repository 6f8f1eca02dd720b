"""Positions: full, cached, chunked, padded and batched forwards agree; what is refused."""

import copy
import math
import pickle
import re

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

from transformers_tut.checks import evaluating
from transformers_tut.decoder import KVCache, Positions, TransformerDecoder
from transformers_tut.generation import LanguageModel, generate
from transformers_tut.positional_encoding import sinusoid_table
from transformers_tut.positions import (
    ALiBi,
    Learned,
    Randomised,
    RelativeBias,
    Rotary,
    Sinusoidal,
    make_positions,
)

KINDS = ['sinusoidal', 'learned', 'rotary', 'alibi', 'relative', 'none']
D, H, T, B = 16, 4, 11, 3
CLOSE = dict(atol=1e-5, rtol=0)


def make(kind, num_heads=H):
    "Positions that matter: what is learned is large."
    positions = make_positions(kind.removesuffix(' randomised'), D, num_heads)
    if kind.endswith('randomised'):
        positions = Randomised(positions, 64)
    for p in positions.parameters():
        nn.init.normal_(p)
    return positions


def build(kind, num_heads=H, seed=0, **block_args):
    torch.manual_seed(seed)
    sizes = dict(input_dim=D, num_heads=num_heads, dim_feedforward=20)
    return TransformerDecoder(2, positions=make(kind, num_heads), **sizes, **block_args).eval()


@pytest.fixture(scope='module')
def x():
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))


def in_pieces(model, x, sizes, **inputs):
    "Read x piece by piece with one cache."
    mask, cache = inputs.pop('key_padding_mask', None), KVCache()
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
    pieces = zip(x.split(sizes, 1), masks)
    outs = [model(p, key_padding_mask=m, cache=cache, **inputs) for p, m in pieces]
    return torch.cat(outs, 1)


every_kind = pytest.mark.parametrize('kind', [*KINDS, 'rotary randomised'])
every_shape = pytest.mark.parametrize(
    'block_args',
    [
        {},
        dict(num_kv_heads=2),
        dict(num_kv_heads=1, norm_first=False),
        dict(context_dim=6),
        dict(num_heads=2),
    ],
    ids=str,
)


def context_of(block_args):
    "What is read: another length, another width."
    if 'context_dim' not in block_args:
        return {}
    g = torch.Generator().manual_seed(2)
    return dict(context=torch.randn(B, 5, 6, generator=g))


@every_kind
@every_shape
@torch.no_grad()
def test_full_cached_and_chunked_agree(kind, block_args, x):
    model, inputs = build(kind, **block_args), context_of(block_args)
    full = model(x, **inputs)
    for sizes in ([1] * T, [T], [4, 3, 4], [1, T - 1], [T - 1, 1], [3, 8]):
        assert_close(in_pieces(model, x, sizes, **inputs), full, **CLOSE)


@every_kind
@every_shape
@pytest.mark.parametrize('side', ['left', 'right', 'both', 'between'])
@torch.no_grad()
def test_padded_and_batched_agree_with_each_alone(kind, block_args, side, x):
    model, inputs = build(kind, **block_args), context_of(block_args)
    lengths, total = [1, T, 7], T + 4  # the shortest first
    padded = torch.full((B, total, D), 7.0)
    real = torch.zeros(B, total, dtype=torch.bool)
    for row, n in enumerate(lengths):
        slots = torch.arange(n)
        slots += {'left': total - n, 'both': (total - n) // 2}.get(side, 0)
        if side == 'between':  # as of prompts padded on the right that were written on
            slots[n // 2 :] += total - n
        padded[row, slots] = x[row, :n]
        real[row, slots] = True
    together = model(padded, key_padding_mask=real, **inputs)
    masked = dict(key_padding_mask=real, **inputs)
    for sizes in ([1] * total, [5, 3, total - 8]):
        pieces = in_pieces(model, padded, sizes, **masked)
        assert_close(pieces[real], together[real], **CLOSE)
    for row, n in enumerate(lengths):
        alone = {name: c[row : row + 1] for name, c in inputs.items()}
        out = model(x[row : row + 1, :n], **alone)[0]
        assert_close(together[row][real[row]], out, **CLOSE)


@every_kind
@torch.no_grad()
def test_maps_agree_with_the_fused_path(kind, x):
    model = build(kind)
    out, maps, _ = model(x, return_attention=True)
    assert_close(out, model(x), **CLOSE)
    assert all(m.triu(1).abs().max() == 0 for m in maps)
    assert_close(maps[0].sum(-1), torch.ones(B, H, T))


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_generation_with_padding_agrees_with_each_prompt_alone(kind):
    torch.manual_seed(3)
    model = LanguageModel(20, D, H, 2, positions=make(kind)).eval()
    tokens = torch.randint(20, (2, 6))
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, :3] = False
    both = generate(model, tokens, 5, temperature=0, key_padding_mask=real)
    for row, start in enumerate([0, 3]):
        alone = generate(model, tokens[row : row + 1, start:], 5, temperature=0)
        assert torch.equal(both[row, start:], alone[0])


@pytest.mark.parametrize('kind', ['rotary', 'alibi', 'relative'])
@torch.no_grad()
def test_scores_know_distances_only(kind):
    positions = make(kind)
    g = torch.Generator().manual_seed(4)
    q, k = torch.randn(2, 1, H, T, D // H, generator=g, dtype=torch.float64)

    def scores(index):
        bias = positions.bias(index, index)
        turned = positions.rotate(q, index) @ positions.rotate(k, index).mT
        return turned if bias is None else turned + bias

    index = torch.arange(T)[None]
    for shift in (1, 100, 100_000):
        assert_close(scores(index + shift), scores(index), atol=1e-9, rtol=0)
    assert (scores(2 * index) - scores(index)).abs().max() > 1e-3


def test_learned_positions_get_gradients(x):
    for kind in ('learned', 'relative'):
        model = build(kind).train()
        model(x).sum().backward()
        grad = model.positions.table.weight.grad
        assert (grad != 0).any(1).sum() == T  # the rows, or distances, that were there


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
@every_kind
@torch.no_grad()
def test_the_dtype_stays(kind, dtype, x):
    model = build(kind).to(dtype)
    assert model(x.to(dtype)).dtype == dtype


@every_kind
@torch.no_grad()
def test_copies_pickles_and_state_dicts_agree(kind, x):
    model = build(kind)
    other = build(kind, seed=9)
    other.load_state_dict(model.state_dict())
    with torch.device('meta'):
        hollow = build(kind)
    hollow = hollow.to_empty(device='cpu')
    for module in hollow.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    hollow.load_state_dict(model.state_dict())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other, hollow]
    for same in copies:
        assert_close(same.eval()(x), model(x))
    learned = {'learned', 'relative'}
    keys = [k for k in model.state_dict() if k.startswith('positions')]
    assert keys == (['positions.table.weight'] if kind in learned else [])


@every_kind
@torch.no_grad()
def test_no_tokens_give_no_tokens(kind, x):
    for empty in (x[:, :0], x[:0]):
        for model in (build(kind), build(kind).train()):
            assert model(empty).shape == empty.shape


def test_sinusoidal_is_the_table(x):
    index = torch.arange(T).expand(B, -1)
    out = Sinusoidal(D).embed(torch.zeros(B, T, D), index)
    assert_close(out[1], sinusoid_table(T, D).float())


def test_rotary_turns_complex_numbers():
    "The paper's other form: pairs as complex numbers, times exp(i p theta)."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, H, T, 6, generator=g, dtype=torch.float64)
    index = torch.randint(1000, (2, T), generator=g)
    theta = 100.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    angle = index[:, None, :, None] * theta
    pairs = torch.view_as_complex(x.unflatten(-1, (3, 2)))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle))
    assert_close(Rotary(6, base=100).rotate(x, index), turned.flatten(-2))


@pytest.mark.parametrize('num_heads', [1, 2, 3, 6, 8, 12, 16])
def test_slopes_are_those_of_the_paper(num_heads):
    def published(n):
        "As in the authors' code."
        if math.log2(n).is_integer():
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start * start**i for i in range(n)]
        closest = 2 ** math.floor(math.log2(n))
        return published(closest) + published(2 * closest)[0::2][: n - closest]

    assert ALiBi(num_heads).slopes == pytest.approx(published(num_heads))


@pytest.mark.parametrize(('buckets', 'most'), [(32, 128), (8, 20), (6, 4), (2, 9)])
def test_buckets_are_those_of_the_paper(buckets, most):
    def published(distance):
        "As in the authors' code, for a decoder."
        exact = buckets // 2
        if distance < exact:
            return distance
        grown = math.log(distance / exact) / math.log(most / exact) * (buckets - exact)
        return min(exact + int(grown + 1e-9), buckets - 1)

    positions = RelativeBias(1, num_buckets=buckets, max_distance=most)
    distance = torch.arange(300)
    expected = torch.tensor([published(d) for d in range(300)])
    assert torch.equal(positions.bucket(distance), expected)
    assert positions.bucket(torch.tensor([-5])).item() == 0


def test_randomised_draws_once_a_forward_pass():
    torch.manual_seed(0)
    positions = Randomised(Learned(2, max_len=9), 9).train()
    nn.init.zeros_(positions.positions.table.weight)
    positions.positions.table.weight.data[:, 0] = torch.arange(9.0)
    index, draws = torch.arange(4).expand(3, -1), set()
    for _ in range(50):
        r = positions.embed(torch.zeros(3, 4, 2), index)[..., 0]
        assert (r[:, 1:] > r[:, :-1]).all() and torch.equal(r[0], r[2])
        draws.add(tuple(r[0].tolist()))
        assert torch.equal(positions._at(index), r.long())
    assert len(draws) > 30 and {d[0] for d in draws} > {0.0, 1.0}
    positions.eval()
    assert torch.equal(positions._at(index), index)


def test_randomised_agrees_with_the_kind_inside_at_the_drawn_positions(x):
    model = build('relative randomised').train()
    out = model(x)
    drawn = model.positions._drawn
    plain = build('relative')
    plain.load_state_dict(
        {k.replace('positions.positions', 'positions'): v for k, v in model.state_dict().items()}
    )
    index, seen = plain.positions, drawn.expand(B, -1)
    plain.positions = Fixed(index, seen)
    assert_close(out, plain(x))


class Fixed(Positions):
    "Some kind at given positions."

    def __init__(self, inner, index):
        super().__init__()
        self.inner, self.index = inner, index

    def bias(self, query_index, key_index):
        return self.inner.bias(self.index, self.index)


def test_compiled_agrees(x):
    model = build('rotary')
    compiled = torch.compile(model, backend='eager')
    with torch.no_grad():
        assert_close(compiled(x), model(x), **CLOSE)


@pytest.mark.parametrize(
    ('call', 'error', 'message'),
    [
        (lambda: make_positions('rope', D, H), ValueError, "learned, rotary.*got 'rope'"),
        (lambda: make_positions(None, D, H), ValueError, 'kind must be one of .*got None'),
        (lambda: make_positions([], D, H), ValueError, 'kind must be one of'),
        (lambda: make_positions('none', 10, 4), ValueError, 'model_dim=10 and num_heads=4'),
        (lambda: make_positions('none', 0, 4), ValueError, 'model_dim must be at least 1'),
        (lambda: make_positions('none', 8, 2.0), TypeError, 'num_heads must be an integer'),
        (lambda: make_positions('rotary', 6, 2), ValueError, 'head_dim must be even'),
        (lambda: make_positions('learned', 6, 2, max_len=0), ValueError, 'max_len must'),
        (lambda: make_positions('alibi', 6, 2, max_len='9'), TypeError, 'max_len must'),
        (lambda: Sinusoidal(True), TypeError, 'model_dim must be an integer'),
        (lambda: Learned(8, max_len=-1), ValueError, 'max_len must be at least 1'),
        (lambda: Rotary(8, base=0), ValueError, 'base must be positive'),
        (lambda: Rotary(8, base=math.inf), ValueError, 'base must be positive and finite'),
        (lambda: ALiBi(0), ValueError, 'num_heads must be at least 1'),
        (lambda: RelativeBias(2, num_buckets=1), ValueError, 'num_buckets must be at least'),
        (lambda: RelativeBias(2, num_buckets=7), ValueError, 'num_buckets must be even'),
        (lambda: RelativeBias(2, max_distance=16), ValueError, 'above num_buckets // 2 = 16'),
        (lambda: Randomised('rotary', 9), TypeError, 'positions must be a Positions, got str'),
        (lambda: Randomised(Rotary(4), 0), ValueError, 'draw_from must be at least 1'),
        (lambda: Randomised(Learned(4, max_len=8), 9), ValueError, 'at most max_len=8'),
    ],
)
def test_refused_when_built(call, error, message):
    with pytest.raises(error, match=message):
        call()


INDEX = torch.arange(4)[None]


@pytest.mark.parametrize('kind', [Sinusoidal, Learned])
@pytest.mark.parametrize(
    ('x', 'index', 'error', 'message'),
    [
        ((1, 4, 8), INDEX + 7, ValueError, r'position 10, but .*\(8, max_len=11\)'),
        ((1, 4, 8), INDEX - 1, ValueError, 'index must be at least 0, got -1'),
        ((1, 4, 8), INDEX.float(), TypeError, 'got torch.float32'),
        ((1, 4, 8), [[0, 1, 2, 3]], TypeError, 'got list'),
        ((1, 4, 8), INDEX[0], ValueError, r'shape \[B, T\], got \[4\]'),
        ((1, 4, 7), INDEX, ValueError, r'\[B, T, 8\], got \[1, 4, 7\]'),
        ((4, 8), INDEX, ValueError, r'\[B, T, 8\], got \[4, 8\]'),
    ],
)
def test_tables_refuse(kind, x, index, error, message):
    with pytest.raises(error, match=message):
        kind(8, max_len=10).embed(torch.zeros(x), index)


@pytest.mark.parametrize('kind', ['sinusoidal', 'learned'])
def test_the_table_ends_for_a_decoder_too(kind):
    positions = make_positions(kind, D, H, max_len=6)
    sizes = dict(input_dim=D, num_heads=H, dim_feedforward=8)
    model = TransformerDecoder(1, positions=positions, **sizes)
    cache, x = KVCache(), torch.zeros(1, 6, D)
    with evaluating(model):
        model(x, cache=cache)
        with pytest.raises(ValueError, match='position 6, but .* max_len=6'):
            model(x[:, :1], cache=cache)
        assert cache.length == 6  # as it was
        real = torch.arange(9)[None] >= 3  # three of padding and six real
        model(torch.zeros(1, 9, D), key_padding_mask=real)


def test_others_refuse():
    x = torch.zeros(1, H, 4, 6)
    with pytest.raises(ValueError, match=re.escape('[B, H, T, 8]')):
        Rotary(8).rotate(x, INDEX)
    with pytest.raises(TypeError, match='got torch.float32'):
        Rotary(6).rotate(x, INDEX.float())
    for kind in (ALiBi(2), RelativeBias(2)):
        with pytest.raises(TypeError, match='query_index .*got torch.float32'):
            kind.bias(INDEX.float(), INDEX)
        with pytest.raises(ValueError, match='key_index must have the shape'):
            kind.bias(INDEX, INDEX[0])


def test_randomised_refuses_in_training_only(x):
    model = build('rotary randomised').train()
    cache = KVCache()
    model(x, cache=cache)
    with pytest.raises(ValueError, match='call model.eval'):
        model(x, cache=cache)
    model.positions.draw_from = T - 1
    with pytest.raises(ValueError, match=f'sequences of {T} tokens .*draw_from={T - 1}'):
        model(x)
    model.eval()(x)
