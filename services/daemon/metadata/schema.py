"""The schema of the daemon's database, ``<root>/daemon.db``, as an ordered tuple of migrations.

Times are nanoseconds since the epoch. What has a structure of its own and is never searched for
is a JSON object. What runs now is containerd's to know: ``state`` is corrected by its events and
at every start, never the other way round.

    meta: journal_seq and the like       containers ◀── execs
    tombstones                           volumes      endpoints ◀── published_ports
"""

from __future__ import annotations

from services.daemon.metadata.networks import NETWORKS_DDL
from services.daemon.metadata.volumes import VOLUMES_DDL

_V1 = f"""
-- single facts: 'journal_seq', last event of containerd's journal that was dealt with
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

-- containers, from before anything of them is made until nothing of them is left
CREATE TABLE containers (
    id TEXT PRIMARY KEY,                  -- 64 hex digits
    name TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,                  -- as services.daemon.containers.record.State
    image_id TEXT NOT NULL,               -- digest of the image's configuration
    record TEXT NOT NULL                  -- JSON: the rest of ContainerRecord
) STRICT, WITHOUT ROWID;
CREATE INDEX containers_image ON containers (image_id);

-- which container mounts which volume
CREATE TABLE volume_users (
    volume TEXT NOT NULL,
    container_id TEXT NOT NULL REFERENCES containers (id) ON DELETE CASCADE,
    PRIMARY KEY (volume, container_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX volume_users_container ON volume_users (container_id);

-- exec sessions; those of a container's earlier runs go when it starts again
CREATE TABLE execs (
    id TEXT PRIMARY KEY,                  -- 64 hex digits
    container_id TEXT NOT NULL REFERENCES containers (id) ON DELETE CASCADE,
    record TEXT NOT NULL                  -- JSON: the rest of ExecRecord
) STRICT, WITHOUT ROWID;
CREATE INDEX execs_container ON execs (container_id);

-- removed containers, for an hour: those who wait for their exit may come late
CREATE TABLE tombstones (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    exit_status TEXT,                     -- JSON: ExitStatus, or NULL when it never ran
    removed_at_ns INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

{VOLUMES_DDL}
{NETWORKS_DDL}
"""

MIGRATIONS: tuple[str, ...] = (_V1,)
