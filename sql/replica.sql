-- What replicas tell the database: how far they are, and how they are.

-- Acknowledge a watermark: the state as of it will not be lost by its holder, so the log before it
-- may go. The nonce is new with each acknowledgement: a holder whose nonce differs from the stored
-- one has been overtaken (a failover, a restored backup) and must compare everything. Crashes use
-- transaction ids again, so this must be on disk before the holder relies on it.
CREATE OR REPLACE FUNCTION ehub.acknowledge(
    id uuid, index_id bigint, place text, watermark pg_snapshot, nonce uuid, rows bigint,
    lease interval, state text DEFAULT 'building'
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF current_setting('synchronous_commit') IN ('off', 'local') THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    INSERT INTO ehub.replica (
        id, index_id, place, state, watermark, nonce, applied, expires_at, rows
    )
    VALUES ($1, $2, $3, $8, $4, $5, $4, clock_timestamp() + lease, $6)
    ON CONFLICT ON CONSTRAINT replica_pkey DO UPDATE
    SET place = EXCLUDED.place,
        watermark = EXCLUDED.watermark,
        nonce = EXCLUDED.nonce,
        acknowledged_at = clock_timestamp(),
        expires_at = EXCLUDED.expires_at;
END $$;

-- Report how a replica is, and renew its lease. False if it has none any more.
CREATE OR REPLACE FUNCTION ehub.report(
    id uuid, index_id bigint, state text, rows bigint, tombstones bigint, ef int, recall float8,
    memory bigint, last_error text, applied pg_snapshot, lease interval
) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE ehub.replica AS r
    SET state = $3, rows = $4, tombstones = $5, ef = $6, recall = $7, memory = $8,
        last_error = $9, applied = $10, reported_at = clock_timestamp(), expires_at = clock_timestamp() + lease
    WHERE r.id = $1 AND r.index_id = $2;
    RETURN FOUND;
END $$;

CREATE OR REPLACE FUNCTION ehub.forget_replica(id uuid, index_id bigint) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    DELETE FROM ehub.replica AS r WHERE r.id = $1 AND r.index_id = $2
$$;

-- Notice that this database has been restored from a dump, or copied: transaction ids are others
-- then, and what the log and the replicas say of them means nothing. `system` and `database` are what
-- tells one database from all others.
CREATE OR REPLACE FUNCTION ehub.recognise(system bigint, database bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    here text := system || '/' || database;
    known text;
BEGIN
    SELECT s.value INTO known FROM ehub.setting AS s WHERE s.name = 'system';
    IF known IS DISTINCT FROM here THEN
        PERFORM pg_advisory_xact_lock(1701344610, 5);
        SELECT s.value INTO known FROM ehub.setting AS s WHERE s.name = 'system';
        IF known <> here THEN
            DELETE FROM ehub.change;
            DELETE FROM ehub.replica;
            DELETE FROM ehub.setting AS s WHERE s.name = 'trimmed_below';
        END IF;
        INSERT INTO ehub.setting VALUES ('system', here)
        ON CONFLICT (name) DO UPDATE SET value = EXCLUDED.value;
    END IF;
END $$;
