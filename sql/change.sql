-- The change log: which keys each transaction changed, and the bell that wakes replicas.

-- Wake sleeping replicas, and only them, a few times a second at most.
--
-- A replica that goes to sleep holds advisory lock (ehub, 1) exclusively. A writer who gets that
-- lock shared knows that nobody sleeps and keeps it until its end, so that nobody can fall asleep
-- before its change can be seen. Who is awake reads the log anyway.
--
-- A commit that notifies holds a lock of the whole cluster through its flush, so it must not be every
-- one: whoever is rung wakes up, and somebody who holds the lock and does not hear is rung in vain.
-- ehub.bell is when the bell was rung last; a sequence, because all see at once what it is set to. Who
-- was rung stays awake for longer than the bell rests. A transaction rings once, or while it lasts it
-- would keep all others from ringing.
--
-- Nothing depends on the bell but promptness: `ALTER DATABASE ... SET ehub.doorbell = off` silences it
-- (two-phase commit refuses transactions that have notified).
CREATE OR REPLACE FUNCTION ehub.ring() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    now bigint := 1000 * extract(epoch FROM clock_timestamp());
BEGIN
    IF pg_try_advisory_xact_lock_shared(1701344610, 1)
        OR current_setting('ehub.doorbell', true) = 'off'
        OR current_setting('ehub.rung', true) = 'yes'
        -- Also where the clock was put back.
        OR (SELECT now - b.last_value FROM ehub.bell AS b) BETWEEN 0 AND 200
    THEN
        RETURN;
    END IF;
    PERFORM set_config('ehub.rung', 'yes', true), setval('ehub.bell', now), pg_notify('ehub', '');
END $$;

-- The log triggers of every data table (ehub.add_triggers). Argument: the version's id. A definer's
-- function, because writers have rights on their table and none on the log; it reads nothing but the
-- rows that were changed, and only the owner can attach it to a table.
--
-- It is in the way of every statement that writes, so what each of them needs stands here and not in
-- functions, and what few need comes last. Keys are logged in parts, for the sake of those who read them.
CREATE OR REPLACE FUNCTION ehub.log_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    keys text[];
    before text[];
    changed bigint;
    context text;
BEGIN
    IF TG_OP = 'INSERT' AND TG_LEVEL = 'STATEMENT' THEN
        keys := ARRAY(SELECT key FROM new_rows LIMIT 10001);
    ELSIF TG_LEVEL = 'ROW' THEN
        keys := array_remove(ARRAY[NEW.key, nullif(OLD.key, NEW.key)], NULL);
    ELSIF TG_OP = 'DELETE' THEN
        keys := ARRAY(SELECT key FROM old_rows LIMIT 10001);
    ELSIF TG_OP = 'UPDATE' THEN
        keys := ARRAY(SELECT key FROM new_rows LIMIT 10001);
        before := ARRAY(SELECT key FROM old_rows LIMIT 10001);
        IF keys <> before THEN
            -- An update may change the key itself.
            keys := ARRAY(SELECT unnest(keys) UNION SELECT unnest(before));
        END IF;
    END IF;
    IF cardinality(keys) BETWEEN 1 AND 10000 OR keys IS NULL THEN
        INSERT INTO ehub.change (version_id, keys) VALUES (TG_ARGV[0]::bigint, keys);
    ELSIF keys <> '{}' THEN
        EXECUTE ehub.log_in_parts(TG_ARGV[0]::bigint, TG_OP, 'key', 'true');
    END IF;
    IF NOT pg_try_advisory_xact_lock_shared(1701344610, 1) THEN
        PERFORM ehub.ring();
    END IF;
    IF now() <> statement_timestamp() THEN
        -- Something may follow in this transaction.
        GET DIAGNOSTICS context = PG_CONTEXT;
        IF strpos(context, E'\n') = 0 OR TG_OP = 'TRUNCATE' THEN
            context := set_config('ehub.logged_' || TG_RELID, (
                pg_stat_get_xact_tuples_inserted(TG_RELID) + pg_stat_get_xact_tuples_updated(TG_RELID)
                + pg_stat_get_xact_tuples_deleted(TG_RELID)
            )::text, true);
        ELSE
            IF TG_LEVEL = 'ROW' THEN
                changed := 1;
            ELSIF TG_OP = 'DELETE' THEN
                changed := (SELECT count(*) FROM old_rows);
            ELSE
                changed := (SELECT count(*) FROM new_rows);
            END IF;
            context := ehub.note_logged(TG_RELID, changed);
        END IF;
    END IF;
    RETURN NULL;
END $$;

-- For a log trigger: what logs the keys of a statement that has changed so many rows that one array would
-- be too large. `key` is the expression for one, `condition` which rows count.
CREATE OR REPLACE FUNCTION ehub.log_in_parts(version bigint, operation text, key text, condition text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    new_keys text := format('SELECT (%s) COLLATE "C" AS key FROM new_rows AS r WHERE %s', key, condition);
    old_keys text := format('SELECT (%s) COLLATE "C" AS key FROM old_rows AS r WHERE %s', key, condition);
BEGIN
    RETURN format(
        'INSERT INTO ehub.change (version_id, keys) SELECT %s, array_agg(key) FROM ('
        ' SELECT key, row_number() OVER () / 10000 AS part FROM (%s) AS rows'
        ') AS rows GROUP BY part', version, CASE operation
            WHEN 'INSERT' THEN new_keys
            WHEN 'DELETE' THEN old_keys
            ELSE new_keys || ' UNION ' || old_keys
        END
    );
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
