-- Attached spaces: tables that somebody has already, searched as spaces without moving a row. How such a
-- table is read; sql/attach.sql makes and ends them.
--
-- What belongs to one: a row in ehub.attachment; on the table the triggers ehub_v<version>_..., which log
-- the keys of changed rows; their function ehub_data.log_v<version>, and the functions that check
-- candidates, both made for the table as it was then. Everything else reads the table as it is: its
-- name, its key and its columns are looked up, so that nothing depends on it and it can be renamed,
-- altered and dropped as before. Who may read it is what Postgres says of it.
--
-- A key is the primary key as text, the metadata are the other columns. Of a column's value only what
-- built-in types and those of superusers make of it is looked at: the service reads tables of owners
-- whom it does not trust with its rights.

-- The key of a table, and how it is found by its text: as 'bigint', 'uuid' or 'text'; NULL for other
-- types, no row without a primary key of one column.
CREATE OR REPLACE FUNCTION ehub.attached_key(relation regclass)
RETURNS TABLE (name name, number smallint, type regtype, kind text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT a.attname, a.attnum, a.atttypid::regtype, CASE
        WHEN a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) THEN 'bigint'
        WHEN a.atttypid = 'uuid'::regtype THEN 'uuid'
        WHEN a.atttypid IN ('text'::regtype, 'varchar'::regtype) THEN 'text'
    END
    FROM pg_index AS i JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
    WHERE i.indrelid = $1 AND i.indisprimary AND i.indnkeyatts = 1;
END $$;

-- The column of the embeddings: by its name, or where there is none by its number, for it may have been
-- renamed (and a number may change when a dump is restored). No row where it is gone.
CREATE OR REPLACE FUNCTION ehub.attached_column(relation regclass, known_name text, known_number int)
RETURNS TABLE (name name, number smallint, type regtype, kind text, dims int)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT a.attname, a.attnum, a.atttypid::regtype, k.kind, nullif(a.atttypmod, -1)
    FROM pg_attribute AS a CROSS JOIN LATERAL (SELECT CASE
        WHEN a.atttypid = '@vector@.vector'::regtype THEN 'vector'
        WHEN a.atttypid = '@vector@.halfvec'::regtype THEN 'halfvec'
    END) AS k (kind)
    WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped
        AND (a.attname = $2 OR a.attnum = $3 AND k.kind IS NOT NULL)
    ORDER BY a.attname = $2 DESC LIMIT 1;
END $$;

-- A column as JSON sees it, as an expression; NULL where it is nothing to filter by. Times with a zone
-- are those of UTC, whatever the session's zone is. What DateStyle and extra_float_digits would change is
-- pinned by the functions that read rows.
CREATE OR REPLACE FUNCTION ehub.field_value(type oid, col text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    t record;
BEGIN
    SELECT y.typtype, y.typname, y.typbasetype, y.typcategory, y.typelem,
        y.oid < 16384 OR r.rolsuper AS trusted
    INTO t FROM pg_type AS y JOIN pg_roles AS r ON r.oid = y.typowner WHERE y.oid = type;
    RETURN CASE
        WHEN type IN (
            'bytea'::regtype, 'tsvector'::regtype, 'xml'::regtype, '@vector@.vector'::regtype,
            '@vector@.halfvec'::regtype, '@vector@.sparsevec'::regtype
        ) THEN NULL
        -- Of these it would be another text in other sessions, by IntervalStyle and the like.
        WHEN type < 16384 AND (
            t.typname IN ('interval', 'money', 'tstzrange', 'tstzmultirange') OR t.typname ~ '^reg'
        ) THEN NULL
        WHEN type = 'timestamptz'::regtype THEN format('(%s AT TIME ZONE ''UTC'')', col)
        WHEN t.typtype = 'd' THEN ehub.field_value(
            t.typbasetype, format('(%s)::%s', col, format_type(t.typbasetype, NULL))
        )
        -- Not as a cast to text, or to JSON, which its owner could have made.
        WHEN t.typtype = 'e' THEN format('textin(enum_out(%s))', col)
        WHEN t.typcategory = 'A' AND ehub.field_value(t.typelem, 'x') IS DISTINCT FROM 'x' THEN NULL
        WHEN t.typtype IN ('b', 'r', 'm') AND t.trusted THEN col
    END;
END $$;

-- The columns that serve as metadata.
CREATE OR REPLACE FUNCTION ehub.attached_fields(relation regclass)
RETURNS TABLE (field name, number smallint, type oid, collation_ oid)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT a.attname, a.attnum, a.atttypid, a.attcollation FROM pg_attribute AS a
    WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped
        AND ehub.field_value(a.atttypid, 'x') IS NOT NULL;
END $$;

-- An object of some columns, as an expression; `source` is what a column is in the statement, a format
-- for its name and its number.
CREATE OR REPLACE FUNCTION ehub.object_of(relation regclass, source text, fields text[] DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        -- A function takes a hundred arguments at most.
        SELECT coalesce(string_agg(part.object, ' || ' ORDER BY part.place), '''{}''::jsonb') FROM (
            SELECT f.place / 50 AS place, 'jsonb_build_object(' || string_agg(
                format('%L, ', f.field) || ehub.field_value(f.type, format(source, f.field, f.number)),
                ', ' ORDER BY f.place
            ) || ')' AS object
            FROM (
                SELECT *, row_number() OVER (ORDER BY number) - 1 AS place
                FROM ehub.attached_fields(relation) WHERE fields IS NULL OR field::text = ANY (fields)
            ) AS f
            GROUP BY f.place / 50
        ) AS part
    );
END $$;

-- The metadata of a row. It costs, so that statements make it of the rows that they return alone.
CREATE OR REPLACE FUNCTION ehub.as_metadata(fields jsonb) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE COST 10000 SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN fields;
END $$;

-- Conditions that cost nothing and hold always: a statement with them cannot be parsed once a view is in
-- the place of the table, or columns are of other types. Between what made the text of a statement and
-- its parsing the table's owner may have altered all of that, and would have it call functions of theirs
-- with the rights of whoever reads. Views cannot be sampled, and arrays have to be of the very same type;
-- the planner sees that nothing comes of either.
CREATE OR REPLACE FUNCTION ehub.still_is(
    relation regclass, key name, key_type oid, embedding name, embedding_type oid
) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN format(
        ' AND ((SELECT true FROM %s AS s TABLESAMPLE pg_catalog.system (0) LIMIT 1) OR true)', relation
    ) || (
        SELECT string_agg(format(
            ' AND pg_catalog.arrayoverlap(ARRAY[t.%I], NULL::%s[]) IS NULL',
            col.name, format_type(col.type, NULL)
        ), '')
        FROM (
            VALUES (key, key_type), (embedding, embedding_type)
            UNION SELECT f.field, f.type FROM ehub.attached_fields(relation) AS f
        ) AS col (name, type)
    );
END $$;

-- The rows of an attached table, as a relation in the text of a statement that needs a name: key,
-- embedding, metadata; besides pk, the key as it is, and c<number>, each column for conditions. NULL
-- where the table is not any more what it was attached as.
CREATE OR REPLACE FUNCTION ehub.attached_rows(relation regclass, name text, number int, dims int)
RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT format(
            -- Keys are what their bytes are, whatever else their own type takes for the same.
            '(SELECT t.%1$I::text COLLATE "C" AS key, t.%1$I AS pk, t.%2$I%3$s AS embedding,'
            ' ehub.as_metadata(%4$s) AS metadata%5$s FROM %6$s AS t WHERE t.%2$I IS NOT NULL%7$s%8$s)',
            k.name, c.name, CASE c.kind WHEN 'halfvec' THEN '::@vector@.vector' ELSE '' END,
            ehub.object_of($1, 't.%1$I'),
            (
                SELECT string_agg(format(', t.%I AS c%s', f.field, f.number), '' ORDER BY f.number)
                FROM ehub.attached_fields($1) AS f
            ),
            $1,
            -- Where the column takes any, the space is of those with its dims.
            CASE WHEN c.dims IS NULL THEN format(' AND @vector@.vector_dims(t.%I) = %s', c.name, $4) END,
            ehub.still_is($1, k.name, k.type, c.name, c.type)
        )
        FROM ehub.attached_key($1) AS k, ehub.attached_column($1, $2, $3) AS c
        WHERE k.kind IS NOT NULL AND c.kind IS NOT NULL AND coalesce(c.dims, $4) = $4
    );
END $$;

-- Keys of rows as bigints; what is no such key is left out.
CREATE OR REPLACE FUNCTION ehub.bigint_keys(keys text[]) RETURNS bigint[]
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN ARRAY(
        SELECT CASE
            WHEN key ~ '^(0|-?[1-9][0-9]{0,17})$' THEN key::bigint
            WHEN key ~ '^-?[1-9][0-9]{18}$' AND key::numeric BETWEEN -9223372036854775808
                AND 9223372036854775807 THEN key::bigint
        END
        FROM unnest(keys) AS key
    );
END $$;

CREATE OR REPLACE FUNCTION ehub.uuid_keys(keys text[]) RETURNS uuid[]
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN ARRAY(
        SELECT CASE WHEN key ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' THEN key::uuid END
        FROM unnest(keys) AS key
    );
END $$;

-- The filter as a condition on the rows that ehub.attached_rows describes. What a column's own type and
-- indexes can answer is asked of the column, the rest of an object of just the columns that matter.
CREATE OR REPLACE FUNCTION ehub.attached_condition(relation regclass, filter jsonb) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on AS $$
DECLARE
    part record;
    native text;
    conditions text[] := '{}';
    rest jsonb := '[]';
BEGIN
    PERFORM ehub.filter_path(filter);
    FOR part IN
        SELECT p.field AS path, p.word, p.wanted, f.*
        FROM ehub.filter_parts(filter) AS p
        LEFT JOIN ehub.attached_fields(relation) AS f
            ON ARRAY[f.field::text] = ehub.field_steps(p.field)
    LOOP
        native := ehub.column_condition(
            part.type, part.collation_, 'c' || part.number, part.wanted
        );
        IF native IS NOT NULL THEN
            conditions := conditions || native;
        ELSE
            rest := rest || jsonb_build_object(coalesce(part.path, part.word), part.wanted);
        END IF;
    END LOOP;
    IF rest <> '[]' THEN
        conditions := conditions || format(
            '(%s @@ %L::jsonpath)',
            ehub.object_of(
                relation, 'c%2$s', ARRAY(SELECT ehub.filter_fields(jsonb_build_object('and', rest)))
            ),
            ehub.filter_path(jsonb_build_object('and', rest))
        );
    END IF;
    RETURN '(' || coalesce(nullif(array_to_string(conditions, ' AND '), ''), 'true') || ')';
END $$;

-- What is asked of one field, as a condition on its column: true for just the rows for which the filter
-- is. NULL where that is not sure.
CREATE OR REPLACE FUNCTION ehub.column_condition(
    type oid, collation_ oid, col text, wanted jsonb
) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on AS $$
DECLARE
    -- The JSON that its values are, and those of them that are the same in both worlds.
    json_type text := CASE
        WHEN type = 'bool'::regtype THEN 'boolean'
        WHEN type IN (
            'int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'numeric'::regtype, 'float8'::regtype
        ) THEN 'number'
        WHEN type IN ('text'::regtype, 'varchar'::regtype, 'uuid'::regtype) THEN 'string'
    END;
    alike text := CASE
        WHEN type IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) THEN '^-?[0-9]{1,18}$'
        WHEN type = 'uuid'::regtype THEN '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
        -- Of fifteen digits at most: others become the next number that float8 has.
        WHEN json_type = 'number' THEN '^-?(?=.{1,16}$)[0-9]{0,15}(\.[0-9]{1,7})?$'
        ELSE ''
    END;
    operator text;
    value jsonb;
    choices jsonb;
    parts text[] := '{}';
BEGIN
    IF json_type IS NULL OR json_type = 'string' AND NOT (
        SELECT coalesce(bool_and(c.collisdeterministic), true) FROM pg_collation AS c
        WHERE c.oid = collation_
    ) THEN
        RETURN NULL;
    END IF;
    FOR operator, value IN SELECT * FROM jsonb_each(wanted) LOOP
        choices := CASE operator WHEN 'in' THEN value ELSE jsonb_build_array(value) END;
        IF operator NOT IN ('=', 'in', '<', '<=', '>', '>=')
            OR operator NOT IN ('=', 'in') AND json_type <> 'number'
            OR EXISTS (
                SELECT FROM jsonb_array_elements(choices) AS one
                WHERE jsonb_typeof(one) <> json_type OR one #>> '{}' !~ alike
            )
        THEN
            RETURN NULL;
        ELSIF operator IN ('=', 'in') THEN
            parts := parts || coalesce((
                SELECT format('%s IN (%s)', col, string_agg(
                    format('%L::%s', one #>> '{}', format_type(
                        CASE WHEN type IN ('int2'::regtype, 'int4'::regtype) THEN 'int8'::regtype
                            ELSE type END, NULL
                    )), ', '
                ))
                FROM jsonb_array_elements(choices) AS one HAVING count(*) > 0
            ), 'false');
        ELSE
            parts := parts || format('%s %s %s', col, operator, value);
            IF type IN ('numeric'::regtype, 'float8'::regtype) THEN
                -- These are strings in JSON.
                parts := parts || format('%s NOT IN (''NaN'', ''Infinity'', ''-Infinity'')', col);
            END IF;
        END IF;
    END LOOP;
    RETURN array_to_string(parts, ' AND ');
END $$;

-- The fields at the top of the metadata that a filter looks at.
CREATE OR REPLACE FUNCTION ehub.filter_fields(filter jsonb) RETURNS SETOF text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    one record;
BEGIN
    FOR one IN SELECT * FROM jsonb_each(filter) LOOP
        IF one.key IN ('and', 'or') THEN
            RETURN QUERY
            SELECT f FROM jsonb_array_elements(one.value) AS part, ehub.filter_fields(part) AS f;
        ELSIF one.key = 'not' THEN
            RETURN QUERY SELECT ehub.filter_fields(one.value);
        ELSE
            RETURN NEXT (ehub.field_steps(one.key))[1];
        END IF;
    END LOOP;
END $$;

-- What a table is called and has, and whose it is, as the functions that were made for it know it.
CREATE OR REPLACE FUNCTION ehub.attached_shape(relation regclass) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT md5(concat_ws(
            ' ', $1::text,
            (
                SELECT string_agg(
                    concat_ws(' ', a.attnum, a.attname, a.atttypid, a.atttypmod), ',' ORDER BY a.attnum
                )
                FROM pg_attribute AS a
                WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped
            ),
            (SELECT i.indkey::text FROM pg_index AS i WHERE i.indrelid = $1 AND i.indisprimary),
            (SELECT c.relowner FROM pg_class AS c WHERE c.oid = $1)
        ))
    );
END $$;

-- A table and its partitions, if it has any.
CREATE OR REPLACE FUNCTION ehub.tree_of(relation regclass) RETURNS oid[]
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    found oid[] := ARRAY[relation];
    below oid[] := found;
BEGIN
    -- Not by pg_partition_tree, which waits for whoever has locked one of them.
    LOOP
        below := ARRAY(
            -- One that is being detached concurrently is not read any more.
            SELECT i.inhrelid FROM pg_inherits AS i
            WHERE i.inhparent = ANY (below) AND NOT i.inhdetachpending
        );
        EXIT WHEN below = '{}';
        found := found || below;
    END LOOP;
    RETURN found;
END $$;

-- What changes whenever rows may have come, gone or changed without being logged: a table that was
-- rewritten, partitions that were attached, detached or truncated, triggers that somebody switched off,
-- if only for a moment; or where other columns are the key and the embedding. An index that equals the
-- table under one token must be compared under another.
--
-- Every search of such a space asks for it, so it is one statement.
CREATE OR REPLACE FUNCTION ehub.attached_token(
    version_id bigint, relation regclass, name text, number int
) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    log regproc := to_regproc('ehub_data.log_v' || $1);
    tree oid[] := ARRAY[$2::oid];
BEGIN
    IF EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhparent = $2) THEN
        tree := ehub.tree_of($2);
    END IF;
    RETURN md5(concat_ws(
        ' ',
        ARRAY(
            SELECT concat(c.oid, ' ', c.relfilenode, c.relispartition)
            FROM pg_class AS c WHERE c.oid = ANY (tree) ORDER BY c.oid
        ),
        ARRAY(
            SELECT concat(t.oid, t.tgenabled, t.xmin) FROM pg_trigger AS t
            WHERE t.tgrelid = ANY (tree) AND t.tgfoid = log ORDER BY t.oid
        ),
        (SELECT i.indkey FROM pg_index AS i WHERE i.indrelid = $2 AND i.indisprimary),
        (
            SELECT concat_ws(' ', a.attnum, a.atttypid, a.atttypmod) FROM pg_attribute AS a
            WHERE a.attrelid = $2 AND NOT a.attisdropped AND (a.attname = $3 OR a.attnum = $4)
            ORDER BY a.attname = $3 DESC LIMIT 1
        )
    ));
END $$;

-- Why no index can follow an attached table as it is, for a role that reads it for one; NULL if it can.
CREATE OR REPLACE FUNCTION ehub.attached_problem(
    version_id bigint, relation regclass, name text, number int, dims int, reader regrole
) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    shape record;
    key record;
    col record;
BEGIN
    SELECT c.relkind, c.relispartition INTO shape
    FROM pg_class AS c WHERE c.oid = relation;
    SELECT * INTO key FROM ehub.attached_key(relation);
    SELECT * INTO col FROM ehub.attached_column(relation, name, number);
    RETURN CASE
        WHEN shape IS NULL THEN 'its table is gone'
        WHEN key IS NULL OR key.kind IS NULL THEN format(
            '%s has no primary key of one column any more', relation
        )
        WHEN col IS NULL THEN format('%s has no column %I any more', relation, name)
        WHEN col.kind IS NULL OR coalesce(col.dims, dims) <> dims THEN format(
            'column %I of %s has no vectors of %s dims any more', col.name, relation, dims
        )
        WHEN EXISTS (
            SELECT FROM pg_class AS c
            WHERE c.oid = ANY (ehub.tree_of(relation)) AND c.relpersistence = 'u'
        ) THEN format('%s is unlogged: a crash empties it, and no log says so', relation)
        WHEN ehub.unlogged(version_id, relation) THEN format(
            'triggers of ehub are missing or switched off on %s; ehub.reattach makes them anew',
            relation
        )
        WHEN shape.relispartition THEN format('%s is a partition by now', relation)
        WHEN EXISTS (
            SELECT FROM pg_class AS c
            WHERE c.oid = ANY (ehub.tree_of(relation)) AND c.relpersistence <> 'p'
        ) THEN format('%s is unlogged: a crash empties it, and nobody hears of it', relation)
        WHEN shape.relkind <> 'p' AND EXISTS (
            SELECT FROM pg_inherits AS i WHERE i.inhparent = relation
        ) THEN format('%s has tables that inherit from it', relation)
        WHEN NOT has_table_privilege(reader, relation, 'SELECT')
            OR NOT has_schema_privilege(reader, (
                SELECT c.relnamespace FROM pg_class AS c WHERE c.oid = relation
            ), 'USAGE')
        THEN format('role %1$s may not read %2$s: GRANT SELECT ON %2$s TO %1$s', reader, relation)
        WHEN ehub.hides_rows(relation, reader) THEN format(
            'row policies of %s hide rows from role %s', relation, reader
        )
    END;
END $$;

-- Whether row policies of a table may hide rows from a role.
CREATE OR REPLACE FUNCTION ehub.hides_rows(relation regclass, role regrole) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT c.relrowsecurity
            AND NOT (SELECT r.rolsuper OR r.rolbypassrls FROM pg_roles AS r WHERE r.oid = role)
            AND (c.relforcerowsecurity OR NOT pg_has_role(role, c.relowner, 'USAGE'))
        FROM pg_class AS c WHERE c.oid = relation
    );
END $$;

-- Whether some change of a table would not be logged: see ehub.add_triggers and, for attached tables,
-- ehub.add_attached_triggers.
CREATE OR REPLACE FUNCTION ehub.unlogged(version_id bigint, relation regclass) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT bool_or(CASE
            WHEN c.relkind = 'p' AND c.oid = $2 THEN t.always < 2
            WHEN c.relispartition THEN t.always < 1
            ELSE t.origin < 4 OR t.replica < 1 OR t.always < 1
        END)
        FROM pg_class AS c CROSS JOIN LATERAL (
            SELECT count(*) FILTER (WHERE t.tgenabled IN ('O', 'A')) AS origin,
                count(*) FILTER (WHERE t.tgenabled IN ('R', 'A') AND t.tgtype & 1 = 1) AS replica,
                count(*) FILTER (WHERE t.tgenabled = 'A') AS always
            FROM pg_trigger AS t
            WHERE t.tgrelid = c.oid AND t.tgfoid = coalesce(
                to_regproc('ehub_data.log_v' || $1), 'ehub.log_change'::regproc
            )
        ) AS t
        WHERE c.oid = ANY (ehub.tree_of($2))
    );
END $$;

-- The attached spaces of those who may read or write the table, all of them for the owner of ehub; and why
-- no index follows it, if so.
CREATE OR REPLACE VIEW ehub.attached WITH (security_barrier) AS
SELECT s.name AS space, a.relation,
    coalesce(
        (SELECT c.name FROM ehub.attached_column(a.relation, a.column_name, a.column_number) AS c),
        a.column_name::name
    ) AS "column",
    v.metric, v.dims,
    ehub.attached_problem(
        v.id, a.relation, a.column_name, a.column_number, v.dims, ehub.owner()
    ) AS problem,
    v.id AS version_id,
    a.column_name AS known_as
FROM ehub.attachment AS a
JOIN ehub.version AS v ON v.id = a.version_id
JOIN ehub.space AS s ON s.id = v.space_id
WHERE (SELECT ehub.hear_of_revocations()) AND (
    has_table_privilege(a.relation, 'SELECT, INSERT, UPDATE, DELETE')
    OR pg_has_role(ehub.owner(), 'USAGE')
        AND EXISTS (SELECT FROM pg_class AS c WHERE c.oid = a.relation)
);

-- The space that a column of a table is attached as; the metric says which, where there are several.
CREATE OR REPLACE FUNCTION ehub.space_of(relation regclass, "column" name, metric text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    found text[] := ARRAY(
        SELECT a.space FROM ehub.attached AS a
        WHERE a.relation = $1 AND a.known_as = $2 AND a.metric = coalesce($3, a.metric)
    );
BEGIN
    IF found = '{}' THEN
        -- One that was renamed.
        found := ARRAY(
            SELECT a.space FROM ehub.attached AS a
            WHERE a.relation = $1 AND a."column" = $2 AND a.metric = coalesce($3, a.metric)
        );
    END IF;
    IF cardinality(found) = 1 THEN
        RETURN found[1];
    ELSIF cardinality(found) > 1 THEN
        RAISE EXCEPTION 'column % of % is attached as %', quote_ident($2), $1,
            array_to_string(found, ' and ') USING ERRCODE = 'EH005',
            HINT = 'say the metric, or search the space by its name';
    END IF;
    RAISE EXCEPTION 'column % of % is not attached%', quote_ident($2), $1,
        coalesce(' under metric ' || quote_literal($3), '') USING ERRCODE = 'EH001',
        HINT = format('its owner says SELECT ehub.attach(%L, %L)', $1, $2);
END $$;

-- Refuse what needs rows of ehub's own.
CREATE OR REPLACE FUNCTION ehub.require_own(space text, what text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_space(space);
BEGIN
    IF target.relation IS NOT NULL THEN
        RAISE EXCEPTION 'space % is attached to %: %', quote_literal(target.space), target.relation, what
            USING ERRCODE = 'EH027';
    END IF;
END $$;
