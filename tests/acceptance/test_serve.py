"""``ehub serve`` beside the embedded Postgres: it runs, shows itself and leaves in order."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psycopg
import pytest

import ehub

EHUB = Path(sys.executable).with_name("ehub")


@pytest.fixture
def serve(url, tmp_path):
    """Start ``ehub serve``; returns the process and the address of its pages."""
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [
                *(EHUB, "serve", "--database", url, "--data", tmp_path / "service"),
                *("--listen", "127.0.0.1:0", "--pages", "127.0.0.1:0", *arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        line = process.stdout.readline()
        assert line.startswith("ready: 127.0.0.1:"), process.communicate()
        return process, "http://" + line.split("pages at ")[1].strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def page(address, path):
    with urllib.request.urlopen(address + path, timeout=10) as answer:
        return answer.read().decode()


def test_it_runs_shows_itself_and_saves(serve, url, tmp_path, data_dir):
    with ehub.connect(url, data_dir=data_dir, index="none") as hub:
        hub.create_space("s", 2).multiset({"a": [1, 2], "b": [2, 1]})
    process, pages = serve()
    health = json.loads(page(pages, "/health"))
    assert health["ready"] is True
    assert [index["state"] for index in health["indexes"]] == ["ready"]
    assert json.loads(page(pages, "/ready")) == health
    metrics = page(pages, "/metrics")
    assert 'ehub_index_rows{index="1"} 2.0' in metrics
    assert "ehub_database_connected 1.0" in metrics
    # Names of spaces are for those who may see them.
    assert '"s"' not in metrics + str(health)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        page(pages, "/etc/passwd")
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert list((tmp_path / "service").glob("indexes/*/*/manifest.json"))
    messages = [json.loads(line)["message"] for line in log.splitlines()]
    assert messages[0].startswith("listening on 127.0.0.1:")
    assert "does not know this service" in messages[1]
    assert messages[-1] == "stopping: saving the indexes"


def test_metrics_for_who_has_the_token(serve, tmp_path):
    (tmp_path / "token").write_text("open sesame\n")
    _process, pages = serve("--metrics-token", str(tmp_path / "token"))
    assert "rows" not in page(pages, "/health")
    for header in ({}, {"Authorization": "Bearer guess"}, {"Authorization": "open sesame"}):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(urllib.request.Request(f"{pages}/metrics", headers=header))
    right = urllib.request.Request(
        f"{pages}/metrics", headers={"Authorization": "Bearer open sesame"}
    )
    with urllib.request.urlopen(right, timeout=5) as answer:
        assert b"ehub_index_rows" in answer.read()


MONITORING = Path(__file__).parents[2] / "monitoring"


def with_token(pages, path):
    asked = urllib.request.Request(pages + path, headers={"Authorization": "Bearer open sesame"})
    try:
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_one_broken_space_takes_the_service_from_nobody(serve, url, db, tmp_path):
    db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, e vector(2)); INSERT INTO t VALUES (1, '[1,2]')"
    )
    db.execute("SELECT ehub.create_space('s', 2), ehub.attach('t', 'e')")
    db.execute("ALTER TABLE t DROP CONSTRAINT t_pkey")
    (tmp_path / "token").write_text("open sesame")
    _process, pages = serve("--metrics-token", str(tmp_path / "token"))
    state = json.loads(page(pages, "/ready"))
    assert state["ready"] is True
    assert state["schema"] == "fits"
    assert [(i["ready"], i.get("error")) for i in state["indexes"]] == [
        (True, None),
        (False, "see the service's log"),
    ]
    assert "space" not in state["indexes"][0]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        page(pages, "/ready?space=t")
    assert with_token(pages, "/ready?space=s")[0] == 200
    assert with_token(pages, "/ready?space=nosuch")[0] == 503
    code, text = with_token(pages, "/ready?space=t")
    assert code == 503
    (broken,) = json.loads(text)["indexes"]
    assert (broken["space"], broken["state"]) == ("t", "failed")
    assert "has no primary key of one column any more" in broken["error"]
    number = broken["index"]
    with pytest.raises(urllib.error.HTTPError, match="503"):
        page(pages, f"/ready?index={number}")
    # What goes wrong with one is told by its own numbers.
    metrics = with_token(pages, "/metrics")[1]
    for name, value in (("ready", 0), ("failed_timestamp_seconds", None), ("lag_rows", 0)):
        label = f'index="{number}",name="",space="t",version="v1"'
        (line,) = [
            one for one in metrics.splitlines() if one.startswith(f"ehub_index_{name}{{{label}}}")
        ]
        assert value is None or float(line.split()[-1]) == value
    assert 'ehub_build_info{schema="fits",version="' in metrics


def test_the_alerts_and_the_dashboard_are_about_what_is_measured(serve, url, tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: it comes with Debian's package prometheus")
    with ehub.connect(url, data_dir=tmp_path / "data", index="none") as hub:
        hub.create_space("s", 2).multiset({"a": [1, 2], "b": [2, 1]})
    (tmp_path / "token").write_text("open sesame")
    _process, pages = serve("--metrics-token", str(tmp_path / "token"))
    metrics = with_token(pages, "/metrics")[1]
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=metrics, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    alerts = MONITORING / "alerts.yml"
    subprocess.run([promtool, "check", "rules", alerts], check=True, capture_output=True)
    known = {line.split()[2] for line in metrics.splitlines() if line.startswith("# TYPE")}
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for text in (*asked, alerts.read_text()):
        for name in re.findall(r"\b(?:ehub|process)_[a-z_]+\b", text):
            assert name.removesuffix("_bucket") in known, name


def test_a_schema_of_another_release_is_told(serve, db):
    db.execute("UPDATE ehub.setting SET value = 'another' WHERE name = 'sql_digest'")
    process, pages = serve()
    assert json.loads(page(pages, "/health"))["schema"] == "differs"
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert log.count("schema ehub is of another release than this service") == 1


def test_interrupted_by_hand_it_leaves_in_order_too(serve):
    process, _ = serve("--log-format", "text")
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopping" in log
    assert "Traceback" not in log


def test_its_end_ends_what_runs_below_it(serve):
    process, _ = serve()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    process.kill()
    process.wait()
    for _ in range(100):
        stat = Path(f"/proc/{children[0]}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        os.sched_yield()
        signal.sigtimedwait([], 0.05)
    raise AssertionError("the service outlives its supervisor")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--listen", "nowhere:0:0"], "HOST:PORT"),
        (["--listen", "192.0.2.1:6433"], "cannot listen on 192.0.2.1:6433"),
        (["--pages", "x:99999"], "x:99999"),
        (["--metrics-token", "/nonexistent"], "/nonexistent"),
        (["--log-format", "xml"], "json or text, not 'xml'"),
        (["--tls-cert", "/nowhere.pem"], "/nowhere.pem"),
        (["--database", "mysql://x"], "postgresql://"),
    ],
)
def test_a_typo_is_an_error_of_one_line(url, tmp_path, arguments, message):
    done = subprocess.run(
        [EHUB, "serve", "--database", url, "--data", tmp_path, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "300"},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_embedded_postgres_needs_no_more_than_serve(tmp_path):
    """Its searches in SQL go by the index, and nobody had to install anything."""
    environment = {**os.environ, "EHUB_DATA_DIR": str(tmp_path / "data")}
    with ehub.connect("embedded", data_dir=tmp_path / "data", index="none") as hub:
        hub.create_space("s", 2).multiset({"a": [1, 2], "b": [2, 1]})
        process = subprocess.Popen(
            [EHUB, "serve", "--listen", "127.0.0.1:0", "--pages", "none"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            line = process.stdout.readline()
            assert line.startswith("ready: "), process.communicate()
            with psycopg.connect(hub.conninfo, autocommit=True) as db:
                assert db.execute("SELECT in_sql FROM ehub.status").fetchone() == (
                    "by the index service",
                )
                db.execute("SET ehub.mode = 'index'")
                found = db.execute("SELECT key FROM ehub.nearest('s', '[1,2]', 1)").fetchall()
                assert found == [("a",)]
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def test_what_a_build_needs_is_said_in_one_line(tmp_path):
    for program, message in (
        ("/nowhere/pg_config", "/nowhere/pg_config does not say where its server is"),
        ("/bin/echo", "extension ehub_link cannot be built; it needs make, a C compiler and"),
    ):
        done = subprocess.run(
            [EHUB, "build-link", "--pg-config", program],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "300"},
        )
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
