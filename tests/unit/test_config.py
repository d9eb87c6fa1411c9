import os

import pytest

from ehub import ConfigurationError
from ehub.config import resolve


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("PG", "EHUB_")):
            monkeypatch.delenv(name)


def test_the_first_that_is_given_counts(monkeypatch):
    assert resolve().conninfo is None
    monkeypatch.setenv("PGHOST", "pg")
    assert resolve().conninfo is not None
    assert resolve("embedded").conninfo is None
    monkeypatch.setenv("EHUB_DATABASE_URL", "postgresql://env/db")
    assert "host=env" in resolve().conninfo
    assert "host=arg" in resolve("postgresql://arg/db").conninfo


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("EHUB_DATA_DIR", str(tmp_path / "env"))
    assert resolve().data_dir == tmp_path / "env"
    assert resolve(data_dir=tmp_path / "arg").data_dir == tmp_path / "arg"


def test_connections_notice_a_dead_peer_unless_told_otherwise():
    assert "keepalives_idle=30" in resolve("host=a").conninfo
    assert "keepalives_idle=5" in resolve("host=a keepalives_idle=5").conninfo


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:secret@host/db",
        "postgres://user:secret@host/db",
        "postgresql+psycopg://user:secret@host/db",
        "host=host user=user password=secret dbname=db",
        "postgresql://user:secret@a,b/db?target_session_attrs=read-write",
    ],
)
def test_a_password_is_not_shown(url):
    target = resolve(url)
    assert "secret" in target.conninfo
    assert "secret" not in repr(target) + str(target) + target.describe()


@pytest.mark.parametrize(
    "url", ["mysql://u:secret@h/db", "postgresql//u:secret@h/db", "nonsense secret", "a=secret"]
)
def test_a_url_that_cannot_be_read_is_not_quoted(url):
    with pytest.raises(ConfigurationError) as raised:
        resolve(url)
    assert "secret" not in str(raised.value)
    assert raised.value.__cause__ is None
