-- Spaces: made and deleted.

-- A name that can stand in an address and, with what is put before and behind it, in the name of a
-- view.
CREATE OR REPLACE FUNCTION ehub.require_name(what text, name text, longest int) RETURNS void
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF name IS NULL OR length(name) > longest OR name !~ '^[A-Za-z0-9_][A-Za-z0-9_.-]*$' THEN
        RAISE EXCEPTION '%''s name is 1 to % letters, digits, "_", "-" or ".", not %', what, longest,
            coalesce(quote_literal(left(name, 60)), 'NULL') USING ERRCODE = 'EH003';
    END IF;
END $$;

-- Make a space with a version "v1", which is current. Returns the version's id. M, ef_construction
-- and target_recall are those of its index; `partition_by` is a field of the metadata, by whose values
-- rows are searched apart, and which each row must have then. For who may call this (ehub.grant_create), and manages
-- the space then.
CREATE OR REPLACE FUNCTION ehub.create_space(
    name text,
    dims int,
    metric text DEFAULT 'l2',
    m int DEFAULT 16,
    ef_construction int DEFAULT 200,
    target_recall float8 DEFAULT 0.95,
    partition_by text DEFAULT NULL,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    me regrole := ehub.role_of(caller);
    made bigint;
    first bigint;
BEGIN
    PERFORM ehub.require_name('a space', $1, 40);
    PERFORM ehub.require_shape($1, $2, $3, $4, $5, $6);
    PERFORM ehub.require_partition_field($1, $7);
    INSERT INTO ehub.space (name) VALUES ($1) ON CONFLICT (name) DO NOTHING
    RETURNING id INTO made;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is a space % already', quote_literal($1) USING ERRCODE = 'EH002';
    END IF;
    first := ehub.add_version(made, 'v1', $2, $3, $4, $5, $6, NULL, $7);
    UPDATE ehub.space SET current_version_id = first WHERE id = made;
    PERFORM ehub.make_current($1, first);
    INSERT INTO ehub.access (space_id, role, privilege, rows, granted_by)
    SELECT made, a.role, a.privilege, a.rows, a.granted_by
    FROM ehub.access AS a WHERE a.space_id IS NULL AND a.privilege <> 'create'
    UNION
    SELECT made, me, 'admin', NULL, me::text WHERE NOT ehub.is_owner(me)
    ON CONFLICT DO NOTHING;
    PERFORM ehub.apply_access(made);
    PERFORM ehub.log_action(
        me, 'create_space', $1, jsonb_build_object('dims', $2, 'metric', $3, 'partition_by', $7)
    );
    PERFORM ehub.ring();
    RETURN first;
END $$;

CREATE OR REPLACE FUNCTION ehub.require_shape(
    space text, dims int, metric text, m int, ef_construction int, target_recall float8
) RETURNS void
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF dims IS NULL OR dims NOT BETWEEN 1 AND 16000 THEN
        RAISE EXCEPTION 'space %: dims is a number from 1 to 16000, not %', quote_literal($1), $2
            USING ERRCODE = 'EH005';
    ELSIF metric IS NULL OR metric NOT IN ('l2', 'cosine', 'ip') THEN
        RAISE EXCEPTION 'space %: metric is l2, cosine or ip, not %',
            quote_literal($1), coalesce(quote_literal($3), 'NULL') USING ERRCODE = 'EH005';
    ELSIF m IS NULL OR m NOT BETWEEN 2 AND 128 THEN
        RAISE EXCEPTION 'space %: M is a number from 2 to 128, not %', quote_literal($1), $4
            USING ERRCODE = 'EH005';
    ELSIF ef_construction IS NULL OR ef_construction NOT BETWEEN 4 AND 4096 THEN
        RAISE EXCEPTION 'space %: ef_construction is a number from 4 to 4096, not %',
            quote_literal($1), $5 USING ERRCODE = 'EH005';
    ELSIF target_recall IS NULL OR target_recall NOT BETWEEN 0.5 AND 0.999 THEN
        RAISE EXCEPTION 'space %: target_recall is a number from 0.5 to 0.999, not %',
            quote_literal($1), $6 USING ERRCODE = 'EH005';
    END IF;
END $$;

-- A version with all that belongs to it; with `source`, also that version's rows. They are there
-- before the triggers: nobody follows a version yet that nobody sees.
CREATE OR REPLACE FUNCTION ehub.add_version(
    space_id bigint,
    name text,
    dims int,
    metric text,
    m int,
    ef_construction int,
    target_recall float8,
    source bigint,
    partition_by text DEFAULT NULL
) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    space text := (SELECT s.name FROM ehub.space AS s WHERE s.id = space_id);
    version_id bigint;
BEGIN
    INSERT INTO ehub.version (space_id, name, dims, metric, partition_by)
    VALUES ($1, $2, $3, $4, $9)
    RETURNING id INTO version_id;
    INSERT INTO ehub.index (version_id, m, ef_construction, target_recall)
    VALUES (version_id, $5, $6, $7);
    PERFORM ehub.create_data_table(version_id, space, dims, metric);
    IF partition_by IS NOT NULL THEN
        PERFORM ehub.add_partitions(version_id, space, partition_by);
    END IF;
    IF source IS NOT NULL THEN
        EXECUTE format(
            'INSERT INTO ehub_data.%I (key, embedding, metadata)'
            ' SELECT key, embedding, metadata FROM ehub_data.%I ORDER BY key',
            'v' || version_id, 'v' || source
        );
    END IF;
    PERFORM ehub.create_log_triggers(version_id);
    PERFORM ehub.create_checks(version_id, metric, partition_by);
    EXECUTE format(
        'CREATE VIEW spaces.%I WITH (security_invoker = true) AS'
        ' SELECT key, embedding, metadata FROM ehub_data.%I',
        space || '@' || name, 'v' || version_id
    );
    RETURN version_id;
END $$;

-- Let the name of a space mean one of its versions: its view shows it, and it gets the mark of the current
-- version from the one that had it. In one moment: grants on the view stay, and so do the statements
-- that are under way, on the version that they began with.
--
-- The mark is an object in the catalogues, because these are looked up as they are at the moment, also by
-- a transaction with an older snapshot: to just such a one a view is what it is at the moment.
CREATE OR REPLACE FUNCTION ehub.make_current(space text, version_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    mark regclass;
BEGIN
    PERFORM ehub.show_version(space, version_id);
    FOR mark IN
        SELECT ehub.mark_of(v.id) FROM ehub.version AS v JOIN ehub.space AS s ON s.id = v.space_id
        WHERE s.name = make_current.space AND ehub.mark_of(v.id) IS NOT NULL
    LOOP
        EXECUTE format('DROP TYPE %s', mark);
    END LOOP;
    EXECUTE format('CREATE TYPE ehub_data.%I AS ()', 'current_v' || version_id);
END $$;

-- Show a version by the name of its space, or by its address.
CREATE OR REPLACE FUNCTION ehub.show_version(space text, version_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format(
        'CREATE OR REPLACE VIEW spaces.%I WITH (security_invoker = true) AS'
        ' SELECT key, embedding, metadata FROM ehub_data.%I',
        space, 'v' || version_id
    );
END $$;

-- The table of a version. Storage MAIN keeps vectors beside their keys: exact scans are several
-- times as fast as with the default, which moves them out of line.
CREATE OR REPLACE FUNCTION ehub.create_data_table(
    version_id bigint, space text, dims int, metric text
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format(
        'CREATE TABLE ehub_data.%I ('
        ' key text PRIMARY KEY,'
        ' embedding @vector@.vector STORAGE MAIN NOT NULL,'
        ' metadata jsonb NOT NULL DEFAULT ''{}'','
        ' CONSTRAINT valid CHECK (%s))',
        'v' || version_id, ehub.row_check(space, dims, metric)
    );
END $$;

-- Delete a space with all its versions. It waits for those who use them. For its admins.
CREATE OR REPLACE FUNCTION ehub.delete_space(
    name text,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM ehub.require_admin(caller, split_part($1, '@', 1));
    PERFORM ehub.require_own(split_part($1, '@', 1), 'ehub.detach ends that');
    PERFORM ehub.hold_average($1);
    PERFORM FROM ehub.space AS s WHERE s.name = $1 FOR UPDATE;
    PERFORM ehub.require_no_followers($1);
    IF strpos($1, '@') > 0 THEN
        RAISE EXCEPTION '% is a version, not a space', quote_literal($1) USING ERRCODE = 'EH003',
            HINT = 'ehub.drop_version drops a version';
    END IF;
    EXECUTE format('DROP VIEW spaces.%I', $1);
    UPDATE ehub.space AS s SET current_version_id = NULL WHERE s.name = $1;
    PERFORM ehub.remove_version($1, v.name, v.id)
    FROM ehub.version AS v JOIN ehub.space AS s ON s.id = v.space_id WHERE s.name = $1;
    PERFORM ehub.log_action(ehub.role_of(caller), 'delete_space', $1);
    DELETE FROM ehub.space AS s WHERE s.name = $1;
    PERFORM ehub.ring();
END $$;

-- Take away what ehub.add_version has made, and the images that checkpoints needed. What there may be
-- and is not is not worth a notice.
CREATE OR REPLACE FUNCTION ehub.remove_version(space text, version text, version_id bigint)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = warning AS $$
BEGIN
    PERFORM ehub.unfollow(version_id);
    EXECUTE format('DROP VIEW spaces.%I', space || '@' || version);
    EXECUTE format('DROP TABLE ehub_data.%I', 'v' || version_id);
    EXECUTE format('DROP TABLE IF EXISTS ehub_data.%I', 'h' || version_id);
    EXECUTE format('DROP FUNCTION IF EXISTS ehub_data.%I', 'keep_v' || version_id);
    EXECUTE format('DROP TYPE IF EXISTS ehub_data.%I', 'current_v' || version_id);
    PERFORM ehub.drop_checks(version_id);
    PERFORM ehub.forget_log($3);
    DELETE FROM ehub.version AS v WHERE v.id = $3;
END $$;
