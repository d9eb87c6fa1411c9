"""Hypothesis looks for a search by the index of a process that differs from what SELECT says."""

import json
import uuid

import pytest
from attached_machine import AttachedMachine
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from psycopg.conninfo import make_conninfo

import ehub


class LocalMachine(AttachedMachine):
    hub: ehub.Hub
    limited_hub: ehub.Hub

    def searches(self, connection, query, k, wanted, index):
        yield from super().searches(connection, query, k, wanted, index)
        # Others see what was committed, as these do.
        hubs = {self.others: self.hub, self.limited: self.limited_hub}
        if connection not in hubs:
            return
        space = hubs[connection].get_space("s")
        options = {
            "filter": None if wanted is None else json.loads(wanted),
            "index": index,
            "metadata": True,
            "consistency": "strong",
        }
        yield "near", space.nearest_neighbors(k, vector=query, **options)
        yield "many", space.multi_nearest_neighbors(k, vectors=[query], **options)[0]

    def settle_index(self):
        self.close_old()
        self.hub.get_space("s").wait_until_indexed(10)


@pytest.fixture
def reader(db):
    name = f"ehub_reader_{uuid.uuid4().hex[:8]}"
    db.execute(f"CREATE ROLE {name}")
    yield name
    db.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def test_searches_of_attached_tables_agree_with_selects(hub, url, reader, tmp_path):
    LocalMachine.url, LocalMachine.reader, LocalMachine.hub = url, reader, hub
    limited = make_conninfo(url, options=f"-c role={reader}")
    with ehub.connect(
        limited, index="local", data_dir=tmp_path / "limited"
    ) as LocalMachine.limited_hub:
        run_state_machine_as_test(
            LocalMachine,
            settings=settings(
                max_examples=6,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
