"""Problems with values, as the operator reads them."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from protocol.guest import GuestName
from protocol.wrong_values import first_fault


class Values(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: GuestName = "g1"
    memory_bytes: int = Field(default=1 << 20, ge=1 << 20, le=1 << 30)
    rate_bytes_per_s: int = Field(default=0, lt=1 << 30)
    wait_ms: float = Field(default=1.5, gt=0)
    level: Literal["debug", "info"] = "info"
    names: tuple[Annotated[str, Field(pattern="^[a-z]$")], ...] = ()
    command: tuple[str, ...] = Field(default=("x",), min_length=1)
    on: bool = True
    even: int = 0

    @field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("the number must be even")
        return value


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"memory_bytes": 256}, "memory_bytes must be 1MiB or more, not 256B"),
        ({"memory_bytes": 1 << 31}, "memory_bytes must be 1GiB or less, not 2GiB"),
        ({"memory_bytes": "much"}, "memory_bytes must be a whole number, not 'much'"),
        ({"memory_bytes": 1.5}, "memory_bytes must be a whole number, not 1.5"),
        ({"rate_bytes_per_s": 1 << 30}, "rate_bytes_per_s must be less than 1GiB/s, not 1GiB/s"),
        ({"wait_ms": -2.0}, "wait_ms must be more than 0 ms, not -2 ms"),
        ({"level": "loud"}, "level must be 'debug' or 'info', not 'loud'"),
        ({"names": "a"}, "names must be a list, not 'a'"),
        ({"names": ["a", "B"]}, "names.1 must match ^[a-z]$, not 'B'"),
        ({"command": []}, "command must not be empty"),
        ({"on": 5}, "on must be true or false, not 5"),
        ({"even": 3}, "even: the number must be even"),
        ({"odd": 3}, "odd is not known here"),
        (
            {"name": "../g1"},
            "name must begin with a letter or a digit and have only letters, digits, '_', '.' and '-', not '../g1'",
        ),
        ({"name": "g" * 65}, f"name must have 64 characters or less, not '{'g' * 65}'"),
        ({"name": ""}, "name must not be empty"),
        (5, "must be a table of keys, not 5"),
    ],
)
def test_each_kind_of_problem_is_a_sentence(given: object, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Values.model_validate(given)
    assert first_fault(caught.value) == sentence
