"""The README's "beside your existing Postgres", as an owner who is no superuser."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from service.conftest import free_port, settled

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SECTION = README.split("## Beside your existing Postgres")[1].split("\n## ")[0]


@pytest.fixture
def owned(admin, server):
    """An empty database of a plain role's own."""
    admin.execute("CREATE ROLE ehub_owner LOGIN PASSWORD 'owner'")
    admin.execute("CREATE DATABASE ehub_owned OWNER ehub_owner")
    yield make_conninfo(server, dbname="ehub_owned", user="ehub_owner", password="owner")
    admin.execute("DROP DATABASE ehub_owned WITH (FORCE)")
    admin.execute("DROP ROLE ehub_owner")


@pytest.mark.whole_postgres("dblink")
def test_its_commands_and_rights(owned, server, tmp_path):
    rights = re.search(r"`(CREATE EXTENSION vector;.*?)`", SECTION, re.S)[1]
    with psycopg.connect(make_conninfo(server, dbname="ehub_owned"), autocommit=True) as admin:
        for statement in re.sub(r"\bowner\b", "ehub_owner", rights).split(";"):
            admin.execute(statement)
    port = free_port()
    environment = {
        **os.environ,
        "EHUB_DATABASE_URL": owned,
        "EHUB_DATA_DIR": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    export, *commands, serve = re.search(r"```sh\n(.*?)```", SECTION, re.S)[1].splitlines()
    assert export.startswith("export EHUB_DATABASE_URL=")
    for command in commands:
        command = command.replace("6433", str(port))
        subprocess.run(command, shell=True, check=True, env=environment, capture_output=True)
    assert serve == "ehub serve"
    service = subprocess.Popen(
        ["ehub", "serve", "--listen", f"127.0.0.1:{port}", "--pages", "127.0.0.1:0"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert service.stdout.readline().startswith(f"ready: 127.0.0.1:{port}, pages at 127.0.0.1:")
        with psycopg.connect(owned, autocommit=True) as db:
            db.execute("SELECT ehub.create_space('s', 2)")
            db.execute("SELECT ehub.set('s', 'a', '[1,2]')")
            settled(db)
            db.execute("SET ehub.mode = 'index'")
            assert db.execute("SELECT key FROM ehub.nearest('s', '[1,1]', 1)").fetchall() == [
                ("a",)
            ]
            status = db.execute("SELECT in_sql FROM ehub.status").fetchone()
            assert status[0].startswith("by the index service")
    finally:
        service.send_signal(signal.SIGTERM)
        _, errors = service.communicate(timeout=60)
    assert service.returncode == 0
    assert '"level": "INFO"' in errors
    remove = re.search(r"`(ehub install-service --remove)`", SECTION)[1]
    subprocess.run(remove.split(), check=True, env=environment, capture_output=True)
    with psycopg.connect(owned, autocommit=True) as db:
        assert db.execute("SELECT key FROM ehub.nearest('s', '[1,1]', 1)").fetchall() == [("a",)]
        undo = re.search(r"`(ehub uninstall --dry-run)` prints", SECTION)[1]
        subprocess.run(undo.split(), check=True, env=environment, capture_output=True)
        assert "`ehub uninstall` does it" in SECTION
        subprocess.run(
            ["ehub", "uninstall", "--yes"], check=True, env=environment, capture_output=True
        )
        left = db.execute(
            "SELECT nspname FROM pg_namespace WHERE nspname ~ 'ehub|spaces'"
        ).fetchall()
        # The superuser's own.
        assert left == [("ehub_dblink",)]
