"""An embedding database that lives in the Postgres you already run.

>>> import ehub
>>> hub = ehub.connect()
>>> space = hub.create_space("quickstart", dims=3)
>>> space.multiset({"apple": [1, 0, 0], "orange": [1, 1, 0], "potato": [0, 1, 0]})
3
>>> [neighbor.key for neighbor in space.nearest_neighbors(2, key="apple")]
['orange', 'potato']
"""

from ehub.errors import (
    AccessDeniedError,
    ConfigurationError,
    DatabaseError,
    DependencyError,
    EhubError,
    IndexFileError,
    IndexUnavailableError,
    InvalidFileError,
    InvalidKeyError,
    InvalidMetadataError,
    InvalidNameError,
    InvalidValueError,
    InvalidVectorError,
    KeyNotFoundError,
    NotFoundError,
    SchemaError,
    ServiceError,
    SpaceExistsError,
    SpaceNotFoundError,
    UnavailableError,
    WaitTimeoutError,
)
from ehub.hub import Hub, connect
from ehub.replica import Progress, State
from ehub.space import Space
from ehub.types import Metric, Neighbor

__all__ = [
    "AccessDeniedError",
    "ConfigurationError",
    "DatabaseError",
    "DependencyError",
    "EhubError",
    "Hub",
    "IndexFileError",
    "IndexUnavailableError",
    "InvalidFileError",
    "InvalidKeyError",
    "InvalidMetadataError",
    "InvalidNameError",
    "InvalidValueError",
    "InvalidVectorError",
    "KeyNotFoundError",
    "Metric",
    "Neighbor",
    "NotFoundError",
    "Progress",
    "SchemaError",
    "ServiceError",
    "Space",
    "SpaceExistsError",
    "SpaceNotFoundError",
    "State",
    "UnavailableError",
    "WaitTimeoutError",
    "connect",
]
