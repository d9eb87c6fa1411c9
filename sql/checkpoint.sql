-- Checkpoints: named states of a version that can be read again and restored.
--
-- A checkpoint copies nothing. From then on, whatever changes a row for the first time keeps its
-- image of before in table ehub_data.h<version>, under the checkpoint's id; a key that was not there
-- has an image without an embedding. So the state as of a checkpoint is, for each key, its first image
-- under that id or a later one, or else its row. Without checkpoints there is not even a trigger.

-- Remember the rows of a version as they are now. Waits for transactions that write to it.
CREATE OR REPLACE FUNCTION ehub.checkpoint(
    address text,
    checkpoint text,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_admin(caller, address);
BEGIN
    PERFORM ehub.require_name('a checkpoint', checkpoint, 60);
    PERFORM ehub.require_own(target.space, 'it has no checkpoints');
    -- Also in the order of their ids, which is that of the states.
    PERFORM ehub.stop_writers(target);
    IF EXISTS (
        SELECT FROM ehub.checkpoint AS c WHERE c.version_id = target.version_id AND c.name = $2
    ) THEN
        RAISE EXCEPTION '% has a checkpoint % already', quote_literal(ehub.address(target)),
            quote_literal($2) USING ERRCODE = 'EH014';
    END IF;
    IF to_regclass('ehub_data.h' || target.version_id) IS NULL THEN
        PERFORM ehub.create_images(target.version_id);
    END IF;
    INSERT INTO ehub.checkpoint (version_id, name, created_by)
    VALUES (target.version_id, $2, ehub.role_of(caller)::text);
    PERFORM ehub.keep_images(target.version_id);
    PERFORM ehub.log_action(
        ehub.role_of(caller), 'checkpoint', target.space,
        jsonb_build_object('version', target.version, 'checkpoint', $2)
    );
END $$;

-- The table of images, and the trigger function that fills it: a function of its own for each
-- version, whose statements are planned once a session. It has its owner's rights, because writers
-- have none on the images; it reads nothing but the rows that were changed and the table that is being
-- truncated, and only the owner can attach it to a table. Its argument is the latest checkpoint.
CREATE OR REPLACE FUNCTION ehub.create_images(version_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format(
        'CREATE TABLE IF NOT EXISTS ehub_data.%I ('
        ' key text, checkpoint bigint, embedding @vector@.vector STORAGE MAIN, metadata jsonb,'
        ' PRIMARY KEY (key, checkpoint))',
        'h' || version_id
    );
    EXECUTE format(
        $template$
            CREATE OR REPLACE FUNCTION ehub_data.%1$I() RETURNS trigger
            LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
            DECLARE
                latest bigint := TG_ARGV[0];
            BEGIN
                IF TG_LEVEL = 'ROW' THEN
                    IF TG_OP <> 'INSERT' THEN
                        INSERT INTO ehub_data.%2$I
                        VALUES (OLD.key, latest, OLD.embedding, OLD.metadata)
                        ON CONFLICT DO NOTHING;
                    END IF;
                    IF TG_OP <> 'DELETE' AND NEW.key IS DISTINCT FROM OLD.key THEN
                        INSERT INTO ehub_data.%2$I VALUES (NEW.key, latest)
                        ON CONFLICT DO NOTHING;
                    END IF;
                ELSIF TG_OP = 'UPDATE' THEN
                    INSERT INTO ehub_data.%2$I
                    SELECT o.key, latest, o.embedding, o.metadata FROM old_rows AS o
                    WHERE NOT EXISTS (
                        SELECT FROM ehub_data.%2$I AS h
                        WHERE h.key = o.key AND h.checkpoint = latest
                    )
                    UNION ALL
                    -- An update may change the key itself.
                    SELECT n.key, latest, NULL, NULL FROM new_rows AS n
                    WHERE n.key NOT IN (SELECT o.key FROM old_rows AS o)
                    ON CONFLICT DO NOTHING;
                ELSIF TG_OP = 'INSERT' THEN
                    INSERT INTO ehub_data.%2$I
                    SELECT n.key, latest FROM new_rows AS n
                    ON CONFLICT DO NOTHING;
                ELSIF TG_OP = 'DELETE' THEN
                    INSERT INTO ehub_data.%2$I
                    SELECT o.key, latest, o.embedding, o.metadata FROM old_rows AS o
                    ON CONFLICT DO NOTHING;
                ELSE
                    INSERT INTO ehub_data.%2$I
                    SELECT t.key, latest, t.embedding, t.metadata FROM ehub_data.%3$I AS t
                    ON CONFLICT DO NOTHING;
                END IF;
                RETURN NULL;
            END $body$
        $template$,
        'keep_v' || version_id, 'h' || version_id, 'v' || version_id
    );
    EXECUTE format('REVOKE ALL ON FUNCTION ehub_data.%I FROM PUBLIC', 'keep_v' || version_id);
END $$;

-- Have the triggers keep what the latest checkpoint needs, or nothing where there is none. For a
-- transaction that has stopped the writers: those that come then have these triggers, whatever their
-- snapshots, for triggers are not looked up in snapshots.
CREATE OR REPLACE FUNCTION ehub.keep_images(version_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    latest bigint := (
        SELECT max(c.id) FROM ehub.checkpoint AS c WHERE c.version_id = $1
    );
    relation text := format('ehub_data.%I', 'v' || version_id);
BEGIN
    PERFORM ehub.add_triggers(
        relation, 'ehub_keep_', format('ehub_data.%I(%L)', 'keep_v' || version_id, coalesce(latest, 0)),
        'BEFORE'
    );
    IF latest IS NULL THEN
        -- To drop them would keep readers out.
        PERFORM ehub.switch_triggers(relation, 'ehub_keep_', 'DISABLE');
    END IF;
END $$;

-- The id of a checkpoint; one that is unknown is an error.
CREATE OR REPLACE FUNCTION ehub.require_checkpoint(target ehub.catalogue, checkpoint text)
RETURNS bigint
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    found bigint := (
        SELECT c.id FROM ehub.checkpoints AS c
        WHERE c.version_id = target.version_id AND c.checkpoint = $2
    );
BEGIN
    PERFORM ehub.require_own(target.space, 'it has no checkpoints');
    IF found IS NULL THEN
        RAISE EXCEPTION '% has no checkpoint %', quote_literal(ehub.address(target)),
            coalesce(quote_literal(left($2, 60)), 'NULL') USING ERRCODE = 'EH012',
            HINT = 'SELECT checkpoint FROM ehub.checkpoints lists them';
    END IF;
    RETURN found;
END $$;

-- The images that tell the state as of a checkpoint from the present one, for those who see all rows.
CREATE OR REPLACE FUNCTION ehub.images(
    version_id bigint,
    checkpoint bigint,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS TABLE (key text, embedding @vector@.vector, metadata jsonb)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
BEGIN
    IF NOT ehub.sees_all_rows(ehub.role_of(caller), $1) THEN
        RAISE EXCEPTION 'checkpoints are for roles that see every row'
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN QUERY EXECUTE format(
        'SELECT DISTINCT ON (key) key, embedding, metadata FROM ehub_data.%I'
        ' WHERE checkpoint >= $1 ORDER BY key, checkpoint',
        'h' || $1
    ) USING $2;
END $$;

-- The rows of a version as of a checkpoint, as a relation in the text of a statement.
CREATE OR REPLACE FUNCTION ehub.relation_at(target ehub.catalogue, checkpoint text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format(
        $relation$(
            WITH images AS MATERIALIZED (
                SELECT * FROM ehub.images(%1$s, %2$s)
            )
            SELECT t.key, t.embedding, t.metadata FROM ehub_data.%3$I AS t
            WHERE NOT EXISTS (SELECT FROM images AS i WHERE i.key = t.key)
            UNION ALL
            SELECT i.key, i.embedding, i.metadata FROM images AS i WHERE i.embedding IS NOT NULL
        )$relation$,
        target.version_id, ehub.require_checkpoint(target, checkpoint), 'v' || target.version_id
    )
$$;

-- The rows of a version as of a checkpoint: all, or those of some keys.
CREATE OR REPLACE FUNCTION ehub.rows_at(address text, checkpoint text, keys text[] DEFAULT NULL)
RETURNS TABLE (key text, embedding @vector@.vector, metadata jsonb)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY EXECUTE format(
        'SELECT * FROM %s AS rows WHERE $1 IS NULL OR key = ANY ($1)',
        ehub.relation_at(ehub.require_space(address), checkpoint)
    ) USING ehub.as_list('keys', keys);
END $$;

-- The exact neighbours of a query among the rows as of a checkpoint.
CREATE OR REPLACE FUNCTION ehub.nearest_at(
    address text, checkpoint text, query @vector@.vector, k int, leave_out text DEFAULT NULL
) RETURNS TABLE (key text, distance float8, metadata jsonb)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_space(address);
BEGIN
    PERFORM ehub.require_query(target, query, k);
    RETURN QUERY EXECUTE format(
        'SELECT key, 0.0 + (embedding %s $1) AS distance, metadata FROM %s AS rows'
        ' WHERE $3 IS NULL OR key <> $3 ORDER BY distance, key LIMIT $2',
        ehub.distance_operator(target.metric), ehub.relation_at(target, checkpoint)
    ) USING query, k, leave_out;
END $$;

-- Put the rows of a version back to what they were at a checkpoint: in one transaction, by changes
-- like any others, of the rows that differ. Waits for transactions that write to it.
CREATE OR REPLACE FUNCTION ehub.restore(
    address text,
    checkpoint text,
    caller ehub.caller DEFAULT ehub.me(),
    OUT written bigint,
    OUT deleted bigint
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_admin(caller, address);
    number bigint;
    relation text := format('ehub_data.%I', 'v' || target.version_id);
    images text;
BEGIN
    PERFORM ehub.require_own(target.space, 'it has no checkpoints');
    PERFORM ehub.require_no_average(address);
    PERFORM ehub.stop_writers(target);
    number := ehub.require_checkpoint(target, $2);
    images := format('ehub.images(%s, %s)', target.version_id, number);
    EXECUTE format(
        'DELETE FROM %s AS t USING %s AS i WHERE i.embedding IS NULL AND t.key = i.key',
        relation, images
    );
    GET DIAGNOSTICS deleted = ROW_COUNT;
    EXECUTE format(
        'INSERT INTO %1$s (key, embedding, metadata)'
        ' SELECT i.key, i.embedding, i.metadata FROM %2$s AS i LEFT JOIN %1$s AS t ON t.key = i.key'
        ' WHERE i.embedding IS NOT NULL AND'
        ' ROW(i.embedding, i.metadata)::record OPERATOR(pg_catalog.*<>) ROW(t.embedding, t.metadata)::record'
        ' ON CONFLICT (key) DO UPDATE'
        ' SET embedding = EXCLUDED.embedding, metadata = EXCLUDED.metadata',
        relation, images
    );
    GET DIAGNOSTICS written = ROW_COUNT;
    PERFORM ehub.log_action(
        ehub.role_of(caller), 'restore', target.space, jsonb_build_object(
            'version', target.version, 'checkpoint', $2, 'written', written, 'deleted', deleted
        )
    );
END $$;

-- Forget a checkpoint, and the images that only it needed.
CREATE OR REPLACE FUNCTION ehub.drop_checkpoint(
    address text,
    checkpoint text,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_admin(caller, address);
    images text := format('ehub_data.%I', 'h' || target.version_id);
    gone bigint;
    earlier bigint;
BEGIN
    PERFORM ehub.require_own(target.space, 'it has no checkpoints');
    PERFORM ehub.stop_writers(target);
    gone := ehub.require_checkpoint(target, $2);
    DELETE FROM ehub.checkpoint AS c WHERE c.id = gone;
    SELECT max(c.id) INTO earlier FROM ehub.checkpoint AS c
    WHERE c.version_id = target.version_id AND c.id < gone;
    IF earlier IS NOT NULL THEN
        -- What has an image from the earlier one on needs no other; the rest is as it was then.
        EXECUTE format(
            'DELETE FROM %1$s AS h USING %1$s AS e'
            ' WHERE h.checkpoint = $1 AND e.key = h.key AND e.checkpoint = $2',
            images
        ) USING gone, earlier;
        EXECUTE format('UPDATE %s SET checkpoint = $2 WHERE checkpoint = $1', images)
            USING gone, earlier;
    ELSIF EXISTS (SELECT FROM ehub.checkpoint AS c WHERE c.version_id = target.version_id) THEN
        EXECUTE format('DELETE FROM %s WHERE checkpoint = $1', images) USING gone;
    ELSE
        EXECUTE format('TRUNCATE %s', images);
    END IF;
    PERFORM ehub.keep_images(target.version_id);
    PERFORM ehub.log_action(
        ehub.role_of(caller), 'drop_checkpoint', target.space,
        jsonb_build_object('version', target.version, 'checkpoint', $2)
    );
END $$;

-- The checkpoints of the versions, in their order, with the number of images that are kept for each.
CREATE OR REPLACE VIEW ehub.checkpoints WITH (security_barrier) AS
SELECT
    c.space, c.version, p.name AS checkpoint, p.created_at, p.created_by, c.version_id, p.id
FROM ehub.checkpoint AS p JOIN ehub.catalogue AS c ON c.version_id = p.version_id
ORDER BY c.space, c.version_id, p.id;

-- Images that are older than what keeps them.
SELECT ehub.create_images(v.id) FROM ehub.version AS v
WHERE to_regclass('ehub_data.h' || v.id) IS NOT NULL;
