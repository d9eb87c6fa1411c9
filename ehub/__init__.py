"""An embedding database that lives in the Postgres you already run.

>>> import ehub
>>> hub = ehub.connect()
>>> space = hub.create_space("quickstart", dims=3)
>>> space.multiset({"apple": [1, 0, 0], "orange": [1, 1, 0], "potato": [0, 1, 0]})
3
>>> [neighbor.key for neighbor in space.nearest_neighbors(2, key="apple")]
['orange', 'potato']
"""

import importlib
import typing

from ehub.access import AuditEntry, Finding, Grant, Privilege, Right, Role
from ehub.average import FieldValue, KeptAverage
from ehub.checkpoint import Checkpoint, CheckpointInfo
from ehub.collection import Restored, SubIndex
from ehub.compare import Measured
from ehub.diff import Diff, Drift, Moved
from ehub.errors import (
    AccessDeniedError,
    AttachedError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConfigurationError,
    ConflictError,
    DatabaseError,
    DependencyError,
    EhubError,
    ExistsError,
    FrozenError,
    GrantNotFoundError,
    IndexExistsError,
    IndexFileError,
    IndexNotFoundError,
    IndexUnavailableError,
    InvalidFileError,
    InvalidFilterError,
    InvalidKeyError,
    InvalidMetadataError,
    InvalidNameError,
    InvalidValueError,
    InvalidVectorError,
    KeyNotFoundError,
    NotAttachableError,
    NotFoundError,
    OverlapError,
    PartitionNotFoundError,
    ReadOnlyError,
    RoleNotFoundError,
    SchemaError,
    ServiceError,
    SpaceExistsError,
    SpaceInUseError,
    SpaceNotFoundError,
    UnavailableError,
    VersionExistsError,
    VersionInUseError,
    VersionNotFoundError,
    WaitTimeoutError,
)
from ehub.hub import Hub, connect
from ehub.replica import Progress, State
from ehub.search import Way
from ehub.snapshot import Refreshed, Snapshot, Written
from ehub.space import Promotion, Space, Switched, Version
from ehub.types import Metric, Neighbor

if typing.TYPE_CHECKING:
    from ehub import alembic, models, orm

__all__ = [
    "AccessDeniedError",
    "AttachedError",
    "AuditEntry",
    "Checkpoint",
    "CheckpointExistsError",
    "CheckpointInfo",
    "CheckpointNotFoundError",
    "ConfigurationError",
    "ConflictError",
    "DatabaseError",
    "DependencyError",
    "Diff",
    "Drift",
    "EhubError",
    "ExistsError",
    "FieldValue",
    "Finding",
    "FrozenError",
    "Grant",
    "GrantNotFoundError",
    "Hub",
    "IndexExistsError",
    "IndexFileError",
    "IndexNotFoundError",
    "IndexUnavailableError",
    "InvalidFileError",
    "InvalidFilterError",
    "InvalidKeyError",
    "InvalidMetadataError",
    "InvalidNameError",
    "InvalidValueError",
    "InvalidVectorError",
    "KeptAverage",
    "KeyNotFoundError",
    "Measured",
    "Metric",
    "Moved",
    "Neighbor",
    "NotAttachableError",
    "NotFoundError",
    "OverlapError",
    "PartitionNotFoundError",
    "Privilege",
    "Progress",
    "Promotion",
    "ReadOnlyError",
    "Refreshed",
    "Restored",
    "Right",
    "Role",
    "RoleNotFoundError",
    "SchemaError",
    "ServiceError",
    "Snapshot",
    "Space",
    "SpaceExistsError",
    "SpaceInUseError",
    "SpaceNotFoundError",
    "State",
    "SubIndex",
    "Switched",
    "UnavailableError",
    "Version",
    "VersionExistsError",
    "VersionInUseError",
    "VersionNotFoundError",
    "WaitTimeoutError",
    "Way",
    "Written",
    "alembic",
    "connect",
    "models",
    "orm",
]


def __getattr__(name: str) -> object:
    # SQLAlchemy takes its time to import, and most who connect do without.
    if name in ("alembic", "models", "orm"):
        return importlib.import_module(f"ehub.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
