-- The change log: which keys each transaction changed, and the bell that wakes replicas.

-- Wake sleeping replicas, and only them.
--
-- A replica that goes to sleep holds advisory lock (ehub, 1) exclusively. A writer who gets that
-- lock shared knows that nobody sleeps and keeps it until its end, so that nobody can fall asleep
-- before its change can be seen. Replicas that are awake read the log anyway, and a NOTIFY on
-- every commit would cost most of the write rate: a notifying commit holds a lock of the whole
-- cluster through its flush. Nothing depends on the bell but promptness: `ALTER DATABASE … SET
-- ehub.doorbell = off` silences it (two-phase commit refuses transactions that have notified).
CREATE OR REPLACE FUNCTION ehub.ring() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF current_setting('ehub.doorbell', true) IS DISTINCT FROM 'off'
        AND NOT pg_try_advisory_xact_lock_shared(1701344610, 1)
    THEN
        PERFORM pg_notify('ehub', '');
    END IF;
END $$;

-- The log triggers of every data table (ehub.add_triggers). Argument: the version's id. A definer's
-- function, because writers have rights on their table and none on the log; it reads nothing but the
-- rows that were changed, and only the owner can attach it to a table.
--
-- Keys are logged in parts, for the sake of those who read them.
CREATE OR REPLACE FUNCTION ehub.log_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    version bigint := TG_ARGV[0];
    -- The rows that this statement has changed; NULL where all that was counted is logged (ehub.note_logged).
    changed bigint;
    context text;
BEGIN
    GET DIAGNOSTICS context = PG_CONTEXT;
    IF TG_LEVEL = 'ROW' THEN
        INSERT INTO ehub.change (version_id, keys)
        SELECT version, array_agg(DISTINCT key)
        FROM unnest(ARRAY[OLD.key, NEW.key]) AS key WHERE key IS NOT NULL;
    ELSIF TG_OP = 'INSERT' THEN
        INSERT INTO ehub.change (version_id, keys)
        SELECT version, array_agg(key)
        FROM (SELECT key, row_number() OVER () / 10000 AS part FROM new_rows) AS rows
        GROUP BY part;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO ehub.change (version_id, keys)
        SELECT version, array_agg(key)
        FROM (SELECT key, row_number() OVER () / 10000 AS part FROM old_rows) AS rows
        GROUP BY part;
    ELSIF TG_OP = 'UPDATE' THEN
        -- Both: an update may change the key itself.
        INSERT INTO ehub.change (version_id, keys)
        SELECT version, array_agg(key)
        FROM (
            SELECT key, row_number() OVER () / 10000 AS part
            FROM (SELECT key FROM new_rows UNION SELECT key FROM old_rows) AS changed
        ) AS rows
        GROUP BY part;
    ELSE
        INSERT INTO ehub.change (version_id, keys) VALUES (version, NULL);
    END IF;
    IF FOUND THEN
        PERFORM ehub.ring();
    END IF;
    -- A table that statements under way use is not truncated.
    IF ehub.is_run_by_a_function(context) AND TG_OP <> 'TRUNCATE' THEN
        IF TG_LEVEL = 'ROW' THEN
            changed := 1;
        ELSIF TG_OP = 'DELETE' THEN
            changed := (SELECT count(*) FROM old_rows);
        ELSE
            changed := (SELECT count(*) FROM new_rows);
        END IF;
    END IF;
    context := ehub.note_logged(TG_RELID, changed);
    RETURN NULL;
END $$;

-- The log of a version that a snapshot does not see: a row for each part, NULL where the whole
-- table changed or the log is gone. The second condition is for transactions that were running then;
-- bounded by xmin instead, one long transaction would make every read long.
CREATE OR REPLACE FUNCTION ehub.read_log(version bigint, watermark pg_snapshot)
RETURNS TABLE (keys text[])
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
BEGIN
    IF ehub.trimmed_below(version) > pg_snapshot_xmin(watermark) THEN
        RETURN QUERY SELECT NULL::text[];
        RETURN;
    END IF;
    RETURN QUERY SELECT c.keys FROM ehub.change AS c
    WHERE c.version_id = version
        AND (
            c.xid >= pg_snapshot_xmax(watermark)
            OR c.xid = ANY (ARRAY(SELECT pg_snapshot_xip(watermark)))
        );
END $$;

-- The same, for who sees all rows of the version.
CREATE OR REPLACE FUNCTION ehub.changes(
    version bigint,
    watermark pg_snapshot,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS TABLE (keys text[])
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT ehub.sees_all_rows(ehub.role_of(caller), version) THEN
        RAISE EXCEPTION 'the change log is for roles that see every row'
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN QUERY SELECT * FROM ehub.read_log(version, watermark);
END $$;

-- Below this transaction the log of a version is gone.
CREATE OR REPLACE FUNCTION ehub.trimmed_below(version bigint) RETURNS xid8
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN coalesce((
        SELECT t.below FROM ehub.trimmed AS t WHERE t.version_id = version
        ORDER BY t.below DESC LIMIT 1
    ), '0');
END $$;

-- Forget what no replica needs any more, of each version by itself: one that is held for long makes
-- no other long. Returns the number of log rows that went. A replica whose lease has run out counts
-- no longer: it rebuilds if it comes back.
--
-- For everybody, since it takes nothing from anybody. Whoever trims may stay in that transaction for ever,
-- so it holds nothing that others need: just rows of the log that nobody reads any more, which others
-- pass over, and what it adds to ehub.trimmed.
CREATE OR REPLACE FUNCTION ehub.trim() RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    -- Transactions that are still running have log rows to come.
    running xid8 := pg_snapshot_xmin(pg_current_snapshot());
    needed record;
    gone bigint;
    total bigint := 0;
BEGIN
    IF pg_is_in_recovery() OR NOT ehub.is_recognised() THEN
        RETURN 0;
    END IF;
    FOR needed IN
        -- The versions of which there is log, by steps through its index.
        WITH RECURSIVE logged (id) AS (
            SELECT min(c.version_id) FROM ehub.change AS c
            UNION ALL
            SELECT (SELECT min(c.version_id) FROM ehub.change AS c WHERE c.version_id > l.id)
            FROM logged AS l WHERE l.id IS NOT NULL
        )
        SELECT l.id, least(
            min(pg_snapshot_xmin(r.watermark)) FILTER (WHERE r.expires_at >= clock_timestamp()), running
        ) AS bound
        FROM logged AS l
        LEFT JOIN ehub.index AS i ON i.version_id = l.id
        LEFT JOIN ehub.replica AS r ON r.index_id = i.id
        WHERE l.id IS NOT NULL
        GROUP BY l.id
    LOOP
        gone := ehub.forget_log(needed.id, needed.bound);
        IF gone > 0 THEN
            DELETE FROM ehub.trimmed AS t WHERE t.id = ANY (ARRAY(
                SELECT o.id FROM ehub.trimmed AS o
                WHERE o.version_id = needed.id AND o.below <= needed.bound FOR UPDATE SKIP LOCKED
            ));
            INSERT INTO ehub.trimmed (version_id, below) VALUES (needed.id, needed.bound);
            total := total + gone;
        END IF;
    END LOOP;
    RETURN total;
END $$;

-- Delete log rows of a version, those below a transaction or all, but for those that somebody is deleting;
-- returns how many.
CREATE OR REPLACE FUNCTION ehub.forget_log(version bigint, below xid8 DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    gone bigint;
BEGIN
    DELETE FROM ehub.change AS c WHERE c.ctid = ANY (ARRAY(
        SELECT o.ctid FROM ehub.change AS o
        WHERE o.version_id = version AND (below IS NULL OR o.xid < below) FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS gone = ROW_COUNT;
    RETURN gone;
END $$;
