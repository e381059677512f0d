"""The schema of containerd's database, ``<root>/meta.db``, as an ordered tuple of migrations.

Everything but ``meta``, ``blobs`` and ``journal`` is per namespace. Labels and other string maps
are JSON objects. Times are nanoseconds since the epoch. Files and rows are kept in step by one
rule: a file exists before its row and outlives it; a file without a row is rubbish.

    namespaces ─┬─ content ──▶ blobs          (<root>/content/blobs/<algorithm>/<hex>)
                ├─ ingests                     (<root>/content/ingest/<id>/)
                ├─ images                      name ─▶ target descriptor
                ├─ snapshots ─▶ parent         (<root>/snapshots/<snapshotter>/<id>/)
                ├─ snapshot_leftovers          of snapshots that another service keeps
                ├─ containers
                ├─ sandboxes
                └─ leases ──▶ lease_resources
    journal: every event, in order            meta: epoch and the like
"""

from __future__ import annotations

_V1 = """
-- single facts: 'epoch' (integer, grows with every start)
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

CREATE TABLE namespaces (
    name TEXT PRIMARY KEY,
    labels TEXT NOT NULL DEFAULT '{}'
) STRICT;

-- blobs whose file is complete, verified and on the disk
CREATE TABLE blobs (
    digest TEXT PRIMARY KEY,              -- algorithm:hex
    size_bytes INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- which namespace sees which blob, with its labels there
CREATE TABLE content (
    namespace TEXT NOT NULL,
    digest TEXT NOT NULL REFERENCES blobs (digest),
    labels TEXT NOT NULL DEFAULT '{}',
    created_at_ns INTEGER NOT NULL,
    updated_at_ns INTEGER NOT NULL,
    PRIMARY KEY (namespace, digest)
) STRICT, WITHOUT ROWID;
CREATE INDEX content_digest ON content (digest);

-- writes under way: a ref is locked by the one who writes it
CREATE TABLE ingests (
    namespace TEXT NOT NULL,
    ref TEXT NOT NULL,
    id TEXT NOT NULL UNIQUE,              -- directory name below ingest/
    total_bytes INTEGER NOT NULL,         -- 0: not known
    expected TEXT NOT NULL,               -- digest, or empty
    labels TEXT NOT NULL DEFAULT '{}',
    started_at_ns INTEGER NOT NULL,
    updated_at_ns INTEGER NOT NULL,
    PRIMARY KEY (namespace, ref)
) STRICT, WITHOUT ROWID;

CREATE TABLE images (
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    media_type TEXT NOT NULL,             -- of the target
    digest TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    annotations TEXT NOT NULL DEFAULT '{}',
    labels TEXT NOT NULL DEFAULT '{}',
    created_at_ns INTEGER NOT NULL,
    updated_at_ns INTEGER NOT NULL,
    PRIMARY KEY (namespace, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY AUTOINCREMENT, -- directory name; never used twice
    snapshotter TEXT NOT NULL,
    namespace TEXT NOT NULL,
    key TEXT NOT NULL,
    parent_id INTEGER REFERENCES snapshots (id),
    kind INTEGER NOT NULL,                -- 1 view, 2 active, 3 committed (as snapshots.Kind)
    inodes INTEGER NOT NULL DEFAULT 0,    -- usage of a committed snapshot
    size_bytes INTEGER NOT NULL DEFAULT 0,
    labels TEXT NOT NULL DEFAULT '{}',
    created_at_ns INTEGER NOT NULL,
    updated_at_ns INTEGER NOT NULL,
    UNIQUE (snapshotter, namespace, key)
) STRICT;
CREATE INDEX snapshots_parent ON snapshots (parent_id);

CREATE TABLE containers (
    namespace TEXT NOT NULL,
    id TEXT NOT NULL,
    labels TEXT NOT NULL DEFAULT '{}',
    image TEXT NOT NULL,
    runtime_name TEXT NOT NULL,
    runtime_options_type TEXT NOT NULL,   -- Any; both empty: none
    runtime_options BLOB NOT NULL,
    spec_type TEXT NOT NULL,
    spec BLOB NOT NULL,
    snapshotter TEXT NOT NULL,
    snapshot_key TEXT NOT NULL,
    extensions TEXT NOT NULL DEFAULT '{}',-- name -> [type_url, base64 value]
    sandbox TEXT NOT NULL DEFAULT '',
    created_at_ns INTEGER NOT NULL,
    updated_at_ns INTEGER NOT NULL,
    PRIMARY KEY (namespace, id)
) STRICT, WITHOUT ROWID;

CREATE TABLE leases (
    namespace TEXT NOT NULL,
    id TEXT NOT NULL,
    labels TEXT NOT NULL DEFAULT '{}',
    created_at_ns INTEGER NOT NULL,
    PRIMARY KEY (namespace, id)
) STRICT, WITHOUT ROWID;

CREATE TABLE lease_resources (
    namespace TEXT NOT NULL,
    lease TEXT NOT NULL,
    type TEXT NOT NULL,                   -- content, ingests, snapshots/<snapshotter>, images
    id TEXT NOT NULL,
    PRIMARY KEY (namespace, lease, type, id),
    FOREIGN KEY (namespace, lease) REFERENCES leases (namespace, id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

-- every event of the node; seq has no gaps
CREATE TABLE journal (
    seq INTEGER PRIMARY KEY,
    timestamp_ns INTEGER NOT NULL,
    namespace TEXT NOT NULL,
    topic TEXT NOT NULL,
    type_url TEXT NOT NULL,
    value BLOB NOT NULL,
    shim TEXT,                            -- instance id of the shim that reported it, or NULL
    shim_seq INTEGER                      -- its sequence number there
) STRICT;
CREATE UNIQUE INDEX journal_shim ON journal (shim, shim_seq) WHERE shim IS NOT NULL;

-- how far each shim's events are in the journal; outlives their truncation, ends with the bundle
CREATE TABLE shim_progress (
    shim TEXT PRIMARY KEY,                -- instance id
    last_seq INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""

# A namespace comes to be when something is first recorded in it.
_NAMESPACE_TRIGGERS = "".join(
    f"""
CREATE TRIGGER {table}_namespace AFTER INSERT ON {table} BEGIN
    INSERT OR IGNORE INTO namespaces (name) VALUES (new.namespace);
END;
"""
    for table in ("content", "ingests", "images", "snapshots", "containers", "leases")
)

# Snapshots that another service keeps. A row that goes, however it goes, leaves behind what that
# service is still to be told; so does one that never came to be.
_V2 = """
-- what the service that keeps the snapshot calls it; empty: it is a directory of ours
ALTER TABLE snapshots ADD COLUMN backend TEXT NOT NULL DEFAULT '';

-- what such a service may have, and no row refers to: to be removed there, in this order
CREATE TABLE snapshot_leftovers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    snapshotter TEXT NOT NULL,
    namespace TEXT NOT NULL,
    backend TEXT NOT NULL,
    UNIQUE (snapshotter, namespace, backend)
) STRICT;

CREATE TRIGGER snapshots_leftover AFTER DELETE ON snapshots WHEN old.backend <> '' BEGIN
    INSERT OR IGNORE INTO snapshot_leftovers (snapshotter, namespace, backend)
    VALUES (old.snapshotter, old.namespace, old.backend);
END;
"""

_V3 = """
-- sandboxes as clients record them; which there really are, shims know
CREATE TABLE sandboxes (
    namespace TEXT NOT NULL,
    id TEXT NOT NULL,
    labels TEXT NOT NULL,                 -- JSON object
    runtime_name TEXT NOT NULL,
    runtime_options_type TEXT NOT NULL,   -- type URL; empty: there are none
    runtime_options BLOB NOT NULL,
    spec_type TEXT NOT NULL,
    spec BLOB NOT NULL,
    extensions TEXT NOT NULL,             -- JSON object: name to [type URL, base64]
    sandboxer TEXT NOT NULL,              -- name of the controller
    created_at_ns INTEGER NOT NULL,
    updated_at_ns INTEGER NOT NULL,
    PRIMARY KEY (namespace, id)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER sandboxes_namespace AFTER INSERT ON sandboxes BEGIN
    INSERT OR IGNORE INTO namespaces (name) VALUES (new.namespace);
END;
"""

MIGRATIONS: tuple[str, ...] = (_V1 + _NAMESPACE_TRIGGERS, _V2, _V3)
