"""What a rule accepts, how it is written, and what it is called."""

from __future__ import annotations

import doctest
import math

import pytest

from lape_fast.errors import SelectionError
from lape_fast.identify import rules
from lape_fast.identify.rules import RULES, Budget, Lape, Percentile, parse_rules, rule_name, rule_settings

NO_NUMBERS = [math.nan, math.inf, -0.5, None, "0.5", True]


@pytest.mark.parametrize("name", ["top_rate", "filter_rate", "activation_bar"])
@pytest.mark.parametrize("rate", [0, 1.01, 5, *NO_NUMBERS])
def test_rates_outside_their_range_are_refused(name, rate):
    with pytest.raises(SelectionError, match=f"`{name}` is {rate!r}; it must be a number above 0 and at most 1"):
        Lape(**{name: rate})


@pytest.mark.parametrize("value", [0, 1, 99, *NO_NUMBERS])
def test_percentiles_outside_their_range_are_refused(value):
    with pytest.raises(SelectionError, match=f"`percentile` is {value!r}; it must be a number above 0 and below 1"):
        Percentile(value)


@pytest.mark.parametrize("value", [0, 1.0, 1.5, -3, *NO_NUMBERS])
def test_a_budget_is_a_whole_number_or_a_share(value):
    with pytest.raises(SelectionError, match=f"`neurons` is {value!r}; it must be a whole number .* or a share"):
        Budget(value)


@pytest.mark.parametrize("value", [1, 2, *NO_NUMBERS])
def test_floors_outside_their_range_are_refused(value):
    with pytest.raises(SelectionError, match=f"`floor` is {value!r}; it must be a number of at least 0 and below 1"):
        Budget(10, floor=value)


@pytest.mark.parametrize("layers", [(3, 2), (-1, 2), (0,), (0, 1, 2), (0.0, 1), "0-1", 4])
def test_layers_that_are_no_range_are_refused(layers):
    with pytest.raises(SelectionError, match=r"it must be the first and the last layer, counted from 0"):
        Lape(layers=layers)


def test_exclusive_is_yes_or_no():
    with pytest.raises(SelectionError, match="`exclusive` is 1; it must be True or False"):
        Budget(exclusive=1)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("lape", Lape(0.05, 0.95, 0.95)),
        ("paper", Lape(0.05, 0.95, 0.95)),
        ("tang", Lape(0.01, 0.95, 0.95)),
        ("tang:filter_rate=0.9,exclusive", Lape(0.01, 0.9, 0.95, exclusive=True)),
        ("lape:top_rate=1", Lape(1.0)),
        ("percentile:percentile=0.95,layers=16-31", Percentile(0.95, layers=(16, 31))),
        ("percentile:layers=7", Percentile(layers=(7, 7))),
        ("budget:neurons=150,floor=0.1,exclusive,layers=0-3", Budget(150, 0.1, exclusive=True, layers=(0, 3))),
        ("budget:neurons=2e-3", Budget(0.002)),
    ],
)
def test_a_text_is_a_rule(text, rule):
    assert parse_rules(text) == [rule]


def test_several_values_are_several_rules_in_order():
    assert parse_rules("lape:top_rate=0.01/0.02/0.05") == [Lape(0.01), Lape(0.02), Lape(0.05)]
    both = parse_rules("budget:neurons=50/150,floor=0/0.1,layers=0-1/2")
    expected = [
        Budget(size, floor, layers=layers) for size in (50, 150) for floor in (0, 0.1) for layers in ((0, 1), (2, 2))
    ]
    assert both == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entropy", "starts with 'entropy'; it must start with one of lape, paper, tang, percentile, budget"),
        ("", "starts with ''"),
        ("lape:", "has the setting ''"),
        ("lape:0.01", "has the setting '0.01'; a setting of lape is exclusive or .*top_rate=VALUE"),
        ("lape:top_rate=0.01,0.02", "has the setting '0.02'.*several values are separated by /"),
        ("lape:neurons=3", "has the setting 'neurons=3'"),
        ("budget:top_rate=3", "a setting of budget is exclusive or .*neurons=VALUE, floor=VALUE"),
        ("lape:exclusive=yes", "has the setting 'exclusive=yes'"),
        ("lape:top_rate=0.1,top_rate=0.2", "sets top_rate twice; .* as in top_rate=VALUE/VALUE"),
        ("lape:top_rate=high", "sets top_rate to 'high'; write a number"),
        ("lape:top_rate=0.1/", "sets top_rate to ''"),
        ("lape:top_rate=7", "`top_rate` is 7; it must be"),
        ("lape:layers=upper", "sets layers to 'upper'; write the first and the last layer"),
        ("lape:layers=5-3", r"`layers` is \(5, 3\)"),
    ],
)
def test_a_text_that_makes_no_sense_is_refused(text, message):
    with pytest.raises(SelectionError, match=message):
        parse_rules(text)


def test_names_are_readable_and_differ():
    named = {
        "lape-top0.05": Lape(),
        "lape-top0.01": Lape(0.01),
        "lape-top0.05-filter0.8-bar0.8": Lape(0.05, 0.8, 0.8),
        "lape-top0.05-bar0.8": Lape(0.05, 0.95, 0.8),
        "percentile-0.99": Percentile(),
        "budget-0.01": Budget(),
        "budget-150": Budget(150),
        "budget-150-floor0.0": Budget(150, 0),
        "budget-150-exclusive-layers16-31": Budget(150, exclusive=True, layers=(16, 31)),
        "percentile-0.99-layers3-3": Percentile(layers=(3, 3)),
    }
    assert {name: rule_name(rule) for name, rule in named.items()} == {name: name for name in named}


@pytest.mark.parametrize("rule", RULES.values())
def test_the_settings_are_json_and_make_the_rule_again(rule):
    settings = rule_settings(rule)
    assert {"exclusive", "layers"} < set(settings)
    assert type(rule)(**settings) == rule
    assert rule_settings(type(rule)(layers=(2, 5)))["layers"] == [2, 5]


def test_the_examples_in_the_documentation_run():
    outcome = doctest.testmod(rules)
    assert outcome.failed == 0 and outcome.attempted >= 6
