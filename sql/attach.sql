-- Attaching tables, and detaching them: what is made for one, kept fitting, and taken away again. What an
-- attached space is, see sql/attached.sql.

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
                keys text[];
                before text[];
                changed bigint;
                context text;
            BEGIN
                BEGIN
                    IF TG_OP = 'INSERT' AND TG_LEVEL = 'STATEMENT' THEN
                        keys := ARRAY(
                            SELECT concat(n.%2$I) FROM new_rows AS n WHERE n.%3$I IS NOT NULL LIMIT 10001
                        );
                    ELSIF TG_LEVEL = 'ROW' THEN
                        IF TG_OP <> 'INSERT' THEN
                            keys := ARRAY[concat(OLD.%2$I)];
                        END IF;
                        IF TG_OP <> 'DELETE' AND concat(NEW.%2$I) COLLATE "C" IS DISTINCT FROM keys[1] THEN
                            keys := keys || concat(NEW.%2$I);
                        END IF;
                    ELSIF TG_OP = 'DELETE' THEN
                        keys := ARRAY(
                            SELECT concat(o.%2$I) FROM old_rows AS o WHERE o.%3$I IS NOT NULL LIMIT 10001
                        );
                    ELSIF TG_OP = 'UPDATE' THEN
                        PERFORM n.%3$I FROM new_rows AS n LIMIT 0;
                        keys := ARRAY(SELECT concat(n.%2$I) FROM new_rows AS n LIMIT 10001);
                        before := ARRAY(SELECT concat(o.%2$I) FROM old_rows AS o LIMIT 10001);
                        IF keys <> before THEN
                            keys := ARRAY(SELECT unnest(keys) UNION SELECT unnest(before));
                        END IF;
                    END IF;
                EXCEPTION WHEN OTHERS THEN
                    keys := NULL;
                END;
                -- As ehub.log_change does.
                IF cardinality(keys) BETWEEN 1 AND 10000 OR keys IS NULL THEN
                    INSERT INTO ehub.change (version_id, keys) VALUES (%4$s, keys);
                ELSIF keys <> '{}' THEN
                    EXECUTE ehub.log_in_parts(
                        %4$s, TG_OP, %5$L, CASE TG_OP WHEN 'UPDATE' THEN 'true' ELSE %6$L END
                    );
                END IF;
                IF NOT pg_try_advisory_xact_lock_shared(1701344610, 1) THEN
                    PERFORM ehub.ring();
                END IF;
                IF now() <> statement_timestamp() THEN
                    -- Something may follow in this transaction.
                    GET DIAGNOSTICS context = PG_CONTEXT;
                    IF strpos(context, E'\n') = 0 OR keys IS NULL THEN
                        -- Of an index that is told that everything may have changed no more is needed.
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
            END
            $body$,
            'log_v' || version_id, key, embedding, version_id,
            format('concat(r.%I)', key), format('r.%I IS NOT NULL', embedding)
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
-- Of an ordinary table as of ehub's own (ehub.add_triggers). Partitions can be written by themselves, which
-- fires no trigger of the whole; and triggers that all of them have, those to come too, know no statements.
CREATE OR REPLACE FUNCTION ehub.add_attached_triggers(version_id bigint, relation regclass)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    prefix text := format('ehub_v%s_', version_id);
    call text := format('ehub_data.%I()', 'log_v' || version_id);
BEGIN
    IF (SELECT c.relkind <> 'p' FROM pg_class AS c WHERE c.oid = relation) THEN
        PERFORM ehub.add_triggers(relation::text, prefix, call);
        RETURN;
    END IF;
    EXECUTE format(
        'CREATE TRIGGER %2$I AFTER TRUNCATE ON %1$s FOR EACH STATEMENT EXECUTE FUNCTION %4$s;'
        'CREATE TRIGGER %3$I AFTER INSERT OR UPDATE OR DELETE ON %1$s'
        ' FOR EACH ROW EXECUTE FUNCTION %4$s;'
        'ALTER TABLE %1$s ENABLE ALWAYS TRIGGER %2$I, ENABLE ALWAYS TRIGGER %3$I',
        relation, prefix || 'truncate', prefix || 'row', call
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
        why := 'is unlogged: a crash empties it, and nobody hears of it';
        hint := 'ALTER TABLE ... SET LOGGED';
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
        hint := 'a key tells the rows apart; ALTER TABLE ... ADD PRIMARY KEY (...)';
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

-- The metric of pgvector's indexes on a column, or on what is made of it, as e::halfvec(3072); NULL where there
-- is none. Where they have several, or one that no space has, whoever attaches it is asked.
CREATE OR REPLACE FUNCTION ehub.metric_of_indexes(relation regclass, number int) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    metrics text[];
    others text;
BEGIN
    SELECT array_agg(DISTINCT m.metric ORDER BY m.metric) FILTER (WHERE m.metric IS NOT NULL),
        min(format('%s (%s)', i.indexrelid::regclass, o.opcname)) FILTER (WHERE m.metric IS NULL)
    INTO metrics, others
    FROM pg_index AS i
    JOIN pg_opclass AS o ON o.oid = i.indclass[0]
    JOIN pg_am AS a ON a.oid = o.opcmethod
    CROSS JOIN LATERAL (
        SELECT (regexp_match(o.opcname, '_(l2|cosine|ip)_ops$'))[1]
    ) AS m (metric)
    WHERE i.indrelid = $1 AND a.amname IN ('hnsw', 'ivfflat') AND (
        i.indkey[0] = $2 OR i.indkey[0] = 0 AND EXISTS (
            SELECT FROM pg_depend AS d
            WHERE d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
                AND d.refclassid = 'pg_class'::regclass AND d.refobjid = $1 AND d.refobjsubid = $2
        )
    );
    IF cardinality(metrics) > 1 OR metrics IS NULL AND others IS NOT NULL THEN
        RAISE EXCEPTION '%: which metric is meant? Its indexes are for %', $1,
            coalesce(array_to_string(metrics, ' and '), others) USING ERRCODE = 'EH028',
            HINT = 'metric => ''l2'', ''cosine'' or ''ip''';
    END IF;
    RETURN metrics[1];
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
    $4 := coalesce($4, ehub.metric_of_indexes($1, col.number), 'l2');
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
    me regrole := ehub.role_of(caller);
    found ehub.attachment;
BEGIN
    SELECT a.* INTO found FROM ehub.attachment AS a
    JOIN ehub.version AS v ON v.id = a.version_id JOIN ehub.space AS s ON s.id = v.space_id
    WHERE s.name = $1;
    IF found IS NULL OR NOT ehub.manages(me, $1) THEN
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
    me regrole := ehub.role_of(caller);
    a ehub.attachment := ehub.attachment_of($1, caller);
BEGIN
    PERFORM ehub.lock_space($1);
    PERFORM ehub.forget_attached(me, a);
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
    PERFORM ehub.forget_log(a.version_id);
    -- The last one that is detached takes back what the first one was given.
    UPDATE ehub.attachment AS o SET granted = true
    WHERE a.granted AND o.relation = a.relation AND o.version_id <> a.version_id;
    UPDATE ehub.space AS s SET current_version_id = NULL WHERE s.id = space.id;
    DELETE FROM ehub.space AS s WHERE s.id = space.id;
END $$;

-- Versions of attached spaces that no row of ehub.attachment is about, as when a dump that left out an
-- attached table was restored: COPY of that table takes all its rows or none. Which table it is its
-- triggers say, and which column the function that they call; NULL where it is not here.
CREATE OR REPLACE FUNCTION ehub.lost_attachments()
RETURNS TABLE (space text, version_id bigint, relation regclass, column_name text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT s.name, v.id, (
        SELECT t.tgrelid FROM pg_trigger AS t
        WHERE t.tgfoid = p.oid AND t.tgparentid = 0 ORDER BY t.oid LIMIT 1
    ), substring(p.prosrc FROM ' AS n WHERE n[.](.*?) IS NOT NULL LIMIT 10001')
    FROM ehub.version AS v JOIN ehub.space AS s ON s.id = v.space_id
    JOIN pg_proc AS p ON p.oid = to_regproc('ehub_data.log_v' || v.id)
    WHERE NOT EXISTS (SELECT FROM ehub.attachment AS a WHERE a.version_id = v.id)
$$;

-- Record the attachments anew that were lost, and forget the spaces whose table is not here. For the owner.
CREATE OR REPLACE FUNCTION ehub.recover_attachments() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    lost record;
    owned ehub.attachment;
BEGIN
    FOR lost IN
        SELECT l.*, a.attname, a.attnum FROM ehub.lost_attachments() AS l
        LEFT JOIN pg_attribute AS a
            ON a.attrelid = l.relation AND quote_ident(a.attname) = l.column_name AND NOT a.attisdropped
    LOOP
        PERFORM ehub.lock_space(lost.space);
        owned := ROW(
            lost.version_id, coalesce(lost.relation, 0), coalesce(lost.attname, lost.column_name, ''),
            coalesce(lost.attnum, 0), '', false
        );
        IF lost.relation IS NULL THEN
            PERFORM ehub.forget_attached(ehub.owner(), owned);
        ELSE
            INSERT INTO ehub.attachment SELECT owned.*;
            PERFORM ehub.fit_attached(lost.version_id);
        END IF;
    END LOOP;
END $$;

-- Make the triggers of an attached table anew, where somebody has dropped or switched them off (ALTER
-- TABLE ... ENABLE TRIGGER ALL does that to those that fire always). For the owner of the table; waits for
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
        BEGIN
            IF NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = a.relation) THEN
                PERFORM ehub.forget_attached(ehub.owner(), a);
            ELSIF a.shape <> ehub.attached_shape(a.relation) THEN
                PERFORM ehub.fit_attached(a.version_id);
            ELSIF ehub.unlogged(a.version_id, a.relation) AND (
                SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class AS c WHERE c.oid = a.relation
            ) THEN
                PERFORM ehub.drop_attached_triggers(a.version_id, a.relation, '0');
                PERFORM ehub.add_attached_triggers(a.version_id, a.relation);
            END IF;
        EXCEPTION WHEN OTHERS THEN
            -- The others are looked after all the same.
            IF SQLSTATE <> 'EH018' THEN
                RAISE LOG 'ehub: % cannot be looked after: %', a.relation, SQLERRM;
            END IF;
        END;
    END LOOP;
END $$;
