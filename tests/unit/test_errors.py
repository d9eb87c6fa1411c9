import inspect

import psycopg
import psycopg.errors as pg
import pytest
from psycopg_pool import PoolTimeout

import ehub
from ehub import errors
from ehub.database import mapped


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = {
        line.strip(" │├─└").split("(")[0].split()[0]
        for line in errors.__doc__.splitlines()
        if "Error" in line and ("──" in line or line.strip().startswith("EhubError"))
    }
    defined = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.EhubError)
    }
    assert drawn == defined
    assert defined <= set(ehub.__all__)


def test_all_that_is_public_is_there_and_described():
    for name in set(ehub.__all__) - {"Metric", "Privilege"}:
        assert getattr(ehub, name).__doc__, name


def test_a_key_error_reads_as_a_sentence():
    assert str(errors.KeyNotFoundError("space 's' has no key 'k'")) == "space 's' has no key 'k'"


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (pg.UndefinedTable("x"), errors.SpaceNotFoundError),
        (pg.InsufficientPrivilege("x"), errors.AccessDeniedError),
        (pg.AdminShutdown("x"), errors.UnavailableError),
        (pg.CannotConnectNow("x"), errors.UnavailableError),
        (psycopg.OperationalError("x"), errors.UnavailableError),
        (PoolTimeout("x"), errors.UnavailableError),
        (pg.SerializationFailure("x"), errors.DatabaseError),
        (pg.QueryCanceled("x"), errors.DatabaseError),
        (pg.DiskFull("x"), errors.DatabaseError),
    ],
)
def test_a_drivers_error_never_comes_bare(raised, expected):
    with pytest.raises(errors.EhubError) as caught, mapped("s"):
        raise raised
    assert type(caught.value) is expected
    assert caught.value.__cause__ is raised
