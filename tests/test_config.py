"""The configuration: what is refused, and that it survives being written and read."""

import dataclasses
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simplenet_lib.config import PRESETS, Config, SimpleNetError, preset

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

FIELDS = {field.name: str(field.type) for field in dataclasses.fields(Config)}
WRONG_TYPES = {
    "int": [1.0, "1", True, None, [1], math.nan],
    "float": ["0.5", False, None, [0.5], 1j],
    "bool": [0, 1, "true", None],
    "str": [1, None, b"fast", ["fast"]],
    "tuple[str, ...]": ["layer2", ["layer2"], None, 2, (), (2,), ("layer2", None)],
}
WRONG_VALUES = {
    "resize": [0, 31, -320, 8193],
    "crop": [0, 31, -1, 321],  # larger than the resized image of `fast`
    "ratio": [-0.1, 10.1],
    "neighbourhood": [0, 2, 4, -1, 17],
    "adaptor_channels": [0, 16385],
    "hidden_channels": [0, 16385],
    "adaptor_scale": [0, -1, 1e-7, 1e7],
    "fine_scale": [0, -2, 2e3],
    "sigma": [-0.1, 1e7],
    "emphasis": [-0.1, 8.1],
    "bound": [-0.1, 1e7],
    "margin": [-0.1, 1e7],
    "heads": [0, -1, 101],
    "steps": [0, -1, 10**9 + 1],
    "batch_size": [1, 2**20 + 1],  # BatchNorm needs two
    "adaptor_lr": [-1e-4, 11],
    "discriminator_lr": [-1e-4, 11],
    "averaging": [-0.1, 1, 0.99995],
    "smoothing": [-1, 101],
    "white": [-1, 2**32 + 1],
    "tile": [-1, 100, 8193],
    "false_alarms": [-0.1, 0.6],
    "seed": [-1, 2**31],
}


def test_every_number_has_limits():
    assert set(WRONG_VALUES) == {name for name in FIELDS if FIELDS[name] in ("int", "float")}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_carry_their_name(name):
    assert PRESETS[name].preset == name
    assert preset(name) == PRESETS[name] == Config(**dataclasses.asdict(PRESETS[name]))
    assert preset(name, seed=7) == dataclasses.replace(PRESETS[name], seed=7)


def test_a_bound_needs_the_unit_it_is_given_in():
    with pytest.raises(SimpleNetError, match="a bound needs position_units"):
        preset("fast", position_units=False)
    assert preset("fast", position_units=False, bound=0.0).bound == 0


def test_unknown_preset_lists_the_known():
    with pytest.raises(SimpleNetError, match="unknown preset 'fats'. Known: .*fast"):
        preset("fats")


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_types_are_refused_by_name(name):
    for value in WRONG_TYPES[FIELDS[name]]:
        with pytest.raises(SimpleNetError, match=f"configuration: {name}"):
            preset("fast", **{name: value})


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_values_out_of_range_are_refused_by_name(name):
    start = dataclasses.replace(PRESETS["fast"], resize=320, crop=320)
    wrong = WRONG_VALUES[name] + ([math.nan, math.inf, 10**400] if FIELDS[name] == "float" else [])
    for value in wrong:
        with pytest.raises(SimpleNetError, match=f"configuration: {name} is "):
            dataclasses.replace(start, **{name: value})


CHOICES = {"border": ["reflect", "zeros"], "loss": ["margin", "cross-entropy"]}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_refused_with_those_there_are(name):
    for value in CHOICES[name]:
        assert getattr(preset("fast", **{name: value}), name) == value
    for wrong in ("", "Zeros", "margin ", "reflect|zeros", "circular", "hinge"):
        with pytest.raises(SimpleNetError) as caught:
            preset("fast", **{name: wrong})
        known = " or ".join(CHOICES[name])
        assert str(caught.value) == f"configuration: {name} is '{wrong}', not {known}."
        with pytest.raises(SimpleNetError, match=f"configuration: {name} is '{wrong}', not "):
            Config.from_json(changed(**{name: wrong}))


def test_an_integer_does_for_a_float_and_the_limits_themselves_are_allowed():
    assert preset("fast", margin=1, sigma=0, smoothing=0, false_alarms=0, averaging=0).margin == 1
    assert preset("fast", resize=32, crop=32, neighbourhood=1, batch_size=2, steps=1).crop == 32
    assert preset("fast", ratio=10, heads=100, averaging=0.9999, adaptor_scale=1e-6).heads == 100


def test_sizes_by_hand():
    square = preset("paper")
    assert (square.ratio, square.size, square.seen) == (0, (329, 329), (288, 288))
    assert preset("paper", ratio=1).size == (329, 329)  # as published, though no multiple of 16
    # 384 / sqrt(3/4) = 443.4 and 384 * sqrt(3/4) = 332.6: 28 and 21 times 16, rounded.
    wide = preset("fast", ratio=0.75)
    assert (wide.size, wide.seen) == ((336, 448), (336, 448))
    upright = preset("paper", ratio=4)  # 658 x 164.5 and 576 x 144
    assert (upright.size, upright.seen) == ((656, 160), (576, 144))
    assert preset("fast", ratio=10, resize=64, crop=32).seen == (96, 32)  # 101 x 10: 32 at least


@relaxed
@given(
    resize=st.integers(32, 4096),
    cut=st.floats(0, 1),
    ratio=st.just(0) | st.just(1) | st.floats(0.1, 10),
)
def test_sizes_have_the_area_of_the_square_and_the_shape_of_the_ratio(resize, cut, ratio):
    crop = max(32, round(resize * cut))
    config = preset("fast", resize=resize, crop=crop, ratio=ratio)
    for side, (height, width) in ((resize, config.size), (crop, config.seen)):
        assert type(height) is type(width) is int
        if ratio in (0, 1):
            assert height == width == side  # exact
            continue
        assert height % 16 == width % 16 == 0 and min(height, width) >= 32
        exact = {"height": side * ratio**0.5, "width": side / ratio**0.5}
        for found, length in ((height, exact["height"]), (width, exact["width"])):
            assert abs(found - length) <= 8 + 1e-6 or (found == 32 and length < 32)
        if min(exact.values()) > 200:
            assert height * width == pytest.approx(side**2, rel=0.08)
            assert height / width == pytest.approx(ratio, rel=0.08)
        if min(exact.values()) > 500:
            assert height * width == pytest.approx(side**2, rel=0.032)
    # What is cut out lies inside, and turned photos have turned sizes.
    assert config.seen[0] <= config.size[0] and config.seen[1] <= config.size[1]
    if ratio:
        turned = dataclasses.replace(config, ratio=1 / ratio)
        pairs = zip(turned.seen, config.seen[::-1], strict=True)
        assert all(abs(one - other) in (0, 16) for one, other in pairs)  # 16: 1/ratio is rounded


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["fast"].steps = 1


configurations = st.builds(
    Config,
    preset=st.text(),
    backbone=st.text(),
    layers=st.lists(st.text(), min_size=1).map(tuple),
    resize=st.integers(1000, 4096),
    crop=st.integers(32, 1000),
    ratio=st.floats(0, 10),
    white=st.floats(0, 2**32),
    border=st.sampled_from(["reflect", "zeros"]),
    neighbourhood=st.integers(0, 7).map(lambda half: 2 * half + 1),
    standardise=st.booleans(),
    adaptor_channels=st.integers(1, 16384),
    hidden_channels=st.integers(1, 16384),
    batchnorm=st.booleans(),
    adaptor_scale=st.floats(1e-6, 1e6),
    fine_scale=st.floats(1e-3, 1e3),
    sigma=st.floats(0, 1e6) | st.integers(0, 10**6),
    loss=st.sampled_from(["margin", "cross-entropy"]),
    margin=st.floats(0, 1e6),
    heads=st.integers(1, 100),
    steps=st.integers(1, 10**9),
    batch_size=st.integers(2, 2**20),
    adaptor_lr=st.floats(0, 10),
    discriminator_lr=st.floats(0, 10),
    smoothing=st.floats(0, 100),
    averaging=st.floats(0, 0.9999),
    false_alarms=st.floats(0, 0.5),
    seed=st.integers(0, 2**31 - 1),
)


@relaxed
@given(configurations)
def test_json_gives_back_an_equal_configuration(config):
    text = config.to_json()
    assert "\n" not in text and text.isascii()
    assert Config.from_json(text) == config
    assert Config.from_json(text).to_json() == text


def changed(**values: object) -> str:
    """The preset ``fast`` as JSON, with some values changed or added."""
    return json.dumps({**json.loads(PRESETS["fast"].to_json()), **values})


def check_never_crashes(text: str) -> None:
    try:
        config = Config.from_json(text)
    except SimpleNetError as error:
        assert "configuration" in str(error)
    else:
        assert Config.from_json(config.to_json()) == config


numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), math.nan, math.inf])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@relaxed
@given(st.text())
def test_any_text_is_read_or_refused(text):
    check_never_crashes(text)


@relaxed
@given(values)
def test_any_json_is_read_or_refused(value):
    check_never_crashes(json.dumps(value))


@relaxed
@given(st.dictionaries(st.sampled_from([*FIELDS, "self", "cls", "", "Steps"]), values, min_size=1))
def test_any_changed_field_is_read_or_refused(changes):
    check_never_crashes(changed(**changes))


@relaxed
@given(st.sampled_from(sorted(FIELDS)))
def test_a_missing_field_never_crashes(name):
    start = json.loads(PRESETS["fast"].to_json())
    del start[name]
    check_never_crashes(json.dumps(start))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '"fast"',
        "[" * 100_000,
        '{"layers":' * 100_000,
        '{"layers": ["layer2"], "steps": ' + "9" * 5000 + "}",
        changed(layers="layer2"),
        changed(layers={"layer2": 1}),
        changed(layers=[["layer2"]]),
        changed(seed=math.nan),
        changed(seeds=0),
        PRESETS["fast"].to_json()[:-1],
    ],
    ids=range(14),
)
def test_what_is_no_configuration_is_refused(text):
    with pytest.raises(SimpleNetError, match="configuration"):
        Config.from_json(text)
