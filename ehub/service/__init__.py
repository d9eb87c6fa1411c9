"""The index service: a replica of all spaces behind a door that Postgres knocks at."""

from ehub.service.run import Service

__all__ = ["Service"]
