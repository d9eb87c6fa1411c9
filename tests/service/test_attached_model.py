"""Hypothesis looks for a search of an attached table that differs from what SELECT says of it."""

import uuid

import pytest
from attached_machine import AttachedMachine
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from service.conftest import settled


class ServiceMachine(AttachedMachine):
    def settle_index(self):
        self.close_old()
        settled(self.db, "s")
        self.db.execute("SET ehub.mode = 'index'")
        # Nothing hinders it then.
        self.db.execute("SELECT FROM ehub.nearest('s', '[1,1]', 3)")
        self.db.execute("RESET ehub.mode")


@pytest.fixture
def reader(db):
    name = f"ehub_reader_{uuid.uuid4().hex[:8]}"
    db.execute(f"CREATE ROLE {name}")
    yield name
    db.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def test_searches_of_attached_tables_agree_with_selects(service, url, reader):
    ServiceMachine.url, ServiceMachine.reader = url, reader
    run_state_machine_as_test(
        ServiceMachine,
        settings=settings(
            max_examples=6,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
