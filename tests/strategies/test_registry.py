"""The registry: every strategy that is offered can be configured by the file beside it."""

import pytest

from flexllmgen.errors import UsageError
from strategies.registry import STRATEGIES, find_strategy, strategy_names


@pytest.mark.parametrize("name", strategy_names())
def test_the_defaults_in_the_file_are_whole_and_valid(name: str) -> None:
    config_type, defaults = find_strategy(name).load_config()
    assert set(defaults) == set(config_type.model_fields)
    config = config_type.model_validate(defaults)
    assert find_strategy(name).create(config).name == name


def test_each_has_a_line_of_its_own() -> None:
    assert len(set(strategy_names())) == len(STRATEGIES)
    assert all(entry.summary and "\n" not in entry.summary for entry in STRATEGIES)


def test_an_unknown_one_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'accelerate'"):
        find_strategy("accelerat")
    with pytest.raises(UsageError, match="There are: accelerate"):
        find_strategy("zzz")
