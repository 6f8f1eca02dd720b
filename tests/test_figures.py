"""Maps, labels and images on their axes: what is drawn where, and what is refused."""

import io
import subprocess
import sys
import warnings
from base64 import b64decode

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from PIL import Image

from transformers_tut.figures import (
    COLOURS,
    arrow,
    as_images,
    as_labels,
    as_maps,
    box,
    diagram,
    house_style,
    map_grid,
    node,
    thumbnail,
)
from transformers_tut.maps import plot_attention_maps
from transformers_tut.viewer import attention_rollout, view_attention

T = 10
MARK = 6
g = torch.Generator().manual_seed(0)
PICTURES = torch.rand(T, 3, 32, 32, generator=g)
SQUARE = [torch.rand(4, T, T, generator=g).softmax(-1) for _ in range(2)]
WIDE = torch.rand(1, 2, 5, T, generator=g).softmax(-1)  # [B, H, Tq, Tk]
PILS = [Image.fromarray((255 * x).byte().movedim(0, -1).numpy()) for x in PICTURES]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


def thumbnails(ax):
    return ax.images[1:]  # the first is the map


def centre(image):
    left, right, low, high = image.get_extent()
    return round((left + right) / 2, 2), round((low + high) / 2, 2)


# Labels: text, whatever it holds

STRANGE = ['$$', '$', '$x', 'a$b$', '\\', '{', '%', '_', '^', '', 'é', '<b>']


def drawn_without_a_word(fig):
    "Draw a figure; not even a warning may come of it"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for kind in ['png', 'svg']:
            fig.savefig(io.BytesIO(), format=kind)


@pytest.mark.parametrize('side', ['keys', 'queries'])
def test_labels_and_titles_are_never_mathematics(side):
    n = len(STRANGE)
    maps = torch.rand(1, 1, n, n, generator=g)
    others = {'keys': list(range(n)), 'queries': list(range(n))}
    shown = others | {side: STRANGE}
    fig = plot_attention_maps(shown['keys'], maps, queries=shown['queries'], mark=0)
    drawn_without_a_word(fig)
    ax = fig.axes[0]
    labels = ax.get_xticklabels() if side == 'keys' else ax.get_yticklabels()
    assert [label.get_text() for label in labels] == STRANGE
    drawn_without_a_word(map_grid(maps, [['$$']], **{side: STRANGE}))
    drawn_without_a_word(view_attention(STRANGE, maps, title='$$').figure())


@pytest.mark.parametrize(
    'maps', [WIDE, [WIDE, WIDE.numpy()], WIDE[0].half(), WIDE.bfloat16(), WIDE.double()]
)
@pytest.mark.parametrize(
    'labels', [None, torch.arange(T).expand(1, T), list(range(T)), range(T), np.arange(T)]
)
def test_kinds_of_labels_and_maps(labels, maps):
    fig = plot_attention_maps(labels, maps, cmap='magma')
    assert isinstance(fig, Figure) and len(fig.axes) == len(as_maps(maps, 0)) * 2 + 1
    assert fig.axes[0].get_xticklabels()[3].get_text() == '3'
    assert fig.axes[0].images[0].get_cmap().name == 'magma'


def test_a_list_of_single_numbers_is_as_good_as_a_tensor():
    ids = torch.tensor([3, 5])
    assert as_labels(list(ids), 0, 2, 'x') == as_labels(ids, 0, 2, 'x') == ['3', '5']
    assert as_labels(list(np.array(['a', '$'])), 0, 2, 'x') == ['a', '$']


def test_idx_picks_the_map_and_its_labels():
    two = torch.cat([WIDE, WIDE.flip(-1)])
    fig = plot_attention_maps(torch.tensor([[0] * T, [9] * T]), two, idx=1)
    assert np.array_equal(fig.axes[0].images[0].get_array(), two[1, 0].numpy())
    assert fig.axes[0].get_xticklabels()[0].get_text() == '9'


def test_a_mark_among_words():
    fig = plot_attention_maps(list('abcdefghij'), WIDE, mark=2)
    frames = [t.get_bbox_patch() is not None for t in fig.axes[0].get_xticklabels()]
    assert frames == [i == 2 for i in range(T)]
    assert not any(t.get_bbox_patch() for t in fig.axes[0].get_yticklabels())


# Panels: one scale, and the picture is the tensor


def test_panels_and_their_scale():
    fig = plot_attention_maps(None, SQUARE)
    panels, bar = fig.axes[:-1], fig.axes[-1]
    top = max(m.max().item() for m in SQUARE)
    assert len(panels) == 8 and bar.get_ylabel() == 'attention weight'
    for i, ax in enumerate(panels):
        layer, head = divmod(i, 4)
        assert ax.get_title() == f'layer {layer + 1}, head {head + 1}'
        assert ax.images[0].get_clim() == (0, top)
        assert np.array_equal(ax.images[0].get_array(), SQUARE[layer][head].numpy())


# Images


@pytest.mark.parametrize(
    'data, tolerance',
    [
        (PICTURES[None], 0),
        (PICTURES, 0),
        (PICTURES.movedim(1, -1), 0),
        (PICTURES.movedim(1, -1).numpy(), 0),
        (list(PICTURES), 0),
        (list(PICTURES.movedim(1, -1).numpy()), 0),
        (PICTURES.half(), 1e-3),
        (PICTURES.bfloat16(), 1e-2),
        ((255 * PICTURES).byte(), 1 / 255),
        (PILS, 1 / 255),
    ],
)
def test_kinds_of_images(data, tolerance):
    images = as_images(data, 0, T, 'x')
    assert [(x.shape, x.dtype) for x in images] == T * [((32, 32, 3), np.float32)]
    assert np.abs(np.stack(images) - PICTURES.movedim(1, -1).numpy()).max() <= tolerance


def test_grey_images():
    for x, row in zip(as_images(PICTURES[:, 0], 0, T, 'x'), PICTURES[:, 0].numpy()):
        assert all(np.array_equal(x[..., c], row) for c in range(3))


NO_IMAGES = [None, ['a', 'b'], [1, 2], 'ab', [], [torch.tensor(1)], torch.zeros(2, 3), np.zeros(3)]


@pytest.mark.parametrize('labels', NO_IMAGES)
def test_what_holds_no_images(labels):
    assert as_images(labels, 0, 2, 'x') is None


def test_thumbnails():
    def opened(url):
        return Image.open(io.BytesIO(b64decode(url.split(',')[1])))

    picture = torch.rand(20, 30, 3, generator=g).numpy()
    small = np.array(opened(thumbnail(picture))) / 255
    assert np.abs(small - picture).max() <= 0.5 / 255 + 1e-6  # as it is
    assert opened(thumbnail(np.ones((300, 150, 3), np.float32))).size == (32, 64)


def test_images_stand_at_their_rows_and_columns():
    fig = plot_attention_maps(PICTURES, SQUARE, cell=0.18, mark=MARK)
    panels = fig.axes[:-1]
    for ax in panels:
        keys, queries = thumbnails(ax)[:T], thumbnails(ax)[T:]
        assert [centre(t) for t in keys] == [(i, 10.15) for i in range(T)]
        assert [centre(t) for t in queries] == [(-1.15, i) for i in range(T)]
        for side in (keys, queries):
            for image, picture in zip(side, PICTURES, strict=True):
                assert np.array_equal(image.get_array(), picture.movedim(0, -1))
        frames = [(MARK - 0.5, 9.65), (-1.65, MARK - 0.5)]
        assert [p.get_xy() for p in ax.patches] == frames
        # the map fills the panel, as without images
        assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, 9.5), (9.5, -0.5))

    # on the page: inside the figure, apart, equally large
    fig.canvas.draw()
    page = fig.bbox
    boxes = [t.get_window_extent() for ax in panels for t in thumbnails(ax)]
    for i, b in enumerate(boxes):
        assert page.x0 <= b.x0 and b.x1 <= page.x1 and page.y0 <= b.y0 and b.y1 <= page.y1
        assert not any(a.overlaps(b) for a in boxes[:i])
    assert np.ptp([b.width for b in boxes]) < 1e-6 and boxes[0].width > 10


def test_words_that_look_at_pictures_and_the_other_way_round():
    words = list('vwxyz')
    fig = plot_attention_maps(PICTURES[:, :, 4:28], WIDE, queries=words, mark=MARK)
    ax = fig.axes[0]
    assert (len(thumbnails(ax)), len(ax.patches)) == (T, 1)
    assert [t.get_text() for t in ax.get_yticklabels()] == words
    left, right, low, high = thumbnails(ax)[0].get_extent()
    assert (low - high) / (right - left) == pytest.approx(24 / 32)  # proportions are kept

    mixed = [PICTURES[0], PICTURES[1, 0], PICTURES[2].numpy()]
    fig = plot_attention_maps(list('abcdefghij'), WIDE[:, :, :3], queries=mixed)
    assert [centre(t) for t in thumbnails(fig.axes[0])] == [(-1.15, i) for i in range(3)]


def test_idx_picks_the_images():
    two = torch.stack([PICTURES, PICTURES.flip(0)])
    fig = plot_attention_maps(two, torch.rand(2, 1, T, T, generator=g), idx=1)
    first = thumbnails(fig.axes[0])[0].get_array()
    assert np.array_equal(first, PICTURES[-1].movedim(0, -1))


# What is refused, by figure and page alike

REFUSED = {
    'no maps': ((None, []), 'attn_maps must hold at least one map [B, H, Tq, Tk], got none'),
    'a string': ((None, 'maps'), 'attn_maps must be a list of tensors'),
    'two axes': ((None, torch.zeros(3, 3)), 'must have the shape [B, H, Tq, Tk] or [H, Tq, Tk]'),
    'no keys': ((None, WIDE[..., :0]), 'got maps of shape [2, 5, 0]'),
    'nan': ((None, WIDE * float('nan')), 'finite and not below 0, got nan'),
    'infinite': ((None, WIDE * float('inf')), 'finite and not below 0'),
    'below 0': ((None, WIDE - 1), 'finite and not below 0, got -'),
    'idx beyond': ((None, WIDE, 1), 'idx must be from 0 to 0'),
    'idx below': ((None, WIDE, -1), 'idx must be at least 0, got -1'),
    'idx below, no batch': ((None, WIDE[0], -1), 'idx must be at least 0, got -1'),
    'idx a float': ((None, WIDE, 0.0), 'idx must be an integer'),
    'two shapes': ((None, [WIDE, WIDE[..., :3]]), 'all layers must have maps of one shape'),
    'few labels': ((['a', 'b'], WIDE), 'input_data must have 10 labels, one for each token'),
    'a word': (('abcdefghij', WIDE), 'input_data must be a list of labels or images, a tensor'),
    'a number': ((7, WIDE), 'got int'),
    'one number': ((torch.tensor(7), WIDE), 'input_data must have 10 labels'),
    'one PIL image': ((PILS[0], WIDE), 'a list of labels or images, a tensor or None, got Image'),
    'one grey array': ((PICTURES[0, 0].numpy(), WIDE), 'got 32'),
    'few images': ((PICTURES[:3], WIDE), 'input_data must have 10 images, one for each element'),
    'no such set': (
        (torch.stack([PICTURES, PICTURES]), WIDE[0], 2),
        'input_data must have images for sequence 2, got 2 sequences',
    ),
    'no such ids': (
        (torch.zeros(2, T), WIDE[0], 2),
        'input_data must have labels for sequence 2, got 2 sequences',
    ),
    'two channels': ((PICTURES[:, :2], WIDE), 'got one of shape [2, 32, 32]'),
    'six axes': ((PICTURES[None, None], WIDE), 'must have 10 images'),
    'too bright': ((2 * PICTURES, WIDE), 'floats in [0, 1], got torch.float32 from'),
    'normalised': ((PICTURES - 1, WIDE), 'got torch.float32 from -'),
    'nan images': ((PICTURES * float('nan'), WIDE), 'from nan to nan'),
    'integers': ((PICTURES.long(), WIDE), 'uint8, or of floats in [0, 1], got torch.int64'),
    'a stranger': (([*PICTURES[:9], 'x'], WIDE), 'got 9 images among 10 elements'),
}


@pytest.mark.parametrize('function', [plot_attention_maps, view_attention])
@pytest.mark.parametrize('case', REFUSED)
def test_what_is_refused(case, function):
    arguments, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError)) as error:
        function(*arguments)
    assert message in str(error.value)


@pytest.mark.parametrize('function', [plot_attention_maps, view_attention])
@pytest.mark.parametrize(
    'options, message',
    [
        ({'mark': T}, 'mark must be a key from 0 to 9, or None, got 10'),
        ({'mark': -1}, 'mark must be at least 0, got -1'),
        ({'mark': True}, 'mark must be an integer'),
        ({'queries': ['a']}, 'queries must have 5 labels'),
    ],
)
def test_marks_and_queries_that_are_refused(options, message, function):
    with pytest.raises((TypeError, ValueError)) as error:
        function(None, WIDE, **options)
    assert message in str(error.value)


def test_a_cell_needs_a_size():
    with pytest.raises(ValueError, match='cell must be positive'):
        plot_attention_maps(None, WIDE, cell=0)


# Rollout and the size of a page


def test_rollout():
    maps = [torch.randn(2, 3, 5, 5, generator=g).softmax(-1) for _ in range(4)]
    torch.testing.assert_close(attention_rollout(maps).sum(-1), torch.ones(5))
    one = attention_rollout([m[1] for m in maps])
    torch.testing.assert_close(attention_rollout(maps, 1), one)
    single = (torch.eye(5) + maps[0][1].mean(0)) / 2
    torch.testing.assert_close(attention_rollout(maps[:1], 1), single)
    with pytest.raises(ValueError, match='at least one map'):
        attention_rollout([])


def test_a_page_stays_small():
    noise = torch.rand(T, 3, 224, 224, generator=g)  # what PNG is worst at
    maps = 4 * [torch.rand(4, T, T, generator=g)]
    assert len(view_attention(noise, maps).html.encode()) < 300_000


# Style and diagrams


def test_importing_changes_no_style():
    program = (
        'import matplotlib as m; before = dict(m.rcParams)\n'
        'import transformers_tut.viewer\n'
        'assert dict(m.rcParams) == before'
    )
    subprocess.run([sys.executable, '-c', program], check=True)


def test_the_style_is_transparent_and_has_the_house_colours():
    with plt.rc_context():
        house_style()
        fig, ax = plt.subplots()
        (line,) = ax.plot([0, 1])
        assert same_color(line.get_color(), COLOURS['query'])
        assert fig.get_facecolor()[3] == ax.get_facecolor()[3] == 0


def test_arrows_touch_the_boxes():
    ax = diagram((0, 6), (0, 4))
    low, high = box(ax, 2, 1, w=2, h=1), box(ax, 2, 3, w=2, h=1)
    right, beside = node(ax, 5, 3, r=0.25), box(ax, 2.5, 3, w=1, h=1)
    arrow(ax, low, high)
    arrow(ax, high, right)
    arrow(ax, low, right, via=[(5, 1)])
    arrow(ax, low, beside)
    ends = [(text.xyann, text.xy) for text in ax.texts if hasattr(text, 'xyann')]
    assert ends == [
        ((2, 1.5), (2, 2.5)),
        ((3, 3), (4.75, 3)),
        ((5, 1), (5, 2.75)),
        ((2.5, 1.5), (2, 2.5)),
    ]


def test_labels_of_a_sequence():
    assert as_labels(torch.tensor([[4, 5], [6, 7]]), 1, 2, 'x') == ['6', '7']
    assert as_labels(np.array([1.5, 2]), 0, 2, 'x') == ['1.5', '2.0']
