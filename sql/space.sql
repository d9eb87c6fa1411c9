-- Spaces: made and deleted.

-- Make a space: a version "v1", its data table, its log triggers, its view. Returns the version's
-- id. M, ef_construction and target_recall are those of its index.
CREATE OR REPLACE FUNCTION ehub.create_space(
    name text,
    dims int,
    metric text DEFAULT 'l2',
    m int DEFAULT 16,
    ef_construction int DEFAULT 200,
    target_recall float8 DEFAULT 0.95
) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    space_id bigint;
    version_id bigint;
BEGIN
    IF name IS NULL OR name !~ '^[A-Za-z0-9_][A-Za-z0-9_.-]{0,39}$' THEN
        RAISE EXCEPTION 'a space''s name is 1 to 40 letters, digits, "_", "-" or ".", not %',
            coalesce(quote_literal(left($1, 60)), 'NULL') USING ERRCODE = 'EH003';
    ELSIF dims IS NULL OR dims NOT BETWEEN 1 AND 16000 THEN
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

    INSERT INTO ehub.space (name) VALUES ($1) ON CONFLICT (name) DO NOTHING
    RETURNING id INTO space_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is a space % already', quote_literal($1) USING ERRCODE = 'EH002';
    END IF;
    INSERT INTO ehub.version (space_id, name, dims, metric) VALUES (space_id, 'v1', $2, $3)
    RETURNING id INTO version_id;
    INSERT INTO ehub.index (version_id, m, ef_construction, target_recall)
    VALUES (version_id, $4, $5, $6);
    UPDATE ehub.space SET current_version_id = version_id WHERE id = space_id;

    PERFORM ehub.create_data_table(version_id, $1, $2, $3);
    EXECUTE format(
        'CREATE VIEW spaces.%I WITH (security_invoker = true) AS'
        ' SELECT key, embedding, metadata FROM ehub_data.%I',
        $1, 'v' || version_id
    );
    PERFORM ehub.ring();
    RETURN version_id;
END $$;

-- The table of a version, and what belongs to it. Storage MAIN keeps vectors beside their keys: exact
-- scans are several times as fast as with the default, which moves them out of line.
CREATE OR REPLACE FUNCTION ehub.create_data_table(
    version_id bigint, space text, dims int, metric text
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    relation text := format('ehub_data.%I', 'v' || version_id);
    trigger record;
BEGIN
    EXECUTE format(
        'CREATE TABLE %s ('
        ' key text PRIMARY KEY,'
        ' embedding @vector@.vector STORAGE MAIN NOT NULL,'
        ' metadata jsonb NOT NULL DEFAULT ''{}'','
        ' CONSTRAINT valid CHECK (%s))',
        relation, ehub.row_check(space, dims, metric)
    );
    FOR trigger IN
        VALUES
            ('INSERT', 'REFERENCING NEW TABLE AS new_rows'),
            ('UPDATE', 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows'),
            ('DELETE', 'REFERENCING OLD TABLE AS old_rows'),
            ('TRUNCATE', '')
    LOOP
        EXECUTE format(
            'CREATE TRIGGER %I AFTER %s ON %s %s'
            ' FOR EACH STATEMENT EXECUTE FUNCTION ehub.log_change(%L)',
            'ehub_log_' || lower(trigger.column1), trigger.column1, relation, trigger.column2,
            version_id
        );
    END LOOP;
    PERFORM ehub.create_checks(version_id, metric);
END $$;

-- Delete a space with all its rows. It waits for those who use them.
CREATE OR REPLACE FUNCTION ehub.delete_space(name text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    version record;
BEGIN
    PERFORM FROM ehub.space AS s WHERE s.name = $1 FOR UPDATE;
    PERFORM ehub.require_space($1);
    EXECUTE format('DROP VIEW spaces.%I', $1);
    FOR version IN
        SELECT v.id FROM ehub.version AS v JOIN ehub.space AS s ON s.id = v.space_id
        WHERE s.name = $1
    LOOP
        EXECUTE format('DROP TABLE ehub_data.%I', 'v' || version.id);
        PERFORM ehub.drop_checks(version.id);
        DELETE FROM ehub.change AS c WHERE c.version_id = version.id;
    END LOOP;
    UPDATE ehub.space AS s SET current_version_id = NULL WHERE s.name = $1;
    DELETE FROM ehub.space AS s WHERE s.name = $1;
    PERFORM ehub.ring();
END $$;
