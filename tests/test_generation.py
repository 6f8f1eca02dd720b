"""One property for each kind of position, knobs at their ends, beams against all texts."""

import itertools

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

from transformers_tut.decoder import Positions, TransformerDecoder
from transformers_tut.generation import (
    KVCache,
    LanguageModel,
    beam_search,
    generate,
    token_probabilities,
)
from transformers_tut.positions import Learned

KINDS = ['sinusoidal', 'learned', 'rotary', 'alibi', 'relative', 'none']
V = 11


def made(kind='rotary', **args):
    torch.manual_seed(0)
    return LanguageModel(V, 16, 4, 2, positions=kind, **args).eval()


def prompts(B=3, T=5, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def plain(model, tokens, steps):
    "Greedy, without a cache."
    with torch.no_grad():
        for _ in range(steps):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens


def test_same_cache():
    import transformers_tut.decoder as decoder

    assert KVCache is decoder.KVCache


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('kv', [None, 2, 1])
def test_one_property(kind, kv):
    model, tokens = made(kind, num_kv_heads=kv), prompts(T=12)
    full = model(tokens)
    assert full.shape == (3, 12, V)
    for sizes in [[1] * 12, [9, 3], [3, 9], [11, 1]]:
        cache = KVCache()
        out = torch.cat([model(piece, cache=cache) for piece in tokens.split(sizes, 1)], 1)
        assert_close(out, full, atol=1e-5, rtol=0)
    for i in range(3):
        assert_close(model(tokens[i : i + 1]), full[i : i + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('left', [True, False])
def test_padded_batches_are_their_texts(kind, left):
    "Prompts of different lengths: each goes on as it does alone."
    model, texts = made(kind, num_kv_heads=2), [prompts(1, n, n) for n in (1, 4, 7)]
    tokens, real = torch.full((3, 8), 5), torch.zeros(3, 8, dtype=torch.bool)
    for i, text in enumerate(texts):
        n = text.shape[1]
        place = slice(8 - n, 8) if left else slice(0, n)
        tokens[i, place], real[i, place] = text[0], True
    alone = torch.cat([plain(model, text, 9)[:, -9:] for text in texts])
    for mask in [real, real.int()]:
        out = generate(model, tokens, 9, temperature=0, key_padding_mask=mask)
        assert torch.equal(out[:, :8], tokens) and torch.equal(out[:, 8:], alone)
    out, total = beam_search(model, tokens, 9, num_beams=3, key_padding_mask=real)
    for i, text in enumerate(texts):
        one, log_p = beam_search(model, text, 9, num_beams=3)
        assert torch.equal(one[0, -9:], out[i, -9:])
        assert_close(log_p[0], total[i])


def test_greedy_is_greedy():
    model, tokens = made(dropout=0.5).train(), prompts()
    out = generate(model, tokens, 8, temperature=0)
    assert model.training and model.decoder.layers[0].training
    assert torch.equal(out, plain(model.eval(), tokens, 8))
    assert torch.equal(out, generate(model, tokens, 8, top_k=1))
    assert torch.equal(out, generate(model, tokens, 8, top_p=1e-6))
    assert torch.equal(out, generate(model, tokens, 8, temperature=1e-30))
    assert torch.equal(out, beam_search(model, tokens, 8, num_beams=1)[0])
    assert torch.equal(
        out, generate(model, generate(model, tokens, 3, temperature=0), 5, temperature=0)
    )
    assert torch.equal(tokens, generate(model, tokens, 0))


def test_generating_twice():
    model, tokens = made(), prompts()
    g = torch.Generator()
    first, second = (generate(model, tokens, 20, generator=g.manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, generate(model, tokens, 20, generator=g))
    state = torch.get_rng_state()
    generate(model, tokens, 20, generator=g)
    generate(model, tokens, 20, temperature=0)
    assert torch.equal(state, torch.get_rng_state())


class Cycle(nn.Module):
    "After token t comes (t + 1) mod V, always."

    def forward(self, tokens, key_padding_mask=None, cache=None):
        return 20.0 * nn.functional.one_hot((tokens + 1) % V, V).float()


def test_ends():
    tokens = torch.tensor([[1], [5], [7]])
    out = generate(Cycle(), tokens, 20, temperature=0, eos_id=8)
    assert out.tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [5, 6, 7, 8, 8, 8, 8, 8],
        [7, 8, 8, 8, 8, 8, 8, 8],
    ]
    assert torch.equal(out, beam_search(Cycle(), tokens, 20, num_beams=1, eos_id=8)[0])
    assert generate(Cycle(), tokens, 3, temperature=0, eos_id=8).shape == (3, 4)
    assert generate(Cycle(), torch.tensor([[8]]), 2, temperature=0, eos_id=8).tolist() == [
        [8, 9, 10]
    ]
    assert generate(Cycle(), torch.zeros(0, 3, dtype=torch.long), 5).shape[0] == 0


def test_draws_follow_the_probabilities():
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])

    class Fixed(nn.Module):
        def forward(self, tokens, key_padding_mask=None, cache=None):
            return p.log().expand(*tokens.shape, 4)

    g = torch.Generator().manual_seed(0)
    for knobs in [
        {},
        dict(top_k=3),
        dict(top_p=0.6),
        dict(temperature=2.0),
        dict(temperature=0.5, top_k=3, top_p=0.8),
    ]:
        drawn = generate(Fixed(), torch.zeros(20_000, 1, dtype=torch.long), 1, generator=g, **knobs)
        share = drawn[:, 1].bincount(minlength=4) / 20_000
        expected = token_probabilities(p.log(), **knobs)
        assert (share - expected).abs().max() < 0.015  # four standard errors
        assert (share[expected == 0] == 0).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_knobs(dtype):
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    for k in range(1, 60, 7):
        probs = token_probabilities(logits, top_k=k)
        assert ((probs > 0).sum(-1) == min(k, 50)).all()
        assert_close(probs.float().sum(-1), torch.ones(2, 3), atol=0.02, rtol=0)
    for p in [0.01, 0.3, 0.9, 0.999]:
        kept = token_probabilities(logits.double(), top_p=p) > 0
        whole = logits.double().softmax(-1)
        mass = (whole * kept).sum(-1)
        least = whole.masked_fill(~kept, 2).amin(-1)
        assert (mass >= p).all() and (mass - least < p).all()
    ties = token_probabilities(torch.zeros(6), top_k=2)
    assert (ties > 0).sum() == 2
    banned = torch.tensor([0.0, -torch.inf, 0.0])
    with pytest.raises(ValueError, match='logits hold NaN'):
        token_probabilities(torch.full((3,), -torch.inf))
    for t in [0, 1e-30, 0.5, 1, 1e30]:
        assert token_probabilities(banned, temperature=t)[1] == 0


def test_beams_find_the_best_of_all():
    model, tokens = made(), prompts()
    texts = torch.tensor(list(itertools.product(range(V), repeat=3)))
    found, total = beam_search(model, tokens, 3, num_beams=V**2)
    for i in range(3):
        whole = torch.cat([tokens[i].expand(len(texts), -1), texts], 1)
        with torch.no_grad():
            said = model(whole[:, :-1]).log_softmax(-1)[:, 4:]
        log_p = said.gather(-1, texts.unsqueeze(-1)).sum((1, 2))
        assert torch.equal(texts[log_p.argmax()], found[i, 5:])
        assert_close(log_p.max(), total[i])


def test_beams_and_length():
    "A text that ends early is likelier; with a penalty the longer one wins."
    rows = torch.tensor([[0, 0.45, 0.55, 0], [0, 0.55, 0, 0.45], [0, 0, 0, 1.0], [0, 0, 0, 1.0]])

    class Table(nn.Module):
        def forward(self, tokens, key_padding_mask=None, cache=None):
            return rows[tokens].log()

    start = torch.zeros(1, 1, dtype=torch.long)
    text, total = beam_search(Table(), start, 4, num_beams=4, eos_id=3)
    assert text[0, :3].tolist() == [0, 2, 3]
    assert_close(total.exp(), torch.tensor([0.55]))
    long, total = beam_search(Table(), start, 4, num_beams=4, eos_id=3, length_penalty=3.0)
    assert long[0].tolist() == [0, 1, 1, 1, 1]
    assert_close(total.exp(), torch.tensor([0.45 * 0.55**3]))


class Translator(nn.Module):
    "A decoder with a context, called as a language model is."

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, 16)
        args = dict(input_dim=16, num_heads=4, dim_feedforward=24, context_dim=6)
        self.decoder = TransformerDecoder(2, **args)
        self.output = nn.Linear(16, V)

    def forward(self, tokens, context, context_padding_mask=None, **options):
        options['context_padding_mask'] = context_padding_mask
        return self.output(self.decoder(self.embedding(tokens), context, **options))


def test_inputs_go_along():
    "A context and its padding, in sampling and in beams: as each text alone."
    torch.manual_seed(0)
    model, tokens, context = Translator().eval(), prompts(), torch.randn(3, 4, 6)
    real = torch.arange(4) < torch.tensor([[4], [2], [1]])
    inputs = dict(context=context, context_padding_mask=real)
    greedy = generate(model, tokens, 7, temperature=0, **inputs)
    beams, total = beam_search(model, tokens, 7, num_beams=5, **inputs)
    assert inputs['context'] is context
    for i, n in enumerate([4, 2, 1]):
        row = slice(i, i + 1)
        alone = dict(context=context[row, :n])
        assert torch.equal(greedy[row], generate(model, tokens[row], 7, temperature=0, **alone))
        one, log_p = beam_search(model, tokens[row], 7, num_beams=5, **alone)
        assert torch.equal(one, beams[row])
        assert_close(log_p, total[row])


def test_longest_text():
    "All rows of a table of positions can be used, and padding takes none."
    model = made(Learned(16, max_len=6))
    assert (model.max_len, made().max_len) == (6, None)
    assert generate(model, prompts(T=4), 3).shape == (3, 7)  # the last token is not read
    with pytest.raises(ValueError, match='the model reads at most 6'):
        generate(model, prompts(T=4), 4)
    real = torch.arange(8) >= 4
    out = generate(model, prompts(T=8), 3, key_padding_mask=real.expand(3, 8))
    assert out.shape == (3, 11)


def test_start():
    "Logits that say nothing yet, whatever the width, and embeddings of size 0.3."
    for D in [16, 96]:
        torch.manual_seed(0)
        model = LanguageModel(40, D, 4, 2)
        tokens = torch.randint(40, (8, 30))
        loss = nn.functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
        assert abs(loss.item() - 3.69) < 0.5
        assert abs(model.embedding.weight.std().item() - 0.3) < 0.03


IDS = torch.zeros(2, 3, dtype=torch.long)
NONE = torch.zeros(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ('args', 'options', 'error', 'message'),
    [
        (([[0, 1]], 5), {}, TypeError, 'tokens must be a tensor, got list'),
        ((IDS.float(), 5), {}, TypeError, 'tokens must be integers'),
        ((IDS.bool(), 5), {}, TypeError, 'tokens must be integers'),
        ((IDS[0], 5), {}, ValueError, r'shape \[B, T\], got \[3\]'),
        ((IDS[:, :0], 5), {}, ValueError, 'at least one token each'),
        ((IDS + V, 5), {}, ValueError, r'in 0 .. 10, got 11 .. 11'),
        ((IDS - 1, 5), {}, ValueError, r'in 0 .. 10, got -1 .. -1'),
        ((IDS, -1), {}, ValueError, 'max_new_tokens must be at least 0'),
        ((IDS, 2.0), {}, TypeError, 'max_new_tokens must be an integer'),
        ((IDS, 5), dict(eos_id=V), ValueError, 'eos_id must be below 11, got 11'),
        ((IDS, 5), dict(eos_id='$'), TypeError, 'eos_id must be an integer'),
        ((IDS, 5), dict(key_padding_mask=NONE), ValueError, 'without a real token'),
        ((IDS, 5), dict(key_padding_mask=NONE[:, :2]), ValueError, r'\[B, T\] = \[2, 3\]'),
        ((IDS, 5), dict(key_padding_mask=NONE.float()), TypeError, 'boolean or 0/1'),
    ],
)
def test_prompts_refused(args, options, error, message):
    for write in [generate, beam_search]:
        with pytest.raises(error, match=message):
            write(made(), *args, **options)


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(temperature=-0.1), ValueError, 'temperature must be at least 0'),
        (dict(temperature=float('inf')), ValueError, 'temperature must be finite'),
        (dict(temperature=float('nan')), ValueError, 'temperature must be at least 0'),
        (dict(temperature='hot'), TypeError, 'temperature must be a number'),
        (dict(temperature=None), TypeError, 'temperature must be a number'),
        (dict(top_k=-1), ValueError, 'top_k must be at least 0'),
        (dict(top_k=2.5), TypeError, 'top_k must be an integer'),
        (dict(top_p=0.0), ValueError, 'top_p must be positive'),
        (dict(top_p=1.1), ValueError, r'top_p must be in \(0, 1\]'),
    ],
)
def test_knobs_refused(options, error, message):
    with pytest.raises(error, match=message):
        generate(made(), IDS, 5, **options)
    with pytest.raises(error, match=message):
        token_probabilities(torch.zeros(3), **options)


def test_models_refused():
    broken = made()
    with torch.no_grad():
        broken.output.weight.fill_(float('nan'))
    for temperature in [0, 1]:
        with pytest.raises(ValueError, match='logits hold NaN'):
            generate(broken, IDS, 2, temperature=temperature)
    with pytest.raises(ValueError, match='logits hold NaN'):
        beam_search(broken, IDS, 2)
    with pytest.raises(ValueError, match='num_beams must be at least 1'):
        beam_search(made(), IDS, 2, num_beams=0)
    for args, message in [
        ((0, 16, 4, 2), 'vocab_size'),
        ((9, 0, 4, 2), 'model_dim'),
        ((9, 16, 4, 0), 'num_layers'),
    ]:
        with pytest.raises(ValueError, match=f'{message} must be at least 1'):
            LanguageModel(*args)
    with pytest.raises(ValueError, match='multiple of num_heads'):
        LanguageModel(9, 16, 3, 2)
    for kind in ['rope', 3, None]:
        with pytest.raises((TypeError, ValueError), match='sinusoidal'):
            LanguageModel(9, 16, 4, 2, positions=kind)
    assert isinstance(made('none').decoder.positions, Positions)
