-- What replicas tell the database: how far they are, and how they are.

-- Acknowledge a watermark: the state as of it will not be lost by its holder, so the log before it
-- may go. The nonce is new with each acknowledgement: a holder whose nonce differs from the stored
-- one has been overtaken (a failover, a restored backup) and must compare everything. Crashes use
-- transaction ids again, so this must be on disk before the holder relies on it.
--
-- For who may know all that is in the index. A lease is for a day at the most.
CREATE OR REPLACE FUNCTION ehub.acknowledge(
    id uuid,
    index_id bigint,
    place text,
    watermark pg_snapshot,
    nonce uuid,
    rows bigint,
    lease interval,
    state text DEFAULT 'building',
    caller ehub.caller DEFAULT ehub.me()
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    me regrole := ehub.role_of(caller);
BEGIN
    IF NOT EXISTS (
        SELECT FROM ehub.index AS i WHERE i.id = $2 AND ehub.sees_all_rows(me, i.version_id)
    ) THEN
        RAISE EXCEPTION 'an index is for roles that see every row'
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF current_setting('synchronous_commit') IN ('off', 'local') THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    INSERT INTO ehub.replica (
        id, index_id, role, place, state, watermark, nonce, applied, expires_at, rows
    )
    VALUES (
        $1, $2, me::text, left($3, 200), $8, $4, $5, $4,
        clock_timestamp() + least(lease, '1 day'), $6
    )
    ON CONFLICT ON CONSTRAINT replica_pkey DO UPDATE
    SET place = EXCLUDED.place,
        watermark = EXCLUDED.watermark,
        nonce = EXCLUDED.nonce,
        acknowledged_at = clock_timestamp(),
        expires_at = EXCLUDED.expires_at;
END $$;

-- Report how a replica is, and renew its lease. False if it has none any more. Like all that follows,
-- for whoever knows its id, which nobody is told.
CREATE OR REPLACE FUNCTION ehub.report(
    id uuid, index_id bigint, state text, rows bigint, tombstones bigint, ef int, recall float8,
    memory bigint, last_error text, applied pg_snapshot, lease interval
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE ehub.replica AS r
    SET state = $3, rows = $4, tombstones = $5, ef = $6, recall = $7, memory = $8,
        last_error = left($9, 1000), applied = $10, reported_at = clock_timestamp(),
        expires_at = clock_timestamp() + least(lease, '1 day')
    WHERE r.id = $1 AND r.index_id = $2;
    RETURN FOUND;
END $$;

-- The name of a replica's last acknowledgement; NULL if it has no lease.
CREATE OR REPLACE FUNCTION ehub.acknowledged(id uuid, index_id bigint) RETURNS uuid
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT r.nonce FROM ehub.replica AS r WHERE r.id = $1 AND r.index_id = $2
$$;

CREATE OR REPLACE FUNCTION ehub.forget_replica(id uuid, index_id bigint) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    DELETE FROM ehub.replica AS r WHERE r.id = $1 AND r.index_id = $2
$$;

-- What tells this database from all others.
CREATE OR REPLACE FUNCTION ehub.identity() RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN concat_ws(
        '/',
        (SELECT c.system_identifier FROM pg_control_system() AS c),
        (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
    );
END $$;

-- Whether the log and what replicas say are of this database, as far as is known.
CREATE OR REPLACE FUNCTION ehub.is_recognised() RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN coalesce(
        (SELECT s.value = ehub.identity() FROM ehub.setting AS s WHERE s.name = 'system'), false
    );
END $$;

-- Notice that this database has been restored from a dump, or copied: transaction ids are others
-- then, and what the log and the replicas say of them means nothing. For the owner.
CREATE OR REPLACE FUNCTION ehub.recognise() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    known text;
BEGIN
    IF ehub.is_recognised() THEN
        RETURN;
    END IF;
    LOCK TABLE ehub.setting IN SHARE ROW EXCLUSIVE MODE;
    SELECT s.value INTO known FROM ehub.setting AS s WHERE s.name = 'system';
    IF known <> ehub.identity() THEN
        DELETE FROM ehub.change;
        DELETE FROM ehub.replica;
        DELETE FROM ehub.trimmed;
        PERFORM ehub.recover_attachments();
    END IF;
    INSERT INTO ehub.setting VALUES ('system', ehub.identity())
    ON CONFLICT (name) DO UPDATE SET value = EXCLUDED.value;
END $$;
