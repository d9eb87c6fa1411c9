-- The triggers of ehub on data tables: which there are to be, made anew where they are not, and how a
-- search knows that one was switched off.
--
-- What changes rows fires statement triggers. What replication applies, and whoever sets
-- session_replication_role to replica, fires the row triggers in their place: replication comes a row at
-- a time, to tables and not to statements. TRUNCATE is a statement either way.

-- Have a function called after whatever changes rows of a table: after statements with what they changed
-- in tables new_rows and old_rows, after rows that replication applies with OLD and NEW. TRUNCATE keeps
-- nothing of what it took away; who needs that is called before it.
CREATE OR REPLACE FUNCTION ehub.add_triggers(
    relation text, prefix text, call text, truncate text DEFAULT 'AFTER'
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    trigger record;
BEGIN
    FOR trigger IN
        VALUES
            ('insert', 'AFTER INSERT', 'REFERENCING NEW TABLE AS new_rows', 'STATEMENT'),
            ('update', 'AFTER UPDATE', 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows', 'STATEMENT'),
            ('delete', 'AFTER DELETE', 'REFERENCING OLD TABLE AS old_rows', 'STATEMENT'),
            ('truncate', truncate || ' TRUNCATE', '', 'STATEMENT'),
            ('row', 'AFTER INSERT OR UPDATE OR DELETE', '', 'ROW')
    LOOP
        EXECUTE format(
            'CREATE OR REPLACE TRIGGER %I %s ON %s %s FOR EACH %s EXECUTE FUNCTION %s',
            prefix || trigger.column1, trigger.column2, relation, trigger.column3, trigger.column4, call
        );
    END LOOP;
    PERFORM ehub.switch_triggers(relation, prefix, 'ENABLE');
END $$;

-- Let the triggers of a prefix fire as they should, or switch them off.
CREATE OR REPLACE FUNCTION ehub.switch_triggers(relation text, prefix text, how text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE (
        SELECT format('ALTER TABLE %s %s', relation, string_agg(format(
            '%s %s TRIGGER %I', how,
            CASE WHEN how = 'ENABLE' THEN CASE t.fires WHEN 'A' THEN 'ALWAYS' WHEN 'R' THEN 'REPLICA' END END,
            prefix || t.name
        ), ', '))
        FROM ehub.trigger_kinds() AS t
    );
END $$;

-- What ehub.add_triggers makes: by what each name ends, and when it fires, as Postgres writes it in
-- pg_trigger.tgenabled.
CREATE OR REPLACE FUNCTION ehub.trigger_kinds() RETURNS TABLE (name text, fires "char")
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    VALUES ('insert', 'O'::"char"), ('update', 'O'), ('delete', 'O'), ('truncate', 'A'), ('row', 'R')
$$;

-- The triggers that the data table of a version is to have, and when they fire.
CREATE OR REPLACE FUNCTION ehub.triggers_due(version_id bigint)
RETURNS TABLE (name text, fires "char")
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH kind (prefix, switched_on) AS (
        SELECT 'ehub_log_', true
        UNION ALL
        SELECT 'ehub_keep_', EXISTS (SELECT FROM ehub.checkpoint AS c WHERE c.version_id = $1)
        WHERE to_regclass('ehub_data.h' || $1) IS NOT NULL
        UNION ALL
        SELECT 'ehub_average_' || ehub.like_of(v.id, a.space_id) || '_', true
        FROM ehub.version AS v JOIN ehub.average AS a ON a.source_id = v.space_id WHERE v.id = $1
    ), refusal (name) AS (
        SELECT 'ehub_frozen' FROM ehub.version AS v WHERE v.id = $1 AND v.frozen_at IS NOT NULL
        UNION ALL
        SELECT 'ehub_average'
        FROM ehub.version AS v JOIN ehub.average AS a ON a.space_id = v.space_id WHERE v.id = $1
    )
    SELECT k.prefix || t.name, CASE WHEN k.switched_on THEN t.fires ELSE 'D' END::"char"
    FROM kind AS k CROSS JOIN ehub.trigger_kinds() AS t
    UNION ALL
    SELECT r.name || t.ending, t.fires::"char"
    FROM refusal AS r CROSS JOIN (VALUES ('', 'A'), ('_row', 'R')) AS t (ending, fires)
$$;

-- What is not as it should be of the triggers of a version's data table; NULL if all is.
CREATE OR REPLACE FUNCTION ehub.wrong_triggers(version_id bigint) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT string_agg(format(
        'trigger %s %s', quote_ident(d.name), CASE
            WHEN t.tgname IS NULL THEN 'is missing'
            WHEN t.tgenabled = 'D' THEN 'is switched off'
            ELSE 'fires at other times' END
    ), ', ' ORDER BY d.name)
    FROM ehub.triggers_due($1) AS d
    LEFT JOIN pg_trigger AS t ON t.tgrelid = to_regclass('ehub_data.v' || $1) AND t.tgname = d.name
    WHERE t.tgenabled IS DISTINCT FROM d.fires
$$;

-- Make the triggers of a version's data table what they should be. It waits for those who write to it.
CREATE OR REPLACE FUNCTION ehub.fit_triggers(version_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    due text;
    follower record;
BEGIN
    PERFORM ehub.create_log_triggers($1);
    FOR due IN SELECT d.name FROM ehub.triggers_due($1) AS d LOOP
        IF due = 'ehub_keep_row' THEN
            PERFORM ehub.keep_images($1);
        ELSIF due IN ('ehub_frozen', 'ehub_average') THEN
            PERFORM ehub.add_refusal($1, due);
        END IF;
    END LOOP;
    FOR follower IN
        SELECT ehub.like_of(v.id, a.space_id) AS id
        FROM ehub.version AS v JOIN ehub.average AS a ON a.source_id = v.space_id WHERE v.id = $1
    LOOP
        PERFORM ehub.add_follower_triggers($1, follower.id);
    END LOOP;
END $$;

-- Have writes to a data table refused: 'ehub_frozen' all of them, 'ehub_average' those that are not its
-- source's triggers'.
CREATE OR REPLACE FUNCTION ehub.add_refusal(version_id bigint, name text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format(
        'CREATE OR REPLACE TRIGGER %1$I BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE'
        ' ON ehub_data.%3$I FOR EACH STATEMENT EXECUTE FUNCTION %4$s;'
        'CREATE OR REPLACE TRIGGER %2$I BEFORE INSERT OR UPDATE OR DELETE'
        ' ON ehub_data.%3$I FOR EACH ROW EXECUTE FUNCTION %4$s;'
        'ALTER TABLE ehub_data.%3$I ENABLE ALWAYS TRIGGER %1$I, ENABLE REPLICA TRIGGER %2$I',
        name, name || '_row', 'v' || version_id, (
            SELECT CASE $2
                WHEN 'ehub_frozen' THEN format('ehub.refuse_write(%L, %L)', s.name, v.name)
                WHEN 'ehub_average' THEN format('ehub.refuse_direct_write(%L)', s.name)
            END
            FROM ehub.version AS v JOIN ehub.space AS s ON s.id = v.space_id WHERE v.id = $1
        )
    );
END $$;

CREATE OR REPLACE FUNCTION ehub.create_log_triggers(version_id bigint) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT ehub.add_triggers(
        format('ehub_data.%I', 'v' || version_id), 'ehub_log_',
        format('ehub.log_change(%L)', version_id)
    )
$$;

-- Put the triggers right that somebody has dropped, switched off or switched on again in another way, as
-- pg_restore does. Of a space that somebody is managing, or a table that somebody uses, another time. Of one
-- version where it is named: each keeps writers from its table until the end of the transaction.
CREATE OR REPLACE FUNCTION ehub.tend_triggers(
    patience interval DEFAULT '0', only_version bigint DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    version_id bigint;
BEGIN
    FOR version_id IN
        SELECT v.id FROM ehub.version AS v
        WHERE v.id = coalesce(only_version, v.id) AND to_regclass('ehub_data.v' || v.id) IS NOT NULL
            AND ehub.wrong_triggers(v.id) IS NOT NULL
    LOOP
        PERFORM FROM ehub.space AS s JOIN ehub.version AS v ON v.space_id = s.id
        WHERE v.id = version_id FOR NO KEY UPDATE OF s SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        BEGIN
            PERFORM ehub.in_turns(
                format('ehub_data.v%s', version_id),
                format('SELECT ehub.fit_triggers(%s)', version_id), patience
            );
        EXCEPTION WHEN SQLSTATE 'EH018' THEN
            IF patience > '0' THEN
                RAISE;
            END IF;
        END;
    END LOOP;
END $$;

-- The data tables of versions, for every search: whether row policies hide rows of one, and what changes
-- whenever rows of it may have come, gone or changed without being logged: a table that was rewritten or
-- made anew, log triggers that somebody switched off, if only for a moment. An index that equals the
-- table under one token must be compared under another. For attached tables, which others may alter, see
-- ehub.attached_token.
CREATE OR REPLACE VIEW ehub.own_tables AS
SELECT v.id AS version_id, c.oid AS relation, c.relrowsecurity AS has_policies, md5(concat_ws(
    ' ', c.oid, c.relfilenode,
    ARRAY(
        SELECT concat(t.oid, ' ', t.tgenabled, ' ', t.xmin) FROM pg_trigger AS t
        WHERE t.tgrelid = c.oid AND t.tgfoid = 'ehub.log_change'::regproc ORDER BY t.oid
    )
)) AS token
FROM ehub.version AS v
JOIN pg_class AS c ON c.relname = ('v' || v.id)::name AND c.relnamespace = 'ehub_data'::regnamespace;

-- For everybody who asks for the indexes of a space; Postgres' catalogues show as much.
CREATE OR REPLACE FUNCTION ehub.own_token(version_id bigint) RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT t.token FROM ehub.own_tables AS t WHERE t.version_id = $1
$$;

-- Why no index can follow the data table of a version; NULL if it can.
CREATE OR REPLACE FUNCTION ehub.own_problem(version_id bigint) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    relation regclass := to_regclass('ehub_data.v' || $1);
BEGIN
    RETURN CASE
        WHEN ehub.unlogged($1, relation) THEN format(
            'triggers of ehub are missing or switched off on %s; `ehub doctor --mend` puts them right',
            relation
        )
        WHEN (SELECT c.relpersistence = 'u' FROM pg_class AS c WHERE c.oid = relation) THEN format(
            '%s is unlogged: a crash empties it, and no log says so; ALTER TABLE ... SET LOGGED', relation
        )
        WHEN EXISTS (SELECT FROM pg_inherits AS i WHERE relation IN (i.inhrelid, i.inhparent)) THEN format(
            '%s is a part of another table, or has parts, whose writers fire none of its triggers', relation
        )
    END;
END $$;

-- Of a relation that is being changed, the rows that this session has changed, as its statistics count
-- them (also those of transactions before, until Postgres has passed them on).
CREATE OR REPLACE FUNCTION ehub.counted_changes(relation oid) RETURNS bigint
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN pg_stat_get_xact_tuples_inserted(relation) + pg_stat_get_xact_tuples_updated(relation)
        + pg_stat_get_xact_tuples_deleted(relation);
END $$;

-- Remember, to the end of the transaction, how many changes of a relation are logged, by what logs them, for
-- a statement that has changed so many rows and that a function runs. Returns what was remembered.
--
-- All that was counted is logged at the end of a statement that a client has sent, and the log trigger
-- remembers that by itself. A statement that a function runs (PG_CONTEXT has more lines than the trigger's
-- own) may be a part of another one, whose changes are counted already and not logged yet: just its own are
-- added. Then what was counted before this transaction is not known, unless it wrote to the relation before;
-- so that nothing is, next time, statistics are passed on at its end.
CREATE OR REPLACE FUNCTION ehub.note_logged(relation oid, changed bigint) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    setting text := 'ehub.logged_' || relation;
BEGIN
    PERFORM pg_stat_force_next_flush();
    RETURN set_config(
        setting, (
            coalesce(substring(current_setting(setting, true), '^[0-9]{1,18}$'), '0')::bigint + changed
        )::text, true
    );
END $$;

-- Whether this transaction has changed rows of a version that are not in the log yet. That is so within
-- the statement that changes them: in its triggers, in what it calls, beside it in a WITH. The log is
-- written at its end, and its changes are seen already by what is VOLATILE.
--
-- Known by what was counted of the table when the log was written last (ehub.note_logged). What is counted
-- now may be of earlier transactions, unless the table is locked for writing. And in a trigger what was
-- counted when the log was written last may be of a statement that is still under way, so there, after the
-- table was written to, the answer is yes; likewise in what a function does after it wrote in the first
-- statement of a transaction, where nothing is remembered. An exact search is the worst that can come of it.
CREATE OR REPLACE FUNCTION ehub.has_unlogged_changes(version_id bigint) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    part oid;
    counts boolean;
    counted bigint;
BEGIN
    IF pg_current_xact_id_if_assigned() IS NULL THEN
        RETURN false;
    END IF;
    counts := current_setting('track_counts')::boolean;
    FOREACH part IN ARRAY ehub.tree_of(ehub.table_of($1)) LOOP
        counted := ehub.counted_changes(part);
        IF counts AND current_setting('ehub.logged_' || part, true) = counted::text THEN
            IF pg_trigger_depth() > 0 THEN
                RETURN true;
            END IF;
        ELSIF (counted > 0 OR NOT counts) AND EXISTS (
            SELECT FROM pg_locks AS l
            WHERE l.locktype = 'relation' AND l.relation = part
                AND l.pid = pg_backend_pid() AND l.mode = 'RowExclusiveLock'
        ) THEN
            RETURN true;
        END IF;
    END LOOP;
    RETURN false;
END $$;
