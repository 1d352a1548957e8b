"""Functions with which the parts of a host answer an operator: they check arguments and turn failures of a VMM into
refusals."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from pydantic import ValidationError

from migrated.base.errors import VmmError
from migrated.control.operations import OperationError
from migrated.settings.parameters import MigrationParameters
from migrated.source import target
from migrated.source.target import Target
from protocol.wrong_values import first_fault

Found = TypeVar("Found")


async def asked(awaitable: Awaitable[Found]) -> Found:
    """Wait for a VMM on behalf of an operator.

    Raises:
        OperationError: the VMM refused or failed, in its own words.
    """
    try:
        return await awaitable
    except VmmError as error:
        raise OperationError(str(error)) from error


def target_of(uri: str) -> Target:
    """Return the target of a migration from its URI.

    Raises:
        OperationError: it is not such a URI.
    """
    try:
        return target.target_of(uri)
    except ValueError as error:
        raise OperationError(str(error)) from error


def with_values(parameters: MigrationParameters, values: dict[str, object]) -> MigrationParameters:
    """The parameters with some values replaced; the set is checked whole.

    Raises:
        OperationError: a value is out of range, or does not go with another.
    """
    try:
        return MigrationParameters.model_validate({**parameters.model_dump(), **values})
    except ValidationError as error:
        raise OperationError(f"these parameters cannot be used: {first_fault(error)}") from error
