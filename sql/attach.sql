-- Attached spaces: tables that somebody has already, searched as spaces without moving a row.
--
-- What belongs to one: a row in ehub.attachment; on the table the triggers ehub_v<version>_…, which log
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
-- are those of UTC, whatever the session's zone is.
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
            '(SELECT t.%1$I::text AS key, t.%1$I AS pk, t.%2$I%3$s AS embedding,'
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
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT array_agg(CASE
        WHEN key ~ '^(0|-?[1-9][0-9]{0,17})$' THEN key::bigint
        WHEN key ~ '^-?[1-9][0-9]{18}$' AND key::numeric BETWEEN -9223372036854775808
            AND 9223372036854775807 THEN key::bigint
    END)
    FROM unnest(keys) AS key
$$;

CREATE OR REPLACE FUNCTION ehub.uuid_keys(keys text[]) RETURNS uuid[]
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT array_agg(CASE
        WHEN key ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' THEN key::uuid
    END)
    FROM unnest(keys) AS key
$$;

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
CREATE OR REPLACE FUNCTION ehub.attached_token(
    version_id bigint, relation regclass, name text, number int
) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    -- Found once: searches ask for it all the time.
    tree oid[] := ehub.tree_of($2);
    log oid := to_regproc('ehub_data.log_v' || $1);
    facts text;
    key record;
    col record;
BEGIN
    SELECT string_agg(concat_ws(' ', c.oid, c.relfilenode, t.states), ',' ORDER BY c.oid)
    INTO facts
    FROM pg_class AS c CROSS JOIN LATERAL (
        SELECT string_agg(t.oid || t.tgenabled::text || t.xmin, ' ' ORDER BY t.oid) AS states
        FROM pg_trigger AS t WHERE t.tgrelid = c.oid AND t.tgfoid = log
    ) AS t
    WHERE c.oid = ANY (tree);
    SELECT * INTO key FROM ehub.attached_key($2);
    SELECT * INTO col FROM ehub.attached_column($2, $3, $4);
    RETURN md5(
        concat_ws(' ', facts, key.number, key.type::oid, col.number, col.type::oid, col.dims)
    );
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
    SELECT c.relkind, c.relrowsecurity, c.relforcerowsecurity, c.relowner INTO shape
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
        WHEN shape.relkind <> 'p' AND EXISTS (
            SELECT FROM pg_inherits AS i WHERE i.inhparent = relation
        ) THEN format('%s has tables that inherit from it', relation)
        WHEN NOT has_table_privilege(reader, relation, 'SELECT')
            OR NOT has_schema_privilege(reader, (
                SELECT c.relnamespace FROM pg_class AS c WHERE c.oid = relation
            ), 'USAGE')
        THEN format('role %s may not read %s', reader, relation)
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

-- Whether some change of a table would not be logged: see ehub.add_attached_triggers.
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
            WHERE t.tgrelid = c.oid AND t.tgfoid = to_regproc('ehub_data.log_v' || $1)
        ) AS t
        WHERE c.oid = ANY (ehub.tree_of($2))
    );
END $$;

-- Make the function that logs changes of an attached table, for the key that it has now. It must never
-- fail: if the table has other columns by then, or of other types, it logs that everything may have
-- changed. Nor run anything of the table's owner, who could make a cast of the key's type by then: keys
-- become text by what puts a type out (concat), which only superusers can define.
CREATE OR REPLACE FUNCTION ehub.create_attached_log(
    version_id bigint, key name, embedding name
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format(
        $head$
            CREATE OR REPLACE FUNCTION ehub_data.%1$I() RETURNS trigger
            LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS %L
        $head$,
        'log_v' || version_id, format(
            $body$
            DECLARE
                changed text[];
            BEGIN
                BEGIN
                    IF TG_LEVEL = 'ROW' THEN
                        IF TG_OP <> 'INSERT' THEN
                            changed := ARRAY[concat(OLD.%2$I)];
                        END IF;
                        IF TG_OP <> 'DELETE' THEN
                            changed := changed || concat(NEW.%2$I);
                        END IF;
                    ELSIF TG_OP = 'INSERT' THEN
                        PERFORM n.%2$I, n.%3$I FROM new_rows AS n LIMIT 0;
                        changed := '{}';
                    ELSIF TG_OP = 'DELETE' THEN
                        PERFORM o.%2$I, o.%3$I FROM old_rows AS o LIMIT 0;
                        changed := '{}';
                    ELSIF TG_OP = 'UPDATE' THEN
                        PERFORM n.%2$I, n.%3$I FROM new_rows AS n LIMIT 0;
                        changed := '{}';
                    END IF;
                EXCEPTION WHEN OTHERS THEN
                    changed := NULL;
                END;
                IF changed IS NULL OR changed <> '{}' THEN
                    INSERT INTO ehub.change (version_id, keys) VALUES (%4$s, changed);
                ELSIF TG_OP = 'INSERT' THEN
                    INSERT INTO ehub.change (version_id, keys)
                    SELECT %4$s, array_agg(key) FROM (
                        SELECT concat(n.%2$I) AS key, row_number() OVER () / 10000 AS part
                        FROM new_rows AS n WHERE n.%3$I IS NOT NULL
                    ) AS rows GROUP BY part;
                ELSIF TG_OP = 'DELETE' THEN
                    INSERT INTO ehub.change (version_id, keys)
                    SELECT %4$s, array_agg(key) FROM (
                        SELECT concat(o.%2$I) AS key, row_number() OVER () / 10000 AS part
                        FROM old_rows AS o WHERE o.%3$I IS NOT NULL
                    ) AS rows GROUP BY part;
                ELSE
                    INSERT INTO ehub.change (version_id, keys)
                    SELECT %4$s, array_agg(key) FROM (
                        SELECT key, row_number() OVER () / 10000 AS part FROM (
                            SELECT concat(n.%2$I) AS key FROM new_rows AS n
                            UNION SELECT concat(o.%2$I) FROM old_rows AS o
                        ) AS changed
                    ) AS rows GROUP BY part;
                END IF;
                IF FOUND THEN
                    PERFORM ehub.ring();
                END IF;
                RETURN NULL;
            END
            $body$,
            'log_v' || version_id, key, embedding, version_id
        )
    );
END $$;

-- Let the owner of an attached table, and nobody else, make triggers that call the function.
CREATE OR REPLACE FUNCTION ehub.give_attached_log(version_id bigint, relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    function text := format('ehub_data.%I()', 'log_v' || version_id);
    owner oid := (SELECT c.relowner FROM pg_class AS c WHERE c.oid = relation);
    holder oid;
BEGIN
    FOR holder IN
        SELECT a.grantee FROM pg_proc AS p,
            aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
        WHERE p.oid = function::regprocedure AND a.grantee NOT IN (p.proowner, owner)
    LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM %s', function, ehub.holder(holder));
    END LOOP;
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', function, owner::regrole);
END $$;

-- Have changes of a table logged, by its owner.
--
-- Of an ordinary table a statement at a time; what replication applies comes a row at a time, and fires
-- just the triggers that say so. Partitions can be written by themselves, which fires no trigger of the
-- whole; and triggers that all of them have, those to come too, know no statements.
CREATE OR REPLACE FUNCTION ehub.add_attached_triggers(version_id bigint, relation regclass)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    prefix text := format('ehub_v%s_', version_id);
    call text := format('ehub_data.%I()', 'log_v' || version_id);
    partitioned boolean := (SELECT c.relkind = 'p' FROM pg_class AS c WHERE c.oid = relation);
BEGIN
    IF partitioned THEN
        EXECUTE format(
            'CREATE TRIGGER %I AFTER TRUNCATE ON %s FOR EACH STATEMENT EXECUTE FUNCTION %s',
            prefix || 'truncate', relation, call
        );
    ELSE
        PERFORM ehub.add_statement_triggers(relation::text, prefix, call);
    END IF;
    EXECUTE format(
        'CREATE TRIGGER %I AFTER INSERT OR UPDATE OR DELETE ON %s FOR EACH ROW EXECUTE FUNCTION %s',
        prefix || 'row', relation, call
    );
    EXECUTE format(
        'ALTER TABLE %1$s ENABLE ALWAYS TRIGGER %2$I, ENABLE %4$s TRIGGER %3$I',
        relation, prefix || 'truncate', prefix || 'row',
        CASE WHEN partitioned THEN 'ALWAYS' ELSE 'REPLICA' END
    );
END $$;

-- Attach a table: search the embeddings in one of its columns as a space, by the primary key of the
-- table, with its other columns as metadata. Returns the name of the space: that of the table where
-- none is given.
--
-- The metric is by default that of pgvector's index on the column, else 'l2'. `dims` is needed where the
-- column takes any and has rows of several: then the space is of those rows. For the owner of the table;
-- writers to it wait while the triggers are made, which waits for transactions that write to it, in
-- turns that keep others from it for 0.1 s at most.
CREATE OR REPLACE FUNCTION ehub.attach(
    relation regclass,
    "column" name,
    name text DEFAULT NULL,
    metric text DEFAULT NULL,
    dims int DEFAULT NULL,
    m int DEFAULT 16,
    ef_construction int DEFAULT 200,
    target_recall float8 DEFAULT 0.95
) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    -- What the service reads it with.
    granted boolean := NOT has_table_privilege(ehub.owner(), $1, 'SELECT');
    made bigint;
    found int[];
BEGIN
    PERFORM ehub.require_read_committed($1::text);
    PERFORM ehub.require_attachable($1, $2);
    $5 := coalesce($5, (SELECT c.dims FROM ehub.attached_column($1, $2, NULL) AS c));
    IF $5 IS NULL THEN
        EXECUTE format(
            'SELECT array_agg(dims ORDER BY dims) FROM ('
            ' SELECT DISTINCT @vector@.vector_dims(%1$I) AS dims FROM %2$s WHERE %1$I IS NOT NULL'
            ') AS d', $2, $1
        ) INTO found;
        IF cardinality(found) > 1 OR found IS NULL THEN
            RAISE EXCEPTION 'column % of % takes vectors of any dims, and has %', quote_ident($2), $1,
                coalesce('some of ' || array_to_string(found, ', '), 'none') USING ERRCODE = 'EH028',
                HINT = 'dims => a number says of which the space is';
        END IF;
        $5 := found[1];
    END IF;
    PERFORM ehub.in_turns(
        $1::text, format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', $1), '1 minute'
    );
    IF granted THEN
        EXECUTE format('GRANT SELECT ON %s TO %s', $1, ehub.owner());
    END IF;
    made := ehub.add_attached($1, $2, $3, $4, $5, $6, $7, $8, granted);
    PERFORM ehub.add_attached_triggers(made, $1);
    RETURN (SELECT a.space FROM ehub.attached AS a WHERE a.version_id = made);
END $$;

-- Refuse a table or column that cannot be attached, and say why.
CREATE OR REPLACE FUNCTION ehub.require_attachable(relation regclass, "column" name) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    shape record;
    key record;
    col record;
    why text;
    hint text;
BEGIN
    SELECT c.*, n.nspname INTO shape
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = $1;
    IF shape IS NULL THEN
        RAISE EXCEPTION 'there is no such table' USING ERRCODE = 'EH028';
    END IF;
    SELECT * INTO key FROM ehub.attached_key($1);
    SELECT * INTO col FROM ehub.attached_column($1, $2, NULL);
    IF shape.nspname IN ('ehub', 'ehub_data', 'spaces', 'pg_catalog', 'information_schema') THEN
        why := 'belongs to ' || CASE WHEN shape.nspname ~ '^ehub|^spaces$' THEN 'ehub' ELSE 'Postgres' END;
    ELSIF shape.relkind NOT IN ('r', 'p') THEN
        why := 'is ' || CASE shape.relkind
            WHEN 'v' THEN 'a view' WHEN 'm' THEN 'a materialized view' WHEN 'f' THEN 'a foreign table'
            ELSE 'no table' END;
        hint := 'attach the table that has the rows';
    ELSIF shape.relpersistence = 't' THEN
        why := 'is temporary, and nobody else can read it';
    ELSIF EXISTS (
        SELECT FROM pg_class AS c WHERE c.oid = ANY (ehub.tree_of($1)) AND c.relpersistence = 'u'
    ) THEN
        why := 'is unlogged: a crash empties it, and no log says so';
        hint := 'ALTER TABLE … SET LOGGED';
    ELSIF shape.relispartition THEN
        why := 'is a partition';
        hint := 'attach the whole table';
    ELSIF EXISTS (
        SELECT FROM pg_class AS c WHERE c.oid = ANY (ehub.tree_of($1)) AND c.relkind = 'f'
    ) THEN
        why := 'has partitions that are foreign tables';
    ELSIF shape.relkind = 'r' AND EXISTS (
        SELECT FROM pg_inherits AS i WHERE $1 IN (i.inhparent, i.inhrelid)
    ) THEN
        why := 'inherits from a table, or has tables that inherit from it';
    ELSIF NOT pg_has_role(shape.relowner, 'USAGE') THEN
        RAISE EXCEPTION 'role % does not own %', quote_ident(current_user), $1
            USING ERRCODE = 'insufficient_privilege',
            HINT = format('%s does', shape.relowner::regrole);
    ELSIF key IS NULL THEN
        why := 'has no primary key of one column';
        hint := 'a key tells the rows apart; ALTER TABLE … ADD PRIMARY KEY (…)';
    ELSIF key.kind IS NULL THEN
        why := format('has a primary key of type %s', key.type);
        hint := 'it may be of type smallint, integer, bigint, uuid, text or varchar';
    ELSIF col IS NULL THEN
        why := format('has no column %I', $2);
        hint := (
            SELECT 'it has ' || string_agg(format('%I', a.attname), ', ' ORDER BY a.attnum)
            FROM pg_attribute AS a WHERE a.attrelid = $1 AND NOT a.attisdropped AND a.atttypid IN (
                '@vector@.vector'::regtype, '@vector@.halfvec'::regtype
            )
        );
    ELSIF col.kind IS NULL THEN
        why := format('has a column %I of type %s', $2, col.type);
        hint := 'a column of embeddings is of type vector or halfvec';
    END IF;
    IF why IS NOT NULL THEN
        RAISE EXCEPTION '% %', $1, why USING ERRCODE = 'EH028', HINT = coalesce(hint, '');
    END IF;
END $$;

-- What of attaching a table needs the rights of ehub's owner, in a transaction that has locked the table.
-- Returns the id of the version. For the owner of the table.
CREATE OR REPLACE FUNCTION ehub.add_attached(
    relation regclass,
    "column" name,
    name text,
    metric text,
    dims int,
    m int,
    ef_construction int,
    target_recall float8,
    granted boolean,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    me regrole := ehub.role_of(caller);
    shape pg_class;
    key record;
    col record;
    taken text;
    made bigint;
    version_id bigint;
BEGIN
    SELECT * INTO shape FROM pg_class AS c WHERE c.oid = $1;
    IF NOT coalesce(pg_has_role(me, shape.relowner, 'USAGE'), false) THEN
        RAISE EXCEPTION 'role % does not own %', me, $1 USING ERRCODE = 'insufficient_privilege';
    END IF;
    SELECT * INTO key FROM ehub.attached_key($1);
    SELECT * INTO col FROM ehub.attached_column($1, $2, NULL);
    IF key.kind IS NULL OR col.kind IS NULL THEN
        RAISE EXCEPTION '% cannot be attached', $1 USING ERRCODE = 'EH028';
    ELSIF NOT has_schema_privilege(ehub.owner(), shape.relnamespace, 'USAGE') THEN
        RAISE EXCEPTION 'role %, for which the index service reads, may not use schema %', ehub.owner(),
            shape.relnamespace::regnamespace USING ERRCODE = 'EH028',
            HINT = format(
                'GRANT USAGE ON SCHEMA %s TO %s', shape.relnamespace::regnamespace, ehub.owner()
            );
    ELSIF ehub.hides_rows($1, ehub.owner()) THEN
        RAISE EXCEPTION 'row policies of % hide rows from role %, for which the index service reads', $1,
            ehub.owner() USING ERRCODE = 'EH028', HINT = format(
                'a superuser can say ALTER ROLE %s BYPASSRLS', ehub.owner()
            );
    END IF;
    $3 := coalesce($3, shape.relname);
    $4 := coalesce($4, (
        SELECT CASE
            WHEN o.opcname ~ 'cosine' THEN 'cosine' WHEN o.opcname ~ '_ip_' THEN 'ip' ELSE 'l2' END
        FROM pg_index AS i JOIN pg_opclass AS o ON o.oid = i.indclass[0]
        JOIN pg_am AS a ON a.oid = o.opcmethod
        WHERE i.indrelid = $1 AND i.indkey[0] = col.number AND a.amname IN ('hnsw', 'ivfflat')
        ORDER BY a.amname, i.indexrelid LIMIT 1
    ), 'l2');
    PERFORM ehub.require_name('a space', $3, 40);
    PERFORM ehub.require_shape($3, $5, $4, $6, $7, $8);
    IF $5 <> col.dims THEN
        RAISE EXCEPTION 'column % of % has vectors of % dims, not %', quote_ident($2), $1, col.dims, $5
            USING ERRCODE = 'EH028';
    END IF;
    SELECT s.name INTO taken FROM ehub.attachment AS a JOIN ehub.version AS v ON v.id = a.version_id
    JOIN ehub.space AS s ON s.id = v.space_id
    WHERE a.relation = $1 AND a.column_name = $2 AND v.metric = $4 AND v.dims = $5;
    IF FOUND THEN
        RAISE EXCEPTION 'column % of % is attached under metric % already, as space %', quote_ident($2),
            $1, $4, quote_literal(taken) USING ERRCODE = 'EH002';
    END IF;
    INSERT INTO ehub.space (name) VALUES ($3) ON CONFLICT (name) DO NOTHING RETURNING id INTO made;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is a space % already', quote_literal($3) USING ERRCODE = 'EH002',
            HINT = 'name => another one';
    END IF;
    INSERT INTO ehub.version (space_id, name, dims, metric) VALUES (made, 'v1', $5, $4)
    RETURNING id INTO version_id;
    INSERT INTO ehub.index (version_id, m, ef_construction, target_recall)
    VALUES (version_id, $6, $7, $8);
    UPDATE ehub.space SET current_version_id = version_id WHERE id = made;
    -- Whichever space of a table is detached last takes back what was given for the first.
    INSERT INTO ehub.attachment (version_id, relation, column_name, column_number, shape, granted)
    VALUES (version_id, $1, $2, col.number, '', $9 OR EXISTS (
        SELECT FROM ehub.attachment AS a WHERE a.relation = $1 AND a.granted
    ));
    PERFORM ehub.fit_attached(version_id);
    PERFORM ehub.log_action(me, 'attach', $3, jsonb_build_object(
        'table', $1::text, 'column', $2, 'dims', $5, 'metric', $4
    ));
    PERFORM ehub.ring();
    RETURN version_id;
END $$;

-- Make the functions for an attached table as it is now; while that cannot be, they stay as they are.
CREATE OR REPLACE FUNCTION ehub.fit_attached(version_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    a ehub.attachment;
    key record;
    col record;
BEGIN
    SELECT * INTO a FROM ehub.attachment AS t WHERE t.version_id = $1 FOR UPDATE;
    SELECT * INTO key FROM ehub.attached_key(a.relation);
    SELECT * INTO col FROM ehub.attached_column(a.relation, a.column_name, a.column_number);
    IF key.kind IS NOT NULL AND col.kind IS NOT NULL
        AND has_table_privilege(a.relation, 'SELECT')
    THEN
        PERFORM ehub.create_attached_log($1, key.name, col.name);
        PERFORM ehub.give_attached_log($1, a.relation);
        PERFORM ehub.create_checks(v.id, v.metric, v.partition_by)
        FROM ehub.version AS v WHERE v.id = $1;
        UPDATE ehub.attachment AS t SET column_name = col.name, column_number = col.number,
            shape = ehub.attached_shape(a.relation)
        WHERE t.version_id = $1;
    END IF;
END $$;

-- Detach a table: its space is gone, and nothing of it is left on the table. For the owner of the table,
-- of which nothing is changed but that; waits for transactions that use it, in turns that keep others
-- from it for 0.1 s at most.
CREATE OR REPLACE FUNCTION ehub.detach(name text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    a ehub.attachment := ehub.attachment_of($1);
    there boolean := EXISTS (SELECT FROM pg_class AS c WHERE c.oid = a.relation);
BEGIN
    PERFORM ehub.require_read_committed($1);
    IF there THEN
        PERFORM ehub.drop_attached_triggers(a.version_id, a.relation, '1 minute');
    END IF;
    PERFORM ehub.remove_attached($1);
    IF there AND a.granted AND NOT EXISTS (
        SELECT FROM ehub.attached AS o WHERE o.relation = a.relation
    ) THEN
        EXECUTE format('REVOKE SELECT ON %s FROM %s', a.relation, ehub.owner());
    END IF;
END $$;

-- How a space is attached, for who manages it; an error where it is not.
CREATE OR REPLACE FUNCTION ehub.attachment_of(name text, caller ehub.caller DEFAULT ehub.me())
RETURNS ehub.attachment
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    found ehub.attachment;
BEGIN
    SELECT a.* INTO found FROM ehub.attachment AS a
    JOIN ehub.version AS v ON v.id = a.version_id JOIN ehub.space AS s ON s.id = v.space_id
    WHERE s.name = $1;
    IF found IS NULL OR NOT ehub.manages(ehub.role_of(caller), $1) THEN
        -- A space that is there, and is not attached or not theirs to manage.
        PERFORM ehub.require_admin(caller, $1);
        RAISE EXCEPTION 'space % is not attached', quote_literal($1) USING ERRCODE = 'EH028',
            HINT = 'ehub.delete_space deletes it, with its rows';
    END IF;
    RETURN found;
END $$;

-- Take away what ehub.add_attached has made. For who manages the space.
CREATE OR REPLACE FUNCTION ehub.remove_attached(name text, caller ehub.caller DEFAULT ehub.me())
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    a ehub.attachment := ehub.attachment_of($1, caller);
BEGIN
    PERFORM ehub.lock_space($1);
    PERFORM ehub.forget_attached(ehub.role_of(caller), a);
    PERFORM ehub.ring();
END $$;

CREATE OR REPLACE FUNCTION ehub.forget_attached(role regrole, a ehub.attachment) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = warning AS $$
DECLARE
    space ehub.space;
BEGIN
    SELECT s.* INTO space FROM ehub.space AS s JOIN ehub.version AS v ON v.space_id = s.id
    WHERE v.id = a.version_id;
    PERFORM ehub.log_action(
        role, 'detach', space.name, jsonb_build_object('table', a.relation::text)
    );
    -- With triggers that a partition which was detached by itself has kept.
    EXECUTE format('DROP FUNCTION ehub_data.%I() CASCADE', 'log_v' || a.version_id);
    PERFORM ehub.drop_checks(a.version_id);
    DELETE FROM ehub.change AS c WHERE c.version_id = a.version_id;
    UPDATE ehub.space AS s SET current_version_id = NULL WHERE s.id = space.id;
    DELETE FROM ehub.space AS s WHERE s.id = space.id;
END $$;

-- Make the triggers of an attached table anew, where somebody has dropped or switched them off (ALTER
-- TABLE … ENABLE TRIGGER ALL does that to those that fire always). For the owner of the table; waits for
-- transactions that use it as ehub.detach does.
CREATE OR REPLACE FUNCTION ehub.reattach(name text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    a ehub.attachment := ehub.attachment_of($1);
BEGIN
    PERFORM ehub.drop_attached_triggers(a.version_id, a.relation, '1 minute');
    PERFORM ehub.add_attached_triggers(a.version_id, a.relation);
END $$;

-- Drop the triggers of an attached table, by its owner, who keeps others from it until the end of the
-- transaction.
CREATE OR REPLACE FUNCTION ehub.drop_attached_triggers(
    version_id bigint, relation regclass, patience interval
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    owner regrole := (SELECT c.relowner FROM pg_class AS c WHERE c.oid = relation);
    trigger name;
BEGIN
    IF NOT pg_has_role(owner, 'USAGE') THEN
        RAISE EXCEPTION 'role % does not own %', quote_ident(current_user), relation
            USING ERRCODE = 'insufficient_privilege', HINT = format('%s does', owner);
    END IF;
    PERFORM ehub.in_turns(
        relation::text, format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', relation), patience
    );
    FOR trigger IN
        SELECT t.tgname FROM pg_trigger AS t
        WHERE t.tgrelid = relation AND t.tgfoid = to_regproc('ehub_data.log_v' || version_id)
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', trigger, relation);
    END LOOP;
END $$;

-- Look after attached tables: make the functions of those that were altered anew, and the triggers where
-- that may be done, and forget those that were dropped. Of a space that somebody is managing, or a table
-- that somebody uses, another time.
CREATE OR REPLACE FUNCTION ehub.tend_attached() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    a ehub.attachment;
BEGIN
    FOR a IN SELECT * FROM ehub.attachment LOOP
        PERFORM FROM ehub.space AS s JOIN ehub.version AS v ON v.space_id = s.id
        WHERE v.id = a.version_id FOR NO KEY UPDATE OF s SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        IF NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = a.relation) THEN
            PERFORM ehub.forget_attached(ehub.owner(), a);
        ELSIF a.shape <> ehub.attached_shape(a.relation) THEN
            PERFORM ehub.fit_attached(a.version_id);
        ELSIF ehub.unlogged(a.version_id, a.relation) AND (
            SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class AS c WHERE c.oid = a.relation
        ) THEN
            BEGIN
                PERFORM ehub.drop_attached_triggers(a.version_id, a.relation, '0');
                PERFORM ehub.add_attached_triggers(a.version_id, a.relation);
            EXCEPTION WHEN SQLSTATE 'EH018' THEN
                NULL;
            END;
        END IF;
    END LOOP;
END $$;

-- The attached spaces of those who may read or write the table; and why no index follows it, if so.
CREATE OR REPLACE VIEW ehub.attached WITH (security_barrier) AS
SELECT s.name AS space, a.relation, coalesce(c.name, a.column_name::name) AS "column", v.metric, v.dims,
    ehub.attached_problem(
        v.id, a.relation, a.column_name, a.column_number, v.dims, ehub.owner()
    ) AS problem,
    v.id AS version_id
FROM ehub.attachment AS a
JOIN ehub.version AS v ON v.id = a.version_id
JOIN ehub.space AS s ON s.id = v.space_id
LEFT JOIN LATERAL ehub.attached_column(a.relation, a.column_name, a.column_number) AS c ON true
WHERE has_table_privilege(a.relation, 'SELECT, INSERT, UPDATE, DELETE')
ORDER BY s.name;

-- The space that a column of a table is attached as; the metric says which, where there are several.
CREATE OR REPLACE FUNCTION ehub.space_of(relation regclass, "column" name, metric text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    found text[] := ARRAY(
        SELECT a.space FROM ehub.attached AS a
        WHERE a.relation = $1 AND a."column" = $2 AND a.metric = coalesce($3, a.metric)
    );
BEGIN
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
