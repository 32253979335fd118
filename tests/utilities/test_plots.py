"""Figures of gains and errors show the right values, in text that can be read."""

import math
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.text import Text

from lightning_logme.utilities import plots

UNIT = "gain in nats per sample"
ODD_NAMES = ["$x_1$", "_hidden", "n" * 200, "a\x1b[31m\nb", "", r"\frac{"]


def rendered(figure):
    """Draw a figure as TensorBoard does. Warnings are errors, such as the warning of a collapsed layout."""
    FigureCanvasAgg(figure).draw()
    return figure


def only_axes(figure):
    (axes,) = rendered(figure).axes
    return axes


def tick_labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def bar_heights(axes):
    (bars,) = (patch for patch in axes.patches if isinstance(patch, StepPatch))
    return bars.get_data().values[::2].tolist()


def inside(figure):
    """Return whether nothing is cut off: the pixels at the border are white."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    return all((strip == 255).all() for strip in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]))


def test_gain_by_output_has_a_bar_per_output_and_a_labelled_mean():
    axes = only_axes(plots.gain_by_output([0.1, 0.4, 0.25], 0.25, 500, ["cat", "dog", "cow"]))
    assert axes.get_title() == "gain by output (n = 500)"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("output", UNIT)
    assert tick_labels(axes.xaxis) == ["cat", "dog", "cow"]
    assert axes.get_xticks().tolist() == [0, 1, 2]
    assert bar_heights(axes) == [0.1, 0.4, 0.25]
    (line,) = axes.lines
    assert list(line.get_ydata()) == [0.25, 0.25]
    assert [text.get_text() for text in axes.texts] == ["mean\n0.250"]


def test_gain_by_output_names_what_an_output_is():
    axes = only_axes(plots.gain_by_output([0.1, 0.4], 0.25, 500, ["cat", "dog"], output="class"))
    assert (axes.get_title(), axes.get_xlabel()) == ("gain by class (n = 500)", "class")


def text_sizes(figure):
    """Return the height of each visible text, in pixels of a figure that is shown 330 pixels wide."""
    scale = 330 / (figure.get_figwidth() * 72)
    return {text.get_text(): text.get_size() * scale for text in figure.findobj(Text) if text.get_text()}


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plots.gain_by_output([0.1] * 10, 0.1, 500, list("0123456789"), "class"),
        lambda: plots.gain_by_layer([f"layer{index}" for index in range(1, 5)], [[0.1] * 4, [0.2] * 4]),
        lambda: plots.by_samples({"head": [(2**i, 0.1 * i) for i in range(5, 14)]}),
        lambda: plots.confusion([[1] * 4] * 4, 0.1, 0.1, list("abcd")),
    ],
)
def test_text_can_be_read_on_a_card_of_tensorboard(figure):
    sizes = text_sizes(rendered(figure()))
    assert len(sizes) >= 6
    assert min(sizes.values()) > 10


@pytest.mark.parametrize(("number", "named"), [(3, False), (41, True), (1000, True)])
def test_outputs_without_names_or_more_than_40_are_numbered(number, named):
    names = [f"class {index}" for index in range(number)] if named else None
    axes = only_axes(plots.gain_by_output([0.1] * number, 0.1, 500, names))
    ticks = [tick for tick in axes.get_xticks() if 0 <= tick < number]
    assert 3 <= len(ticks) <= 12
    assert all(tick == int(tick) for tick in ticks)
    assert len(bar_heights(axes)) == number


def test_gain_by_output_leaves_out_nan():
    axes = only_axes(plots.gain_by_output([0.1, math.nan, math.inf], math.nan, 5, list("abc")))
    assert bar_heights(axes) == pytest.approx([0.1, math.nan, math.nan], nan_ok=True)
    assert not axes.lines
    assert tick_labels(axes.xaxis) == list("abc")


def test_gain_by_layer_has_a_line_per_validation_and_the_last_is_black():
    axes = only_axes(plots.gain_by_layer(["net.a.0", "net.a.1", "net.b"], [[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]]))
    assert axes.get_title() == "gain by layer (black: newest of 2)"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", UNIT)
    assert tick_labels(axes.xaxis) == ["a.0", "a.1", "b"]
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]]
    assert [float(line.get_color()) for line in axes.lines] == [0.425, 0]


def test_gain_by_layer_shows_the_newest_50_validations():
    axes = only_axes(plots.gain_by_layer(["a", "b"], [[index, index] for index in range(60)]))
    assert [line.get_ydata()[0] for line in axes.lines] == list(range(10, 60))
    shades = [float(line.get_color()) for line in axes.lines]
    assert shades == sorted(shades, reverse=True)
    assert axes.get_title() == "gain by layer (black: newest of 60)"


def test_gain_by_layer_leaves_out_nan():
    axes = only_axes(plots.gain_by_layer(["a", "b", "c"], [[0.1, math.nan, 0.3], [math.nan] * 3]))
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 2], []]
    assert tick_labels(axes.xaxis) == ["a", "b", "c"]


def test_gain_by_layer_names_at_most_40_layers():
    axes = only_axes(plots.gain_by_layer([f"layer{index}" for index in range(100)], [[0.1] * 100]))
    assert tick_labels(axes.xaxis) == [f"layer{index}" for index in range(0, 100, 3)]
    assert axes.get_xticks().tolist() == list(range(0, 100, 3))


def test_by_samples_has_a_line_and_a_legend_entry_per_curve():
    curves = {"small": [(64, 0.1), (128, 0.2), (4096, 0.3)], "large": [(64, 0.2), (128, math.nan), (256, 0.4)]}
    axes = only_axes(plots.by_samples(curves, unfinished={"large"}))
    assert axes.get_title() == "gain by number of samples"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("samples (dashed: not finished)", UNIT)
    assert axes.get_xscale() == "log"
    ticks = set(tick_labels(axes.xaxis))
    assert ticks <= {str(2**power) for power in range(20)}
    assert len(ticks & {"64", "128", "256", "512", "1024", "2048", "4096"}) >= 3
    assert [list(line.get_xdata()) for line in axes.lines] == [[64, 128, 4096], [64, 256]]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--"]
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["small", "large"]
    assert legend.get_window_extent().x0 > axes.get_window_extent().x1
    assert only_axes(plots.by_samples(curves)).get_xlabel() == "samples"


def test_by_samples_labels_a_narrow_range_with_plain_numbers():
    axes = only_axes(plots.by_samples({"head": [(100, 0.1), (150, 0.2), (200, 0.3)]}))
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [100, 125, 150, 175, 200]
    assert {"100", "200"} <= set(tick_labels(axes.xaxis))


def test_by_samples_lists_at_most_40_curves():
    axes = only_axes(plots.by_samples({f"model {index}": [(64, 0.1), (128, 0.2)] for index in range(50)}))
    assert len(axes.lines) == 50
    assert len(axes.get_legend().get_texts()) == 40
    assert axes.get_legend().get_title().get_text() == "first 40 of 50"


def test_by_candidate_has_the_first_at_the_top_and_ties_dark():
    axes = only_axes(
        plots.by_candidate(
            ["first", "second", "failed", "third"],
            [0.4, 0.39, math.nan, 0.1],
            [0.02, math.nan, math.nan, 0.01],
            [True, True, False, False],
        )
    )
    assert axes.get_title() == "gain by candidate (dark: best and ties)"
    assert axes.get_xlabel() == f"{UNIT},\n± 1 standard error"
    assert tick_labels(axes.yaxis) == ["first", "second", "third"]
    bars = axes.patches
    assert [bar.get_width() for bar in bars] == [0.4, 0.39, 0.1]
    heights = [axes.transData.transform(bar.get_center())[1] for bar in bars]
    assert heights == sorted(heights, reverse=True)
    first, second, third = (to_hex(bar.get_facecolor()) for bar in bars)
    assert first == second != third
    (errors,) = axes.collections
    lengths = [path.vertices[1, 0] - path.vertices[0, 0] for path in errors.get_paths() if len(path.vertices)]
    assert [length for length in lengths if length == length] == pytest.approx([0.04, 0.02])


@pytest.mark.parametrize(
    ("what", "label"),
    [
        ("gain", UNIT),
        ("accuracy", "leave-one-out accuracy"),
        ("r2", "leave-one-out R²"),
        ("f1", "leave-one-out macro F1"),
    ],
)
def test_axes_of_candidates_and_curves_name_the_value(what, label):
    bars = only_axes(plots.by_candidate(["a"], [0.5], [0.1], [True], what))
    lines = only_axes(plots.by_samples({"a": [(64, 0.5)]}, what=what))
    assert bars.get_xlabel() == f"{label},\n± 1 standard error"
    assert lines.get_ylabel() == label
    assert bars.get_title().startswith(what)
    assert lines.get_title().startswith(what)


def test_page_holds_two_figures_and_the_table():
    table = "rank  name\n1     $a_1$\x1b"
    figure = rendered(
        plots.page(
            lambda axes: plots.by_candidate(["a"], [0.1], [0.01], [True], axes=axes),
            lambda axes: plots.by_samples({"a": [(64, 0.1), (128, 0.2)]}, axes=axes),
            table,
        )
    )
    left, right = figure.axes
    assert left.get_title().startswith("gain by candidate")
    assert right.get_title() == "gain by number of samples"
    (text,) = figure.subfigs[1].texts
    assert text.get_text() == "rank  name\n1     $a_1$?"
    assert (text.get_fontfamily(), text.get_parse_math()) == (["monospace"], False)
    assert text.get_window_extent().y1 < min(axes.get_window_extent().y0 for axes in figure.axes)


@pytest.mark.parametrize("lines", [0, 1, 60])
def test_page_shows_all_of_its_table(lines):
    names = [f"candidate {index} " + "x" * 20 for index in range(lines)]
    figure = plots.page(
        lambda axes: plots.by_candidate(names, [0.1] * lines, [0.01] * lines, [True] * lines, axes=axes),
        lambda axes: plots.by_samples({name: [(64, 0.1)] for name in names}, axes=axes),
        "\n".join(name * 5 for name in names),
    )
    assert inside(figure)


def test_figures_draw_into_given_axes_and_return_the_figure_at_the_top():
    top = Figure()
    axes = top.subfigures(1, 2)[0].subfigures(2, 1)[0].subplots()
    assert plots.gain_by_output([0.1], 0.1, 5, axes=axes) is top
    assert plots.confusion([[1]], 1.0, 0.0, axes=axes) is top
    assert plots.gain_by_layer(["a"], [[0.1]], axes=axes) is top
    assert plots.by_samples({"a": [(64, 0.1)]}, axes=axes) is top
    assert plots.by_candidate(["a"], [0.1], [0.1], [True], axes=axes) is top


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plots.gain_by_output([], math.nan, 0),
        lambda: plots.gain_by_output([], math.nan, 0, []),
        lambda: plots.gain_by_output([math.nan], math.nan, 0),
        lambda: plots.gain_by_output([0.0, 0.0], 0.0, 10),
        lambda: plots.gain_by_layer([], []),
        lambda: plots.gain_by_layer(["a"], []),
        lambda: plots.by_samples({}),
        lambda: plots.by_samples({"a": []}),
        lambda: plots.by_samples({"a": [(0, 0.1), (64, math.nan)]}),
        lambda: plots.by_samples({"a": [(64, 0.1)]}),
        lambda: plots.by_candidate([], [], [], []),
        lambda: plots.by_candidate(["a"], [math.nan], [math.nan], [False]),
    ],
)
def test_figures_of_nothing_have_axes_with_labels(figure):
    axes = only_axes(figure())
    assert axes.get_title()
    assert UNIT in axes.get_xlabel() + axes.get_ylabel()


@pytest.mark.parametrize(
    ("figure", "labels"),
    [
        (lambda names: plots.gain_by_output([0.1] * 6, 0.1, 5, names), lambda axes: axes.get_xticklabels()),
        (lambda names: plots.confusion([[1] * 6] * 6, 0.1, 0.1, names), lambda axes: axes.get_yticklabels()),
        (lambda names: plots.gain_by_layer(names, [[0.1] * 6]), lambda axes: axes.get_xticklabels()),
        (
            lambda names: plots.by_samples({name: [(64, 0.1)] for name in names}),
            lambda axes: axes.get_legend().get_texts(),
        ),
        (
            lambda names: plots.by_candidate(names, [0.1] * 6, [0.1] * 6, [True] * 6),
            lambda axes: axes.get_yticklabels(),
        ),
    ],
)
def test_names_are_shown_as_written_in_one_line_and_shortened(figure, labels):
    texts = labels(only_axes(figure(ODD_NAMES)))
    assert not any(text.get_parse_math() for text in texts)
    shown = [text.get_text().strip() for text in texts]
    assert shown[:2] == ODD_NAMES[:2]
    assert set(shown[2]) == {"n", "…"}
    assert len(shown[2]) <= 36
    assert shown[3:] == ["a?[31m b", "", r"\frac{"]


def test_shortened_names_keep_both_ends():
    labels = tick_labels(only_axes(plots.gain_by_layer([f"{i}.{'x' * 50}.norm{i}" for i in range(2)], [[1, 2]])).xaxis)
    assert labels == ["0.xxxxxxxxx…xxxxxx.norm0", "1.xxxxxxxxx…xxxxxx.norm1"]


CONFUSION = [[6, 1, 1], [0, 4, 0], [0, 0, 0]]


def test_confusion_has_a_row_per_class_with_percentages():
    axes = only_axes(plots.confusion(CONFUSION, 0.8333, 0.05, ["cat", "dog", "cow"]))
    assert axes.get_title() == "accuracy 0.833 ± 0.050"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class (% of the class)", "class")
    assert tick_labels(axes.xaxis) == tick_labels(axes.yaxis) == ["cat", "dog", "cow"]
    (image,) = axes.images
    assert np.square(image.get_array()).tolist() == pytest.approx(np.array([[0.75, 0.125, 0.125], [0, 1, 0], [0] * 3]))
    written = {(text.get_position(), text.get_text(), text.get_color()) for text in axes.texts}
    black = {((1, 0), "12", "black"), ((2, 0), "12", "black")}
    assert written == {((0, 0), "75", "white"), ((1, 1), "100", "white")} | black


@pytest.mark.parametrize("number", [1, 10, 11, 30])
@pytest.mark.parametrize("named", [False, True])
def test_confusion_of_many_classes_has_colours_instead_of_percentages(number, named):
    names = [f"a class of a long name, {index}" for index in range(number)] if named else None
    figure = plots.confusion(np.eye(number, dtype=int).tolist(), 1.0, 0.0, names)
    assert inside(figure)
    axes = figure.axes[0]
    assert len(axes.texts) == (number if number <= 10 else 0)
    bars = [bar.get_ylabel() for bar in axes.child_axes]
    assert bars == ["share of the class"] * (number > 10)
    assert len(tick_labels(axes.yaxis)) == number
    extents = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(above.y0 >= below.y1 - 1 for above, below in pairwise(extents))


@pytest.mark.parametrize("number", [2, 9, 12, 40])
def test_long_names_stay_inside_and_apart(number):
    figure = plots.gain_by_output(
        [0.1] * number, 0.1, 5, [f"a class of a long name, {index}" for index in range(number)]
    )
    assert inside(figure)
    axes = figure.axes[0]
    # Slanted names need one line height between them, measured at a right angle to the text.
    angles = {label.get_rotation() for label in axes.get_xticklabels()}
    gap = axes.get_window_extent().width / (number + 0.2)
    if angles == {0}:
        assert max(label.get_window_extent().width for label in axes.get_xticklabels()) < gap
    else:
        (angle,) = angles
        assert gap * math.sin(math.radians(angle)) > 10 * figure.dpi / 72


def test_printable_replaces_control_characters_and_line_breaks():
    assert plots.printable("a\tb\n c\x00\x1b\u202e\ud800é") == "a b c????é"


def test_figures_need_no_pyplot():
    from matplotlib import pyplot

    known = pyplot.get_fignums()
    plots.gain_by_output([0.1], 0.1, 5)
    assert pyplot.get_fignums() == known
