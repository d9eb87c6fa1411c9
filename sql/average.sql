-- Averages of embeddings: computed when they are asked for, and spaces of averages that follow the
-- rows of another space.
--
-- A space of averages is a space like any other, whose rows nobody writes: statement triggers on the
-- data tables of its source compute them anew from the rows of the source, so that nothing adds up
-- over time and a row is what ehub.average says. Each version of the source has its like there,
-- under the same name: made, promoted, rolled back and dropped with it.
--
-- To one version of averages belong, besides what every version has: on the source's data table an
-- index on the field and the triggers; their function ehub_data.follow_v<version>; and a table
-- ehub_data.a<version> of locks.

-- The names of the objects, and at the end of the field, that a field of metadata stands for: "a.b"
-- is field b of the object in a, as in filters. `what` says in the error what the field is for.
CREATE OR REPLACE FUNCTION ehub.average_steps(what text, field text) RETURNS text[]
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF octet_length(field) NOT BETWEEN 1 AND 1000 OR field IS NULL THEN
        RAISE EXCEPTION '% is the name of a field of metadata, of 1 to 1000 bytes, not %', what,
            coalesce(quote_literal(left(field, 60)), 'NULL') USING ERRCODE = 'EH005';
    END IF;
    RETURN ehub.field_steps(field);
END $$;

-- The value of a field, as an expression over `metadata`; NULL where it is none, or no scalar.
CREATE OR REPLACE FUNCTION ehub.average_value(what text, field text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format(
        'CASE WHEN jsonb_typeof(%1$s) IN (''string'', ''number'', ''boolean'') THEN %1$s END',
        'metadata' || string_agg(format(' -> %L', step), '')
    )
    FROM unnest(ehub.average_steps(what, field)) AS step
$$;

-- The value of a field as a key, as an expression over `metadata`: what ->> says of a scalar; NULL
-- where it is none, or too long. Never long, so that an index can hold it.
CREATE OR REPLACE FUNCTION ehub.average_key(what text, field text) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    steps text[] := ehub.average_steps(what, field);
    last int := cardinality(steps);
    parent text := (
        SELECT 'metadata' || coalesce(string_agg(format(' -> %L', step), '' ORDER BY place), '')
        FROM unnest(steps[: last - 1]) WITH ORDINALITY AS s (step, place)
    );
BEGIN
    RETURN format(
        'CASE WHEN jsonb_typeof(%1$s -> %2$L) IN (''string'', ''number'', ''boolean'')'
        ' AND octet_length(%1$s ->> %2$L) BETWEEN 1 AND 1024 THEN %1$s ->> %2$L END',
        parent, steps[last]
    );
END $$;

-- The value of a field as a weight, as an expression over `metadata`: numeric, so that sums are exact;
-- NULL where it is no number, or one with which nothing can be computed in float8.
CREATE OR REPLACE FUNCTION ehub.average_weight(field text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format(
        'CASE WHEN jsonb_typeof(%1$s) = ''number'' THEN'
        ' CASE WHEN (%1$s)::numeric = 0 OR abs((%1$s)::numeric) BETWEEN 1e-100 AND 1e100'
        ' THEN (%1$s)::numeric END END',
        '(metadata' || string_agg(format(' -> %L', step), '') || ')'
    )
    FROM unnest(ehub.average_steps('weight', field)) AS step
$$;

-- The averages of rows (value, embedding, weight), by value, as the text of a query for (value,
-- embedding, rows, weight). Values whose weights sum to zero are left out; an embedding that float32
-- cannot hold is NULL.
--
-- pgvector's avg sums in float8 and rounds once, to float32: without weights nothing is better. A
-- vector is multiplied by its weight in float32, which rounds the weight and the product, each by
-- 2^-24 of it. pgvector refuses products that vanish in float32 or overflow, so weights are taken to
-- between 1 and 2^50 before, and back in float8 afterwards; one of less than 2^-50 of the largest is
-- as good as none. Measured on 100,000 rows of 100 dims against numpy in float64: off by less than
-- 6.5e-8 of each number of the average, nearly all of it the last rounding (2^-24 = 6.0e-8). Weights of
-- both signs lose what they cancel: the error is in proportion to the average of what was added up.
CREATE OR REPLACE FUNCTION ehub.averages_query(rows text, weighted boolean) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format(
        CASE WHEN weighted THEN
            $query$
                SELECT s.value,
                    CASE WHEN 'Infinity' <> ALL (s.numbers) THEN s.numbers::@vector@.vector END
                        AS embedding,
                    s.rows, s.weight
                FROM (
                    SELECT t.value, t.rows, trim_scale(t.weight) AS weight, ARRAY(
                        SELECT CASE
                            WHEN abs(y) > 3.4e38 THEN 'Infinity'
                            WHEN abs(y) > 1e-44 THEN y
                            ELSE 0
                        END::real
                        FROM (
                            SELECT x * (t.rows * (t.most * 2.0 ^ -50 / t.weight::float8)) AS y
                            FROM unnest(t.embedding::real[]) AS x
                        ) AS exact
                    ) AS numbers
                    FROM (
                        SELECT g.value, a.rows, a.weight, a.most, @vector@.avg(
                            g.embedding OPERATOR(@vector@.*) array_fill(
                                CASE WHEN abs(g.weight::float8) >= a.most * 2.0 ^ -50
                                    THEN g.weight::float8 / (a.most * 2.0 ^ -50) ELSE 0 END::real,
                                ARRAY[@vector@.vector_dims(g.embedding)]
                            )::@vector@.vector
                        ) AS embedding
                        FROM (%1$s) AS g
                        JOIN (
                            SELECT value, count(*) AS rows, sum(weight) AS weight,
                                max(abs(weight))::float8 AS most
                            FROM (%1$s) AS g WHERE weight IS NOT NULL AND value IS NOT NULL
                            GROUP BY value HAVING sum(weight) <> 0
                        ) AS a ON a.value = g.value
                        WHERE g.weight IS NOT NULL
                        GROUP BY g.value, a.rows, a.weight, a.most
                    ) AS t
                ) AS s
            $query$
        ELSE
            $query$
                SELECT value, @vector@.avg(embedding) AS embedding, count(*) AS rows,
                    NULL::numeric AS weight
                FROM (%1$s) AS g WHERE value IS NOT NULL GROUP BY value
            $query$
        END,
        rows
    )
$$;

-- The average of the embeddings of these keys (one that comes twice counts twice), with a weight for
-- each if need be; or of the rows that match a filter; or of all rows. NULL where there are no rows. How
-- exact it is: see ehub.averages_query.
CREATE OR REPLACE FUNCTION ehub.average(
    space text, keys text[] DEFAULT NULL, weights float8[] DEFAULT NULL, filter jsonb DEFAULT NULL
) RETURNS @vector@.vector
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET extra_float_digits = 1 SET datestyle = 'ISO, MDY' SET gin_fuzzy_search_limit = 0 AS $$
#variable_conflict use_variable
DECLARE
    target ehub.catalogue := ehub.require_space(space);
    relation text := ehub.rows_of(target);
    wrong record;
    result record;
BEGIN
    keys := ehub.as_list('keys', keys);
    weights := ehub.as_list('weights', weights);
    IF keys IS NOT NULL AND filter IS NOT NULL THEN
        RAISE EXCEPTION 'space %: give either keys or a filter, and not both', quote_literal(space)
            USING ERRCODE = 'EH005';
    ELSIF keys IS NULL AND weights IS NOT NULL THEN
        RAISE EXCEPTION 'space %: weights are those of keys, which are missing',
            quote_literal(space) USING ERRCODE = 'EH005',
            HINT = 'ehub.averages takes weights from a field of metadata';
    ELSIF keys IS NULL THEN
        EXECUTE format(
            'SELECT @vector@.avg(embedding) AS embedding FROM %s AS t WHERE %s', relation,
            coalesce(ehub.has_filter(target, filter), 'true')
        ) INTO result;
        RETURN result.embedding;
    ELSIF cardinality(keys) > 0 AND cardinality(weights) <> cardinality(keys) THEN
        RAISE EXCEPTION 'space %: a weight for each key is needed: % keys, % weights',
            quote_literal(space), cardinality(keys), cardinality(weights) USING ERRCODE = 'EH005';
    END IF;
    PERFORM ehub.require_keys(target, keys);
    SELECT w.weight, k.key INTO wrong
    FROM unnest(weights) WITH ORDINALITY AS w (weight, place)
    JOIN unnest(keys) WITH ORDINALITY AS k (key, place) ON k.place = w.place
    WHERE w.weight IS NULL OR NOT (w.weight = 0 OR abs(w.weight) BETWEEN 1e-100 AND 1e100)
    ORDER BY w.place LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'space %, key %: a weight is 0 or a number of a size from 1e-100 to 1e100,'
            ' not %', quote_literal(space), quote_literal(left(wrong.key, 60)),
            coalesce(wrong.weight::text, 'NULL') USING ERRCODE = 'EH005';
    END IF;
    EXECUTE ehub.averages_query(
        format(
            -- By its shortest digits: as decimals 0.1, 0.2 and -0.3 sum to zero.
            'SELECT 0 AS value, t.embedding, w.weight::text::numeric AS weight'
            ' FROM unnest($1, $2) AS w (key, weight) JOIN %s AS t ON t.key = w.key AND %s',
            relation, ehub.has_keys(target, '$1')
        ),
        weights IS NOT NULL
    ) INTO result USING keys, weights;
    IF result.rows IS NULL THEN
        RAISE EXCEPTION 'space %: the weights sum to zero', quote_literal(space)
            USING ERRCODE = 'EH005';
    ELSIF result.embedding IS NULL THEN
        RAISE EXCEPTION 'space %: the weights sum to nearly zero: the average is too large',
            quote_literal(space) USING ERRCODE = 'EH005';
    END IF;
    RETURN result.embedding;
END $$;

-- The average of the rows with each value of a field of metadata, weighted by another field if need
-- be. Rows whose value is no string, number, true or false do not take part, nor those whose weight is
-- no number of a size from 1e-100 to 1e100, or 0. A value whose weights sum to zero has no average.
CREATE OR REPLACE FUNCTION ehub.averages(
    space text, by text, weight text DEFAULT NULL, filter jsonb DEFAULT NULL
) RETURNS TABLE (value jsonb, average @vector@.vector, rows bigint)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET extra_float_digits = 1 SET datestyle = 'ISO, MDY' SET gin_fuzzy_search_limit = 0 AS $$
#variable_conflict use_column
DECLARE
    target ehub.catalogue := ehub.require_space($1);
BEGIN
    RETURN QUERY EXECUTE format(
        'SELECT value, embedding, rows FROM (%s) AS a WHERE embedding IS NOT NULL ORDER BY value',
        ehub.averages_query(
            format(
                'SELECT %s AS value, embedding, %s AS weight FROM %s AS t WHERE %s',
                ehub.average_value('by', $2),
                CASE WHEN $3 IS NULL THEN 'NULL::numeric' ELSE ehub.average_weight($3) END,
                ehub.rows_of(target), coalesce(ehub.has_filter(target, $4), 'true')
            ),
            $3 IS NOT NULL
        )
    );
END $$;

-- Make a space of averages that follows another one: a row for each value of field `by` in the
-- metadata of the source, under that value as text. Its embedding is the average of the rows that have
-- the value, weighted by field `weight` if need be; its metadata is {"rows": ...}, their number, and
-- {"weight": ...}, the sum of their weights. What takes no part, see ehub.averages; nor does a value of
-- no or more than 1024 bytes. No row has a value without an average, or whose average has no distance
-- to anything under the metric. Values that are the same as text, as 1 and "1", are one.
--
-- Its metric is that of the source where none is said; the rest is as for ehub.create_space. Returns
-- the id of its current version. For those who may make spaces and manage the source. Waits for
-- transactions that write to the source, and keeps others from it until the end of this one.
CREATE OR REPLACE FUNCTION ehub.create_average(
    space text,
    source text,
    by text,
    weight text DEFAULT NULL,
    metric text DEFAULT NULL,
    m int DEFAULT 16,
    ef_construction int DEFAULT 200,
    target_recall float8 DEFAULT 0.95,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    origin ehub.catalogue := ehub.require_admin(caller, $2);
    followed bigint := ehub.lock_space(origin.space);
    kept ehub.average;
    first bigint;
    made bigint;
    current bigint;
    version record;
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_proc AS p
        WHERE p.pronamespace = 'ehub'::regnamespace AND p.proname = 'create_space'
            AND has_function_privilege(ehub.role_of(caller), p.oid, 'EXECUTE')
    ) THEN
        RAISE EXCEPTION 'role % makes no spaces', ehub.role_of(caller)
            USING ERRCODE = 'insufficient_privilege',
            HINT = 'the owner of schema ehub says ehub.grant_create(role)';
    ELSIF strpos($2, '@') > 0 THEN
        RAISE EXCEPTION '% is a version, averages follow a space', quote_literal($2)
            USING ERRCODE = 'EH003';
    ELSIF EXISTS (SELECT FROM ehub.average AS a WHERE a.space_id = followed) THEN
        RAISE EXCEPTION 'space % is an average itself, and averages of averages are not kept',
            quote_literal($2) USING ERRCODE = 'EH005';
    END IF;
    PERFORM ehub.require_own($2, 'no averages of its rows are kept');
    PERFORM ehub.require_read_committed(origin.space);
    PERFORM ehub.average_steps('by', $3);
    IF $4 IS NOT NULL THEN
        PERFORM ehub.average_steps('weight', $4);
    END IF;
    -- With all that comes with a space: the right names, grants, the audit trail.
    first := ehub.create_space(
        $1, origin.dims, coalesce($5, origin.metric), $6, $7, $8, caller => caller
    );
    INSERT INTO ehub.average (space_id, source_id, by, weight)
    SELECT s.id, followed, $3, $4 FROM ehub.space AS s WHERE s.name = $1
    RETURNING * INTO kept;
    -- Its versions are those of the source.
    EXECUTE format('DROP VIEW spaces.%I', $1);
    UPDATE ehub.space AS s SET current_version_id = NULL WHERE s.id = kept.space_id;
    PERFORM ehub.remove_version($1, 'v1', first);
    FOR version IN
        SELECT c.* FROM ehub.catalogue AS c WHERE c.space = origin.space ORDER BY c.version_id
    LOOP
        made := ehub.add_version(
            space_id => kept.space_id, name => version.version, dims => version.dims,
            metric => coalesce($5, version.metric), m => $6, ef_construction => $7,
            target_recall => $8, source => NULL
        );
        PERFORM ehub.follow(kept, version.version_id, made);
        IF version.current THEN
            current := made;
        END IF;
    END LOOP;
    UPDATE ehub.space AS s SET current_version_id = current WHERE s.id = kept.space_id;
    PERFORM ehub.make_current($1, current);
    PERFORM ehub.apply_access(kept.space_id);
    PERFORM ehub.log_action(
        ehub.role_of(caller), 'create_average', $1,
        jsonb_build_object('source', $2, 'by', $3, 'weight', $4)
    );
    PERFORM ehub.ring();
    RETURN current;
END $$;

-- Let a new version of averages follow a version of the source, whose writers it keeps out.
CREATE OR REPLACE FUNCTION ehub.follow(kept ehub.average, source bigint, version_id bigint)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    followed text := format('ehub_data.%I', 'v' || source);
BEGIN
    EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', followed);
    EXECUTE format(
        'CREATE INDEX %I ON %s ((%s))', 'a' || version_id || '_by_idx', followed,
        ehub.average_key('by', kept."by")
    );
    -- All locks are there from the beginning: whose snapshot is older, and does not see the row of a
    -- lock, gets an error that says so. None is ever deleted.
    EXECUTE format(
        'CREATE TABLE ehub_data.%I (bucket int PRIMARY KEY, turn bigint NOT NULL DEFAULT 0)'
        ' WITH (fillfactor = 50)',
        'a' || version_id
    );
    EXECUTE format(
        'INSERT INTO ehub_data.%I (bucket) SELECT generate_series(0, 4095)', 'a' || version_id
    );
    PERFORM ehub.create_follower(kept, source, version_id);
    EXECUTE ehub.averages_statement(kept, source, version_id, everything => true);
    PERFORM ehub.add_follower_triggers(source, version_id);
    PERFORM ehub.add_refusal(version_id, 'ehub_average');
END $$;

CREATE OR REPLACE FUNCTION ehub.add_follower_triggers(source bigint, version_id bigint) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT ehub.add_triggers(
        format('ehub_data.%I', 'v' || source), 'ehub_average_' || version_id || '_',
        format('ehub_data.%I()', 'follow_v' || version_id)
    )
$$;

-- The statement that writes the averages of the values that `touched` holds, or of all.
CREATE OR REPLACE FUNCTION ehub.averages_statement(
    kept ehub.average, source bigint, version_id bigint, everything boolean
) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format(
        $statement$
            WITH due AS MATERIALIZED (
                SELECT a.value, a.embedding, jsonb_strip_nulls(
                    jsonb_build_object('rows', a.rows, 'weight', a.weight)
                ) AS metadata
                FROM (%1$s) AS a
                WHERE a.embedding OPERATOR(@vector@.<#>) a.embedding > '-Infinity' AND (
                    %2$L <> 'cosine' OR
                    a.embedding OPERATOR(@vector@.<#>) a.embedding <= -1.1754943508222875e-38
                )
            ), gone AS (
                DELETE FROM ehub_data.%3$I AS t
                WHERE (%4$L OR t.key = ANY (%5$s)) AND NOT EXISTS (SELECT FROM due AS d WHERE d.value = t.key)
            )
            INSERT INTO ehub_data.%3$I AS t (key, embedding, metadata)
            SELECT d.value, d.embedding, d.metadata FROM due AS d ORDER BY d.value
            ON CONFLICT (key) DO UPDATE
            SET embedding = EXCLUDED.embedding, metadata = EXCLUDED.metadata
            WHERE ROW(t.embedding, t.metadata)::record
                OPERATOR(pg_catalog.*<>) ROW(EXCLUDED.embedding, EXCLUDED.metadata)::record
        $statement$,
        ehub.averages_query(
            format(
                'SELECT %1$s AS value, embedding, %2$s AS weight FROM ehub_data.%3$I WHERE %4$s',
                ehub.average_key('by', kept."by"),
                CASE WHEN kept.weight IS NULL THEN 'NULL::numeric'
                    ELSE ehub.average_weight(kept.weight) END,
                'v' || source,
                CASE WHEN everything THEN 'true'
                    ELSE ehub.average_key('by', kept."by") || ' = ANY (touched)' END
            ),
            kept.weight IS NOT NULL
        ),
        (SELECT v.metric FROM ehub.version AS v WHERE v.id = version_id), 'v' || version_id,
        everything, CASE WHEN everything THEN '''{}''' ELSE 'touched' END
    )
$$;

-- The trigger function that keeps a version of averages: one of its own for each, whose statements are
-- planned once a session. It has its owner's rights, because those who write to the source have none on
-- the averages; it reads nothing but the rows that were changed and the source, and only the owner can
-- attach it to a table.
--
-- Two transactions that change rows of the same value must not each compute its average without the
-- other's. So the locks of the values are taken first, and held until the end; the statement after
-- that sees, under READ COMMITTED, all that was committed before. A lock is taken by changing its row:
-- who has an older snapshot, as under REPEATABLE READ, gets a serialization failure where somebody else
-- has changed the averages of that value since. There are 4096 locks, to which values come by their hash:
-- not one for each value, because none could ever be deleted.
--
-- Locks are taken in their order, after all rows of the statement. So statements that are transactions
-- by themselves do not wait for each other in a circle, with one exception: ON CONFLICT DO UPDATE and
-- MERGE are two or three statements to triggers, and take the locks of the rows they update before those
-- of the rows they insert. Transactions of several statements can wait in a circle, as they can over
-- rows: also where they have no row in common, but values. Then Postgres ends one of them with
-- deadlock_detected, and nothing is wrong; ehub.merge_staged tries again.
CREATE OR REPLACE FUNCTION ehub.create_follower(
    kept ehub.average, source bigint, version_id bigint
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format(
        $head$
            CREATE OR REPLACE FUNCTION ehub_data.%1$I() RETURNS trigger
            LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS %L
        $head$,
        'follow_v' || version_id, format(
            $body$
            #variable_conflict use_column
            DECLARE
                touched text[];
            BEGIN
                IF TG_LEVEL = 'ROW' THEN
                    SELECT array_agg(DISTINCT r.value) INTO touched
                    FROM (
                        SELECT %2$s AS value FROM unnest(ARRAY[OLD.metadata, NEW.metadata]) AS metadata
                    ) AS r
                    WHERE r.value IS NOT NULL;
                ELSIF TG_OP = 'INSERT' THEN
                    SELECT array_agg(DISTINCT r.value) INTO touched
                    FROM (SELECT %2$s AS value FROM new_rows) AS r WHERE r.value IS NOT NULL;
                ELSIF TG_OP = 'UPDATE' THEN
                    -- Both: a row may go from one value to another.
                    SELECT array_agg(DISTINCT r.value) INTO touched
                    FROM (
                        SELECT %2$s AS value FROM new_rows UNION SELECT %2$s FROM old_rows
                    ) AS r
                    WHERE r.value IS NOT NULL;
                ELSIF TG_OP = 'DELETE' THEN
                    SELECT array_agg(DISTINCT r.value) INTO touched
                    FROM (SELECT %2$s AS value FROM old_rows) AS r WHERE r.value IS NOT NULL;
                ELSE
                    -- As the source: for all snapshots, also those that are kept.
                    TRUNCATE ehub_data.%3$I;
                END IF;
                IF touched IS NOT NULL THEN
                    INSERT INTO ehub_data.%4$I AS t (bucket)
                    SELECT DISTINCT (hashtextextended(value, 0) & 4095)::int AS bucket
                    FROM unnest(touched) AS value ORDER BY bucket
                    ON CONFLICT (bucket) DO UPDATE SET turn = t.turn + 1;
                    %5$s;
                END IF;
                RETURN NULL;
            END
            $body$,
            'follow_v' || version_id, ehub.average_key('by', kept."by"), 'v' || version_id,
            'a' || version_id,
            ehub.averages_statement(kept, source, version_id, everything => false)
        )
    );
    EXECUTE format('REVOKE ALL ON FUNCTION ehub_data.%I FROM PUBLIC', 'follow_v' || version_id);
END $$;

-- Nobody writes averages but the triggers of their source, which have the rights of the owner of schema
-- ehub: not the owner by hand, and no trigger of those who may only manage the space.
CREATE OR REPLACE FUNCTION ehub.refuse_direct_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF pg_trigger_depth() < 2 OR quote_ident(current_user)::regrole::oid <> (
        SELECT n.nspowner FROM pg_namespace AS n WHERE n.nspname = 'ehub'
    ) THEN
        PERFORM ehub.refuse_average(TG_ARGV[0]);
    END IF;
    -- What is returned counts for the row trigger.
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    RETURN NEW;
END $$;

CREATE OR REPLACE FUNCTION ehub.refuse_average(space text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'space % is an average: it follows its source, and cannot be changed itself',
        quote_literal($1) USING ERRCODE = 'EH025',
        HINT = 'SELECT source FROM ehub.kept_averages says which; change that';
END $$;

-- Refuse what would make a space of averages differ from its source. For functions with their owner's
-- rights, whose caller manages the space that an address is of.
CREATE OR REPLACE FUNCTION ehub.require_no_average(address text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    wanted text := split_part(address, '@', 1);
BEGIN
    IF EXISTS (
        SELECT FROM ehub.average AS a JOIN ehub.space AS s ON s.id = a.space_id
        WHERE s.name = wanted
    ) THEN
        PERFORM ehub.refuse_average(wanted);
    END IF;
END $$;

-- Refuse to delete a space that averages follow.
CREATE OR REPLACE FUNCTION ehub.require_no_followers(space text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    followers text := (
        SELECT string_agg(quote_literal(f.space), ', ' ORDER BY f.space)
        FROM ehub.followers($1) AS f
    );
BEGIN
    IF followers IS NOT NULL THEN
        RAISE EXCEPTION 'space %: averages follow it: %', quote_literal(space), followers
            USING ERRCODE = 'EH026', HINT = 'delete them first';
    END IF;
END $$;

-- The averages that follow a space, in an order.
CREATE OR REPLACE FUNCTION ehub.followers(source text)
RETURNS TABLE (space_id bigint, space text, kept ehub.average)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT a.space_id, f.name, a
    FROM ehub.average AS a
    JOIN ehub.space AS s ON s.id = a.source_id
    JOIN ehub.space AS f ON f.id = a.space_id
    WHERE s.name = $1 ORDER BY a.space_id
$$;

-- The version of averages that follows a version of its source.
CREATE OR REPLACE FUNCTION ehub.like_of(source bigint, space_id bigint) RETURNS bigint
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT f.id FROM ehub.version AS v JOIN ehub.version AS f ON f.name = v.name
    WHERE v.id = $1 AND f.space_id = $2
$$;

-- After a version of a space was made on the model of another: its like for each average. That has the
-- metric of the model's like, unless the new version has another one than its model.
CREATE OR REPLACE FUNCTION ehub.add_followers(
    source text, made bigint, model bigint
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    new ehub.version := (SELECT v FROM ehub.version AS v WHERE v.id = made);
    same_metric boolean := new.metric = (SELECT v.metric FROM ehub.version AS v WHERE v.id = model);
    follower record;
    like_model ehub.catalogue;
    version_id bigint;
    current bigint;
BEGIN
    FOR follower IN SELECT * FROM ehub.followers($1) LOOP
        PERFORM ehub.lock_space(follower.space);
        SELECT c.* INTO like_model FROM ehub.catalogue AS c
        WHERE c.version_id = ehub.like_of(model, follower.space_id);
        version_id := ehub.add_version(
            space_id => follower.space_id, name => new.name, dims => new.dims,
            metric => CASE WHEN same_metric THEN like_model.metric ELSE new.metric END,
            m => like_model.m, ef_construction => like_model.ef_construction,
            target_recall => like_model.target_recall, source => NULL
        );
        PERFORM ehub.follow(follower.kept, made, version_id);
        SELECT s.current_version_id INTO current FROM ehub.space AS s
        WHERE s.id = follower.space_id;
        PERFORM ehub.carry_policies('ehub_data.v' || current, 'ehub_data.v' || version_id);
        PERFORM ehub.carry_indexes(like_model.version_id, version_id);
        PERFORM ehub.apply_access(follower.space_id);
    END LOOP;
END $$;

-- Show the versions that follow a version by the names of their spaces.
CREATE OR REPLACE FUNCTION ehub.show_followers(source text, version_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM ehub.make_current(f.space, ehub.like_of($2, f.space_id)) FROM ehub.followers($1) AS f;
END $$;

-- After the current version of a space is another: all that ehub.switch does besides, for the averages.
CREATE OR REPLACE FUNCTION ehub.switch_followers(
    role regrole, kind text, source text, from_version bigint, to_version bigint
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    follower record;
    old ehub.version;
    new ehub.version;
BEGIN
    FOR follower IN SELECT * FROM ehub.followers($3) LOOP
        PERFORM ehub.lock_space(follower.space);
        SELECT v.* INTO old FROM ehub.version AS v
        WHERE v.id = ehub.like_of($4, follower.space_id);
        SELECT v.* INTO new FROM ehub.version AS v
        WHERE v.id = ehub.like_of($5, follower.space_id);
        PERFORM ehub.carry_policies('ehub_data.v' || old.id, 'ehub_data.v' || new.id);
        UPDATE ehub.space AS s SET current_version_id = new.id WHERE s.id = follower.space_id;
        -- Indexes are kept of what they are kept of the source.
        UPDATE ehub.version AS f SET warm = v.warm
        FROM ehub.version AS v JOIN ehub.space AS s ON s.id = v.space_id
        WHERE s.name = $3 AND f.space_id = follower.space_id AND f.name = v.name
            AND f.warm <> v.warm;
        INSERT INTO ehub.promotion (space_id, by, kind, from_version, to_version, from_version_id)
        VALUES (follower.space_id, role::text, $2, old.name, new.name, old.id);
        PERFORM ehub.log_action(
            role, $2, follower.space,
            jsonb_build_object('from', old.name, 'to', new.name)
        );
    END LOOP;
END $$;

-- Before a version of a space is dropped: its like of each average goes with it.
CREATE OR REPLACE FUNCTION ehub.drop_followers(source text, version_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    follower record;
BEGIN
    FOR follower IN
        SELECT f.*, v.id, v.name FROM ehub.followers($1) AS f
        JOIN ehub.version AS v ON v.id = ehub.like_of($2, f.space_id)
    LOOP
        PERFORM ehub.lock_space(follower.space);
        PERFORM ehub.remove_version(follower.space, follower.name, follower.id);
    END LOOP;
END $$;

-- Let a version follow nothing any more, if it is one of averages: what ehub.follow has made goes.
CREATE OR REPLACE FUNCTION ehub.unfollow(version_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    trigger record;
BEGIN
    FOR trigger IN
        SELECT t.tgrelid::regclass AS relation, t.tgname AS name FROM pg_trigger AS t
        WHERE t.tgfoid = to_regproc('ehub_data.follow_v' || version_id)
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', trigger.name, trigger.relation);
    END LOOP;
    EXECUTE format('DROP FUNCTION IF EXISTS ehub_data.%I', 'follow_v' || version_id);
    EXECUTE format('DROP INDEX IF EXISTS ehub_data.%I', 'a' || version_id || '_by_idx');
    EXECUTE format('DROP TABLE IF EXISTS ehub_data.%I', 'a' || version_id);
END $$;

-- Have a space of averages and the tables it follows for oneself, before it is deleted. In turns: what
-- waits for the readers of averages must not keep those of the source waiting. Nothing for other spaces.
CREATE OR REPLACE FUNCTION ehub.hold_average(space text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    -- As their writers come by them: the source first.
    relations text := (
        SELECT string_agg(format('ehub_data.%I', 'v' || v.id), ', ' ORDER BY v.id)
            || ', ' || string_agg(format('ehub_data.%I', 'v' || f.id), ', ' ORDER BY f.id)
            || format(', spaces.%I, ', $1)
            || string_agg(format('spaces.%I', $1 || '@' || f.name), ', ' ORDER BY f.id)
        FROM ehub.average AS a
        JOIN ehub.space AS s ON s.id = a.space_id
        JOIN ehub.version AS f ON f.space_id = a.space_id
        JOIN ehub.version AS v ON v.space_id = a.source_id AND v.name = f.name
        WHERE s.name = $1
    );
BEGIN
    IF relations IS NOT NULL THEN
        -- Nobody makes a version of the source meanwhile.
        PERFORM FROM ehub.average AS a
        JOIN ehub.space AS s ON s.id = a.space_id JOIN ehub.space AS o ON o.id = a.source_id
        WHERE s.name = $1 FOR NO KEY UPDATE OF o;
        PERFORM ehub.in_turns(
            format('spaces.%I', $1), format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', relations),
            '1 minute'
        );
    END IF;
END $$;

-- The spaces of averages, for those who may read or write them: what they follow, by which field, and
-- the field of the weights.
CREATE OR REPLACE VIEW ehub.kept_averages WITH (security_barrier) AS
SELECT s.name AS space, o.name AS source, a.by, a.weight
FROM ehub.average AS a
JOIN ehub.space AS s ON s.id = a.space_id
JOIN ehub.space AS o ON o.id = a.source_id
WHERE (SELECT ehub.hear_of_revocations()) AND EXISTS (
    SELECT FROM ehub.version AS v WHERE v.space_id = s.id AND has_table_privilege(
        to_regclass('ehub_data.v' || v.id), 'SELECT, INSERT, UPDATE, DELETE'
    )
)
ORDER BY s.name;

-- Averages that are older than what keeps them.
SELECT ehub.create_follower(a, v.id, ehub.like_of(v.id, a.space_id))
FROM ehub.average AS a JOIN ehub.version AS v ON v.space_id = a.source_id;
