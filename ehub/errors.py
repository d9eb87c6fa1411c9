"""Every error that ehub raises.

::

    EhubError
    ├── ConfigurationError (ValueError)      a setting, a URL or a choice that cannot work
    ├── DependencyError (ImportError)        an optional package is not installed
    ├── NotFoundError (KeyError)
    │   ├── SpaceNotFoundError
    │   ├── VersionNotFoundError
    │   ├── CheckpointNotFoundError
    │   ├── RoleNotFoundError
    │   ├── GrantNotFoundError               nothing to revoke
    │   ├── IndexNotFoundError               a sub-index
    │   ├── PartitionNotFoundError           a value that no row has in the partition field
    │   └── KeyNotFoundError
    ├── ExistsError (ValueError)
    │   ├── SpaceExistsError
    │   ├── VersionExistsError
    │   ├── IndexExistsError                 a sub-index
    │   └── CheckpointExistsError
    ├── ReadOnlyError (PermissionError)      a write to a checkpoint, a snapshot or an average
    │   └── FrozenError                      a write to a version that was frozen
    ├── VersionInUseError                    a version that cannot be dropped yet
    ├── SpaceInUseError                      a space that averages still follow
    ├── AttachedError                        what a space that is somebody's table cannot do
    ├── OverlapError                         a promotion that would change too many answers
    ├── ConflictError                        rows that somebody else has changed meanwhile
    ├── InvalidValueError (ValueError)
    │   ├── InvalidNameError                 the name of a space, version or checkpoint
    │   ├── InvalidKeyError
    │   ├── InvalidVectorError               wrong dims, NaN, infinity, zero under cosine
    │   ├── InvalidMetadataError
    │   ├── InvalidFilterError               a filter that cannot be understood
    │   ├── NotAttachableError               a table or column that cannot be attached
    │   └── InvalidFileError                 a file of embeddings or a snapshot that cannot be read
    ├── IndexFileError                       an index file that is damaged or foreign
    ├── IndexUnavailableError                the index cannot answer, and going exact was forbidden
    ├── ServiceError                         the index service cannot be installed or started
    ├── WaitTimeoutError (TimeoutError)
    └── DatabaseError                        what Postgres refused for another reason
        ├── UnavailableError (ConnectionError)
        ├── SchemaError                      not migrated, or migrated by another release
        └── AccessDeniedError (PermissionError)

Where Python has a word for an error, the error is that too: an unknown key is a ``KeyError``, a
bad value a ``ValueError``.
"""

from __future__ import annotations


class EhubError(Exception):
    """The root: ``except ehub.EhubError`` catches whatever ehub raises on purpose."""


class ConfigurationError(EhubError, ValueError):
    """A setting, URL or choice that cannot work."""


class DependencyError(EhubError, ImportError):
    """An optional package is missing; the message says how to install it."""


class NotFoundError(EhubError, KeyError):
    """Something that was asked for by name is not there."""

    # KeyError shows repr(message); a sentence reads better as it is.
    def __str__(self) -> str:
        return Exception.__str__(self)


class SpaceNotFoundError(NotFoundError):
    """No space of that name."""


class VersionNotFoundError(NotFoundError):
    """The space has no version of that name, or none to go back to."""


class CheckpointNotFoundError(NotFoundError):
    """The version has no checkpoint of that name."""


class RoleNotFoundError(NotFoundError):
    """Postgres has no role of that name."""


class GrantNotFoundError(NotFoundError):
    """The role has no such grant: there is nothing to revoke."""


class IndexNotFoundError(NotFoundError):
    """The version has no sub-index of that name."""


class PartitionNotFoundError(NotFoundError):
    """No row has that value in the partition field."""


class KeyNotFoundError(NotFoundError):
    """No embedding under that key."""


class ExistsError(EhubError, ValueError):
    """Something of that name is there already."""


class SpaceExistsError(ExistsError):
    """A space of that name is there already."""


class VersionExistsError(ExistsError):
    """The space has a version of that name already."""


class IndexExistsError(ExistsError):
    """The version has a sub-index of that name already."""


class CheckpointExistsError(ExistsError):
    """The version has a checkpoint of that name already."""


class ReadOnlyError(EhubError, PermissionError):
    """A write to what cannot be written.

    A checkpoint, a snapshot that is not a fork, or a space of averages, which follow their source.
    """


class FrozenError(ReadOnlyError):
    """A write to a version that was frozen."""


class VersionInUseError(EhubError):
    """A version that is current or still needed, and so cannot be dropped; the message says why."""


class SpaceInUseError(EhubError):
    """A space that averages follow, and so cannot be deleted; the message names them."""


class AttachedError(EhubError):
    """What an attached space cannot do: its rows are those of somebody's table, and written there.

    Or the table is not any more what was attached; the message says what it lacks.
    """


class OverlapError(EhubError):
    """A promotion that would change more of the answers than it may."""


class ConflictError(EhubError):
    """Rows that are neither what was taken nor what is to be written; nothing was changed.

    Attributes:
        keys: their keys.
    """

    def __init__(self, message: str, keys: list[str]) -> None:
        super().__init__(message)
        self.keys = keys


class InvalidValueError(EhubError, ValueError):
    """A value that ehub refuses; nothing was changed."""


class InvalidNameError(InvalidValueError):
    """A name that is too long, or not of letters, digits, ``_``, ``-`` and ``.``."""


class InvalidKeyError(InvalidValueError):
    """A key that is not a string of 1 to 1024 bytes without NUL."""


class InvalidVectorError(InvalidValueError):
    """An embedding or query that has the wrong dims or no distance to anything."""


class InvalidMetadataError(InvalidValueError):
    """Metadata that is not a JSON object."""


class InvalidFilterError(InvalidValueError):
    """A filter that cannot be understood; the message names the field or operator."""


class NotAttachableError(InvalidValueError):
    """A table or column that cannot be attached; the message says why, and nothing was changed."""


class InvalidFileError(InvalidValueError):
    """A file of embeddings or a snapshot that cannot be read; the message says where and why."""


class IndexFileError(EhubError):
    """An index file that is damaged, foreign or of an unknown format."""


class IndexUnavailableError(EhubError):
    """Under ``ehub.mode = 'index'``: the index cannot answer; the message says why."""


class ServiceError(EhubError):
    """The index service cannot be installed or started; the message says why."""


class WaitTimeoutError(EhubError, TimeoutError):
    """What was waited for did not happen in time."""


class DatabaseError(EhubError):
    """Postgres refused a statement; the message is Postgres' own."""


class UnavailableError(DatabaseError, ConnectionError):
    """Postgres cannot be reached, or the connection was lost."""


class SchemaError(DatabaseError):
    """The database holds no ehub schema, or that of another release."""


class AccessDeniedError(DatabaseError, PermissionError):
    """The role may not do that."""
