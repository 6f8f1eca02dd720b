"""The encoder against PyTorch's; maps, whatever is attached to the model; what is refused."""

import copy

import pytest
import torch
import torch.nn as nn
from test_attention import CHANGES, CLOSE, with_grads
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from transformers_tut.attention import from_torch, to_torch
from transformers_tut.checks import evaluating
from transformers_tut.encoder import EncoderBlock, TransformerEncoder
from transformers_tut.fast import faster

ARGS = dict(input_dim=16, num_heads=4, dim_feedforward=32)
PAD = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()


@pytest.fixture(autouse=True)
def g():
    "A generator, and the same global random state for every test."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield torch.Generator().manual_seed(0)


@pytest.fixture
def x(g):
    return torch.randn(2, 6, 16, generator=g)


# The block and the stack


def test_names_and_order_of_sub_modules():
    block = EncoderBlock(8, 2, 16)
    kinds = [type(m) for m in block.linear_net]
    assert kinds == [nn.Linear, nn.Dropout, nn.ReLU, nn.Linear]
    names = ['self_attn', 'linear_net', 'norm1', 'norm2', 'dropout']
    assert [name for name, _ in block.named_children()] == names


def test_what_a_hook_was_handed_is_not_overwritten(x):
    block, seen = EncoderBlock(**ARGS), {}

    def keep(module, inputs, output):
        seen.update(kept=output, copy=output.clone())

    block.linear_net[0].register_forward_hook(keep)
    block(x)
    assert seen['kept'].min() < 0  # an in-place ReLU would have cut it at 0
    assert torch.equal(seen['kept'], seen['copy'])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('causal', [False, True])
def test_half_precision_with_a_sequence_of_padding(x, dtype, causal):
    half = TransformerEncoder(2, **ARGS, norm_first=True).to(dtype)
    pad = torch.tensor([[1] * 6, [0] * 6])
    out = half(x.to(dtype), key_padding_mask=pad, is_causal=causal)
    out.float().sum().backward()
    assert out.dtype == dtype and out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in half.parameters())


def test_gradients_by_finite_differences(g):
    tiny = TransformerEncoder(1, input_dim=4, num_heads=2, dim_feedforward=6).double()
    x = torch.randn(2, 3, 4, generator=g, dtype=torch.float64).requires_grad_()
    pad = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert torch.autograd.gradcheck(lambda x: tiny(x, key_padding_mask=pad), x)


@pytest.mark.parametrize('norm_first', [False, True])
def test_one_switch_gives_higher_derivatives(x, norm_first):
    encoder = TransformerEncoder(2, **ARGS, norm_first=norm_first)
    with sdpa_kernel(SDPBackend.MATH):
        _, derivative = jvp(encoder, (x,), (x,))
        y = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(encoder(y).pow(3).sum(), y, create_graph=True)
        grad.norm().backward()
    assert derivative.isfinite().all() and y.grad.isfinite().all()


@pytest.mark.parametrize('norm_first', [False, True])
def test_from_the_meta_device(x, norm_first):
    encoder = TransformerEncoder(2, **ARGS, norm_first=norm_first)
    with torch.device('meta'):
        bare = TransformerEncoder(2, **ARGS, norm_first=norm_first)
    assert bare(x.to('meta'), is_causal=True).is_meta
    loaded = copy.deepcopy(bare).to_empty(device='cpu')
    loaded.load_state_dict(encoder.state_dict(), strict=True)
    assert torch.equal(loaded(x), encoder(x))
    fresh = bare.to_empty(device='cpu')
    fresh.apply(lambda m: getattr(m, 'reset_parameters', lambda: None)())
    assert all(p.isfinite().all() for p in fresh.parameters())
    assert fresh.layers[1].self_attn.qkv_proj.bias.abs().max() == 0


@pytest.mark.parametrize('norm_first', [False, True])
@pytest.mark.parametrize(
    'masks',
    [
        dict(),
        dict(key_padding_mask=PAD, is_causal=True),
        dict(mask=PAD[:, None].int().expand(2, 6, 6)),
    ],
)
def test_compiles_as_one_graph(x, norm_first, masks):
    torch._dynamo.reset()
    encoder = TransformerEncoder(2, **ARGS, norm_first=norm_first)
    compiled = torch.compile(encoder, fullgraph=True, backend='aot_eager')
    out = compiled(x, **masks)
    assert_close(out, encoder(x, **masks), **CLOSE)
    out.sum().backward()
    maps = compiled(x, **masks, return_attention=True)[1]
    assert_close(maps, encoder(x, **masks, return_attention=True)[1], **CLOSE)


# Maps


def test_maps_leave_every_mode_as_it_was(x):
    encoder = TransformerEncoder(3, **ARGS, dropout=0.3, attention_dropout=0.2)
    encoder.layers[1].eval()  # a part that is frozen must stay so
    before = {name: m.training for name, m in encoder.named_modules()}
    maps = encoder.get_attention_maps(x, key_padding_mask=PAD)
    assert {name: m.training for name, m in encoder.named_modules()} == before
    again = encoder.get_attention_maps(x, key_padding_mask=PAD)
    assert all(torch.equal(a, b) for a, b in zip(maps, again))  # no dropout


def test_padding_may_hold_anything(g, x):
    encoder = TransformerEncoder(3, **ARGS)
    maps = encoder.get_attention_maps(x, key_padding_mask=PAD)
    noise = 50 * torch.randn(x.shape, generator=g)
    changed = torch.where(PAD[..., None], x, noise)
    for a, b in zip(maps, encoder.get_attention_maps(changed, key_padding_mask=PAD)):
        assert_close(a[1, :, :4], b[1, :, :4])


def test_maps_times_values_give_the_pass(x):
    encoder = TransformerEncoder(3, **ARGS).eval()
    maps = encoder.get_attention_maps(x, key_padding_mask=PAD)
    h = x
    for m, layer in zip(maps, encoder.layers):
        _, _, v = layer.self_attn.project(h)  # [B, H, T, d]
        attended = layer.self_attn.o_proj((m @ v).transpose(1, 2).flatten(2))
        h = layer.norm1(h + attended)
        h = layer.norm2(h + layer.linear_net(h))
    assert_close(h, encoder(x, key_padding_mask=PAD), **CLOSE)


@pytest.mark.parametrize('norm_first', [False, True])
@pytest.mark.parametrize('change', CHANGES)
def test_maps_are_those_of_the_pass_whatever_is_attached(x, change, norm_first):
    encoder = TransformerEncoder(2, **ARGS, norm_first=norm_first)
    before = encoder.get_attention_maps(x)
    for layer in encoder.layers:
        CHANGES[change](layer.self_attn)
    seen = []  # the weights that a hook on each layer is handed
    for layer in encoder.layers:
        layer.register_forward_hook(lambda m, i, out: seen.append(out[1]))
    maps = encoder.get_attention_maps(x)
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(maps, seen))
    h = x
    for m, layer in zip(maps, encoder.layers):
        _, _, v = layer.self_attn.project(layer.norm1(h) if norm_first else h)
        attended = layer.self_attn.o_proj((m @ v).transpose(1, 2).flatten(2))
        assert_close(attended, layer.self_attn(layer.norm1(h) if norm_first else h))
        h, _ = layer(h, return_attention=True)
    if change != 'weight norm':  # which changes the parameters, not their product
        assert (maps[0] - before[0]).abs().max() > 0.01


# The same as PyTorch's


@pytest.mark.parametrize('norm_first', [False, True])
@pytest.mark.parametrize('B, T, D, H', [(1, 1, 4, 1), (2, 5, 12, 3), (4, 4, 8, 4), (3, 9, 32, 8)])
def test_parity_with_torch(g, B, T, D, H, norm_first):
    ours = EncoderBlock(D, H, 2 * D, norm_first=norm_first)
    for name, p in ours.named_parameters():
        nn.init.normal_(p, mean=float('norm' in name), std=0.2, generator=g)
    theirs, x = to_torch(ours), torch.randn(B, T, D, generator=g)
    keep = torch.rand(B, H, T, T, generator=g) < 0.6
    keep |= torch.eye(T, dtype=torch.bool)  # elsewhere PyTorch's layer gives NaN
    pad = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    each_head = ~keep[:, :1].expand(B, H, T, T).flatten(0, 1)
    cases = [
        ({}, {}),
        (dict(mask=keep[0, 0]), dict(src_mask=~keep[0, 0])),
        (dict(mask=keep), dict(src_mask=~keep.flatten(0, 1))),
        (dict(mask=keep[:, 0]), dict(src_mask=each_head)),
        (dict(key_padding_mask=pad), dict(src_key_padding_mask=~pad)),
        (dict(is_causal=True), dict(src_mask=~causal)),
    ]
    for a, b in cases:  # PyTorch's masks are True where not to look
        assert_close(with_grads(ours, x, **a), with_grads(theirs, x, **b), **CLOSE)
    with evaluating(theirs):  # PyTorch's own fast path
        assert_close(theirs(x), ours(x), **CLOSE)


def test_gradients_of_weights_are_torchs(g):
    ours = EncoderBlock(8, 2, 16).double()
    theirs, x = to_torch(ours), torch.randn(2, 3, 8, generator=g, dtype=torch.float64)
    ours(x).pow(3).sum().backward()
    theirs(x).pow(3).sum().backward()
    for a, b in [('linear_net.0', 'linear1'), ('linear_net.3', 'linear2'), ('norm1', 'norm1')]:
        a, b = ours.get_submodule(a), theirs.get_submodule(b)
        assert_close(a.weight.grad, b.weight.grad)
    assert_close(ours.self_attn.o_proj.weight.grad, theirs.self_attn.out_proj.weight.grad)


@pytest.mark.parametrize('activation', ['relu', torch.relu, nn.ReLU()])
def test_layers_of_torch_with_all_their_options(x, activation):
    layer = nn.TransformerEncoderLayer(
        16, 4, 24, dropout=0.25, layer_norm_eps=1e-3, batch_first=True, activation=activation
    ).eval()
    block = from_torch(layer)
    assert (block.dropout.p, block.linear_net[1].p, block.self_attn.dropout) == (0.25,) * 3
    assert (block.norm1.eps, block.norm2.eps, block.training) == (1e-3, 1e-3, False)
    with torch.no_grad():
        assert_close(block(x), layer(x), **CLOSE)
    assert to_torch(block).norm2.eps == 1e-3


def test_each_part_keeps_its_options(x):
    block = EncoderBlock(**ARGS, dropout=0.1, attention_dropout=0.3)
    block.linear_net[1].p = 0.2
    block.norm1 = nn.LayerNorm(16, eps=1e-2, elementwise_affine=False)
    block.norm2 = nn.LayerNorm(16, bias=False)
    block.norm2.double()
    block.linear_net[0].weight.requires_grad_(False)
    block.dropout.eval()
    before = torch.get_rng_state()
    layer = to_torch(block)
    back = from_torch(layer)
    assert torch.equal(torch.get_rng_state(), before)  # no random numbers are drawn
    dropouts = layer.dropout, layer.dropout1, layer.dropout2, layer.self_attn.dropout
    assert [getattr(p, 'p', p) for p in dropouts] == [0.2, 0.1, 0.1, 0.3]
    assert [layer.training, layer.dropout1.training, layer.dropout.training] == [True, False, True]
    assert not layer.linear1.weight.requires_grad and layer.linear2.weight.requires_grad
    assert layer.norm2.weight.dtype == torch.float64
    assert layer.norm1.weight is None and layer.norm1.eps == 1e-2
    assert str(back) == str(block)
    for name, p in block.state_dict().items():
        assert torch.equal(back.state_dict()[name], p)
    block.norm2.float()
    block.eval()
    layer = to_torch(block)
    for grad in [True, False]:  # without gradients PyTorch would like its fast path
        with torch.set_grad_enabled(grad):
            assert_close(layer(x), block(x), **CLOSE)


def test_faster_dropout_becomes_plain():
    block = faster(EncoderBlock(**ARGS, dropout=0.1))
    layer = to_torch(block)
    assert {type(m) for m in (layer.dropout, layer.dropout1, layer.dropout2)} == {nn.Dropout}
    assert layer.dropout.p == 0.1


NOT_TAKEN = {
    'batch_first=False': lambda: nn.TransformerEncoderLayer(8, 2),
    'an activation other than relu': lambda: nn.TransformerEncoderLayer(
        8, 2, activation='gelu', batch_first=True
    ),
    'its activation is a LeakyReLU': lambda: nn.TransformerEncoderLayer(
        8, 2, activation=nn.LeakyReLU(), batch_first=True
    ),
    'bias=False': lambda: nn.TransformerEncoderLayer(8, 2, bias=False, batch_first=True),
}


@pytest.mark.parametrize('name', NOT_TAKEN)
def test_options_of_torch_that_are_refused(name):
    with pytest.raises(ValueError, match=name):
        from_torch(NOT_TAKEN[name]())


REPLACED = {
    'norm1': nn.BatchNorm1d(8),
    'norm2': nn.RMSNorm(8),
    'dropout': nn.AlphaDropout(0.1),
    'dropout1': nn.Dropout1d(0.1),
    'dropout2': nn.Identity(),
    'linear1': nn.Sequential(nn.Linear(8, 2048)),
    'linear2': nn.Bilinear(8, 8, 8),
}


@pytest.mark.parametrize('name', REPLACED)
def test_replaced_parts_of_torch_are_refused(name):
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    layer.set_submodule(name, REPLACED[name])
    with pytest.raises(ValueError, match=f'its {name} is a {type(REPLACED[name]).__name__}'):
        from_torch(layer)


def test_two_dropouts_do_not_fit_into_one():
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    layer.dropout1.p = 0.5
    with pytest.raises(ValueError, match='dropout1 unlike dropout2'):
        from_torch(layer)


OURS_CHANGED = {
    'linear_net.2 is a GELU': lambda b: b.set_submodule('linear_net.2', nn.GELU()),
    'linear_net.0 is a Dropout': lambda b: b.set_submodule(
        'linear_net', nn.Sequential(*[b.linear_net[i] for i in (1, 0, 2, 3)])
    ),
    'linear_net.4 is a Linear': lambda b: b.linear_net.append(nn.Linear(8, 8)),
    'norm1 is a RMSNorm': lambda b: b.set_submodule('norm1', nn.RMSNorm(8)),
    'dropout is a Dropout1d': lambda b: b.set_submodule('dropout', nn.Dropout1d()),
    'linear_net.3 has bias=False': lambda b: b.set_submodule(
        'linear_net.3', nn.Linear(16, 8, bias=False)
    ),
    'linear_net.3 has hooks': lambda b: b.linear_net[3].register_forward_hook(lambda *_: None),
    'self_attn has hooks': lambda b: b.self_attn.register_full_backward_hook(lambda *_: None),
    'self_attn.qkv_proj is a Parametrized': lambda b: CHANGES['a parametrisation'](b.self_attn),
    'self_attn.qkv_proj has hooks': lambda b: CHANGES['pruning'](b.self_attn),
}


@pytest.mark.parametrize('message', OURS_CHANGED)
def test_changed_blocks_are_refused(message):
    block = EncoderBlock(8, 2, 16)
    OURS_CHANGED[message](block)
    with pytest.raises(ValueError, match=f'EncoderBlock cannot be carried over: its {message}'):
        to_torch(block)


def test_stacks_are_carried_over_layer_by_layer(x):
    encoder = TransformerEncoder(2, **ARGS)
    with pytest.raises(TypeError, match='got TransformerEncoder'):
        to_torch(encoder)
    with pytest.raises(TypeError, match='got TransformerEncoder'):
        from_torch(nn.TransformerEncoder(to_torch(encoder.layers[0]), 2))
    stack = nn.Sequential(*map(to_torch, encoder.layers))
    assert_close(stack(x), encoder(x), **CLOSE)


# What is refused


def refused():
    encoder = TransformerEncoder(2, input_dim=8, num_heads=2, dim_feedforward=16)
    x, pad = torch.zeros(2, 3, 8), torch.ones(3, dtype=torch.bool)
    return [
        (lambda: EncoderBlock(8, 3, 16), 'embed_dim must be a multiple of num_heads'),
        (lambda: EncoderBlock(8, 2, 16, norm_first='post'), "True or False, got 'post'"),
        (lambda: EncoderBlock(8, 2, 0), 'dim_feedforward must be at least 1, got 0'),
        (lambda: EncoderBlock(8, 2, 16, dropout=1.5), 'dropout must be in [0, 1), got 1.5'),
        (
            lambda: EncoderBlock(8, 2, 16, attention_dropout=None),
            'attention_dropout must be a number, got None',
        ),
        (lambda: TransformerEncoder(0, **ARGS), 'num_layers must be at least 1, got 0'),
        (lambda: TransformerEncoder('2', **ARGS), "num_layers must be an integer, got '2'"),
        (lambda: TransformerEncoder(2, num_head=2), "unexpected keyword argument 'num_head'"),
        (lambda: encoder(x[..., :4]), 'x must have the shape [B, T, 8], got [2, 3, 4]'),
        (lambda: encoder(x.int()), 'got torch.int32'),
        (lambda: encoder(x, torch.zeros(3, 3)), 'True = attend, got torch.float32'),
        (lambda: encoder(x, torch.ones(2, 3) > 0), 'goes into key_padding_mask'),
        (
            lambda: encoder.get_attention_maps(x, key_padding_mask=pad),
            'key_padding_mask must have the shape [B, Tk]',
        ),
        (
            lambda: encoder(x, torch.ones(3, 3, device='meta') > 0),
            'mask must be where the queries are, on cpu, but is on meta',
        ),
    ]


@pytest.mark.parametrize('case', range(len(refused())))
def test_refused(case):
    call, message = refused()[case]
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize('method', ['forward', '_sa_block', '_ff_block'])
def test_a_method_exchanged_on_the_layer_is_refused(method):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    setattr(layer, method, lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match=f'has a {method} of its own'):
        from_torch(layer)
