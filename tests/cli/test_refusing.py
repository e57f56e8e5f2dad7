from __future__ import annotations

import pytest

from fahooks.cli.refusing import refused
from fahooks.plugins import InputError


def test_any_error_becomes_one_line_with_its_cause() -> None:
    cause = RuntimeError("shapes differ:\n  2 and\t3")
    with pytest.raises(InputError) as caught, refused("'mine' does not run"):
        raise cause
    assert str(caught.value) == "'mine' does not run: RuntimeError: shapes differ: 2 and 3"
    assert caught.value.__cause__ is cause


def test_what_says_itself_what_is_wrong_is_left_as_it_is() -> None:
    own = InputError("no such rule")
    with pytest.raises(InputError) as caught, refused("'mine' does not run"):
        raise own
    assert caught.value is own


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stop_is_no_error(stop: type[BaseException]) -> None:
    with pytest.raises(stop), refused("'mine' does not run"):
        raise stop
