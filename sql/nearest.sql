-- Nearest neighbours: the index proposes, Postgres disposes.

-- A setting of the session, role or database, checked; the first of the choices is the default.
CREATE OR REPLACE FUNCTION ehub.choice(setting text, VARIADIC choices text[]) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    chosen text := coalesce(nullif(current_setting(setting, true), ''), choices[1]);
BEGIN
    IF chosen <> ALL (choices) THEN
        RAISE EXCEPTION '% is % or %, not %', setting,
            (SELECT string_agg(quote_literal(c), ', ') FROM unnest(choices[2:]) AS c),
            quote_literal(choices[1]), quote_literal(chosen) USING ERRCODE = 'EH005';
    END IF;
    RETURN chosen;
END $$;

-- A list that somebody gives as an array: counted from 1, whatever its lower bound is. One of several
-- dimensions is refused.
CREATE OR REPLACE FUNCTION ehub.as_list(what text, list anyarray) RETURNS anyarray
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF array_ndims(list) > 1 THEN
        RAISE EXCEPTION '% is a list: an array of one dimension, not of %', what, array_ndims(list)
            USING ERRCODE = 'EH005';
    END IF;
    RETURN list[:];
END $$;

-- Keys that a search leaves out. NULL is none.
CREATE OR REPLACE FUNCTION ehub.keys_left_out(leave_out text[]) RETURNS text[]
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN array_remove(ehub.as_list('leave_out', leave_out), NULL);
END $$;

-- Refuse a query that has no neighbours by its nature.
CREATE OR REPLACE FUNCTION ehub.require_query(
    target ehub.catalogue, query @vector@.vector, k int
) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF query IS NULL OR @vector@.vector_dims(query) <> target.dims THEN
        RAISE EXCEPTION 'space %: a query of % dims is needed, this one has %',
            quote_literal(target.space), target.dims,
            coalesce(@vector@.vector_dims(query)::text, 'none') USING ERRCODE = 'EH004';
    ELSIF k IS NULL OR k < 1 THEN
        RAISE EXCEPTION 'k is a number from 1 to 2147483647, not %', coalesce(k::text, 'NULL')
            USING ERRCODE = 'EH005';
    END IF;
    PERFORM ehub.require_usable(format('space %L, query', target.space), target.metric, query);
END $$;

-- Exact search: every row is compared that matches, if there is anything to match.
CREATE OR REPLACE FUNCTION ehub.nearest_exact(
    space text,
    query @vector@.vector,
    k int,
    leave_out text[] DEFAULT NULL,
    filter jsonb DEFAULT NULL,
    partition text DEFAULT NULL,
    index text DEFAULT NULL
) RETURNS TABLE (key text, distance float8, metadata jsonb)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET extra_float_digits = 1 SET datestyle = 'ISO, MDY' SET gin_fuzzy_search_limit = 0 AS $$
#variable_conflict use_column
DECLARE
    target ehub.catalogue := ehub.require_space(space);
BEGIN
    PERFORM ehub.require_query(target, query, k);
    leave_out := ehub.keys_left_out(leave_out);
    -- The sum keeps the planner from an approximate index that somebody made on the table.
    RETURN QUERY EXECUTE format(
        'SELECT * FROM ('
        ' SELECT key, 0.0 + (embedding %s $1) AS distance, metadata FROM %s AS t WHERE %s'
        ' ORDER BY distance, key LIMIT $2'
        ') AS near WHERE distance < ''NaN''',
        ehub.distance_operator(target.metric), ehub.rows_of(target),
        concat_ws(
            ' AND ', '($3 IS NULL OR key <> ALL ($3))',
            ehub.conditions(target, ehub.filter_with_index(target, filter, index), partition)
        )
    ) USING query, k, leave_out;
END $$;

-- The exact neighbours of a stored key, without itself.
CREATE OR REPLACE FUNCTION ehub.nearest_exact_to(
    space text,
    stored_key text,
    k int,
    filter jsonb DEFAULT NULL,
    partition text DEFAULT NULL,
    index text DEFAULT NULL
) RETURNS TABLE (key text, distance float8, metadata jsonb)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    -- The key's vector and its neighbours are of one version, whatever is promoted meanwhile.
    SELECT n.* FROM (SELECT ehub.address(ehub.require_space(space)) AS address OFFSET 0) AS here,
        ehub.nearest_exact(
            here.address, ehub.get(here.address, stored_key), k, ARRAY[stored_key], filter,
            partition, index
        ) AS n
$$;

CREATE OR REPLACE FUNCTION ehub.distance_operator(metric text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE metric
        WHEN 'l2' THEN 'OPERATOR(@vector@.<->)'
        WHEN 'cosine' THEN 'OPERATOR(@vector@.<=>)'
        ELSE 'OPERATOR(@vector@.<#>)'
    END
$$;

-- The keys whose rows decide a search: the candidates, and what has changed since their watermark.
--
-- STABLE, so that it sees what the statement sees that reads those rows. NULL where this is not
-- enough: the index is ahead of this transaction or too far behind, the caller does not see every
-- row, or so many of the candidates have changed that fewer than `needed` are left, and there may
-- be more of them, because as many were found as were `asked` for.
CREATE OR REPLACE FUNCTION ehub.deciding_keys(
    version_id bigint,
    watermark pg_snapshot,
    candidates text[],
    asked int,
    needed int,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS text[]
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    me regrole := ehub.role_of(caller);
    snapshot pg_snapshot := pg_current_snapshot();
    limits jsonb[];
    whole boolean;
    delta text[];
    kept int;
BEGIN
    IF NOT ehub.sees_all_rows(me, version_id) THEN
        IF ehub.index_of(me, version_id) IS NULL THEN
            RETURN NULL;
        END IF;
        limits := ehub.limits_of(me, version_id);
    END IF;
    IF current_setting('ehub.consistency', true) = 'eventual' THEN
        RETURN candidates;
    END IF;
    -- Only snapshots that are kept can be older: those of REPEATABLE READ and SERIALIZABLE.
    IF pg_snapshot_xmax(watermark) > pg_snapshot_xmax(snapshot)
        OR pg_snapshot_xmin(snapshot) < pg_snapshot_xmax(snapshot) AND EXISTS (
            SELECT FROM pg_snapshot_xip(snapshot) AS running
            WHERE pg_visible_in_snapshot(running, watermark)
        )
    THEN
        RETURN NULL;
    END IF;
    IF ehub.altered_since_proposed(version_id) THEN
        RETURN NULL;
    END IF;
    SELECT bool_or(c.keys IS NULL), array_agg(key) INTO whole, delta
    FROM ehub.read_log(version_id, watermark) AS c LEFT JOIN unnest(c.keys) AS key ON true;
    IF whole THEN
        RETURN NULL;
    ELSIF delta IS NULL THEN
        RETURN candidates;
    END IF;
    -- Reading that many rows by their keys takes as long as reading all of them in a row.
    IF cardinality(delta) > 1000
        AND cardinality(delta) > ehub.known_rows(ehub.table_of(version_id)) / 50
    THEN
        RETURN NULL;
    END IF;
    IF cardinality(candidates) >= asked THEN
        SELECT count(*) INTO kept FROM unnest(candidates) AS key WHERE key <> ALL (delta);
        IF kept < needed THEN
            RETURN NULL;
        END IF;
    END IF;
    IF limits IS NOT NULL THEN
        -- The log names the keys of all rows, also of those that are not for this role.
        EXECUTE format(
            'SELECT array_agg(key) FROM ehub_data.%I WHERE key = ANY ($1) AND metadata @> ANY ($2)',
            'v' || version_id
        ) INTO delta USING delta, limits;
    END IF;
    RETURN candidates || delta;
END $$;

-- Whether the table of an attached space has changed in a way that is not logged since ehub.candidates
-- looked at it, in this transaction: a partition may be gone by now, or its vectors are others.
CREATE OR REPLACE FUNCTION ehub.altered_since_proposed(version_id bigint) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    attached ehub.attachment;
    proposed_under text := current_setting('ehub.proposed_under', true);
BEGIN
    IF split_part(proposed_under, ' ', 1) IS DISTINCT FROM version_id::text THEN
        RETURN false;
    END IF;
    SELECT * INTO attached FROM ehub.attachment AS a WHERE a.version_id = $1;
    RETURN FOUND AND NOT starts_with(proposed_under || '/', format(
        '%s %s/%s/', version_id, (ehub.incarnation()).token, ehub.attached_token(
            version_id, attached.relation, attached.column_name, attached.column_number
        )
    ));
END $$;

-- Make the functions that check candidates of a version: each a statement that is planned once a
-- session, under the rights and in the snapshot of the caller.
CREATE OR REPLACE FUNCTION ehub.create_checks(
    version_id bigint, metric text, partition_by text
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    target ehub.catalogue := (
        SELECT c FROM ehub.catalogue AS c WHERE c.version_id = create_checks.version_id
    );
    rows text := ehub.rows_of(target);
    -- Of a column's value the metadata hold its text, which is the same in every session.
    pinned text := CASE
        WHEN target.relation IS NOT NULL
            THEN 'SET extra_float_digits = 1 SET datestyle = ''ISO, MDY'''
    END;
    -- Whether the candidates decide, and nothing else: nobody has ended a transaction since the watermark,
    -- this one has written nothing, and no row policy hides rows. Then the log need not be asked, nor who
    -- may know it.
    -- A format for the watermark.
    unchanged text := format(
        '%%s::text = pg_current_snapshot()::text AND pg_current_xact_id_if_assigned() IS NULL'
        ' AND NOT row_security_active(%L::regclass)',
        replace(coalesce(target.relation::text, format('ehub_data.%I', 'v' || version_id)), '%', '%%')
    );
    -- Rows of an attached table that have changed may have no distance to anything now.
    usable text := CASE
        WHEN target.relation IS NULL THEN 'true' ELSE ehub.has_distances(metric)
    END;
BEGIN
    EXECUTE format(
        $head$
            CREATE OR REPLACE FUNCTION ehub_data.%1$I(
                query @vector@.vector, candidates text[], watermark pg_snapshot, asked int,
                needed int, k int, leave_out text[]
            ) RETURNS TABLE (key text, distance float8, metadata jsonb)
            LANGUAGE plpgsql ROWS 10 SET search_path = pg_catalog, pg_temp %s AS %L
        $head$,
        'check_v' || version_id, pinned, format(
            $body$
            BEGIN
                RETURN QUERY
                SELECT t.key, 0.0 + (t.embedding %3$s $1), t.metadata
                FROM %2$s AS t
                WHERE %4$s AND %5$s AND ($7 IS NULL OR t.key <> ALL ($7))
                ORDER BY 2, 1 LIMIT $6;
            END
            $body$,
            'check_v' || version_id, rows, ehub.distance_operator(metric), ehub.has_keys(target, format(
                '(SELECT CASE WHEN %s THEN $2 ELSE ehub.deciding_keys(%s, $3, $2, $4, $5) END)::text[]',
                format(unchanged, '$3'), version_id
            )), usable
        )
    );
    -- The same among rows that match. Where the candidates need not, all is known as far out as the
    -- farthest of them lies that matches and has not changed; an answer that goes farther is none.
    EXECUTE format(
        $head$
            CREATE OR REPLACE FUNCTION ehub_data.%1$I(
                query @vector@.vector, candidates text[], watermark pg_snapshot, asked int,
                needed int, k int, leave_out text[], path jsonpath, partition text, matching boolean
            ) RETURNS TABLE (key text, distance float8, metadata jsonb)
            LANGUAGE plpgsql ROWS 10 SET search_path = pg_catalog, pg_temp %s AS %L
        $head$,
        'check_matching_v' || version_id, pinned, format(
            $body$
            BEGIN
                RETURN QUERY
                WITH deciding AS MATERIALIZED (
                    SELECT ehub.deciding_keys(%4$s, $3, $2, $4, $5) AS keys
                ), near AS MATERIALIZED (
                    SELECT t.key, 0.0 + (t.embedding %3$s $1) AS distance, t.metadata
                    FROM %2$s AS t
                    WHERE %6$s AND %7$s
                        AND ($7 IS NULL OR t.key <> ALL ($7))
                        AND ($8 IS NULL OR t.metadata @@ $8)
                        AND ($9 IS NULL OR t.metadata ->> %5$L = $9)
                )
                SELECT n.* FROM near AS n
                WHERE $10 OR $6 <= (
                    SELECT count(*) FROM near AS inside WHERE inside.distance <= (
                        SELECT max(same.distance) FROM near AS same WHERE NOT EXISTS (
                            SELECT FROM deciding AS d,
                                unnest(d.keys[cardinality($2) + 1 :]) AS changed (key)
                            WHERE changed.key = same.key
                        )
                    )
                )
                ORDER BY 2, 1 LIMIT $6;
            END
            $body$,
            'check_matching_v' || version_id, rows, ehub.distance_operator(metric),
            version_id, coalesce(partition_by, ''),
            ehub.has_keys(target, '(SELECT d.keys FROM deciding AS d)::text[]'), usable
        )
    );
    EXECUTE format(
        $head$
            CREATE OR REPLACE FUNCTION ehub_data.%1$I(
                queries @vector@.vector[], candidates text[], owners int[], watermark pg_snapshot,
                asked int, k int, path jsonpath, partition text
            ) RETURNS TABLE (q int, key text, distance float8, metadata jsonb)
            LANGUAGE plpgsql ROWS 1000 SET search_path = pg_catalog, pg_temp %s AS %L
        $head$,
        'check_many_v' || version_id, pinned, format(
            $body$
            BEGIN
                IF $5 <= $6 AND $7 IS NULL AND $8 IS NULL THEN
                    RETURN QUERY
                    SELECT c.owner, t.key, 0.0 + (t.embedding %3$s v.query), t.metadata
                    FROM (SELECT DISTINCT u.owner, u.key FROM unnest($3, $2) AS u (owner, key)) AS c
                    JOIN unnest($1) WITH ORDINALITY AS v (query, owner) ON v.owner = c.owner
                    JOIN %2$s AS t ON t.key = c.key AND %9$s
                    WHERE (SELECT %8$s) AND %7$s
                    ORDER BY 1, 3, 2;
                    IF FOUND THEN
                        RETURN;
                    END IF;
                END IF;
                RETURN QUERY
                WITH delta AS MATERIALIZED (
                    SELECT ehub.deciding_keys(%4$s, $4, '{}', 1, 1) AS keys
                ), changed AS MATERIALIZED (
                    SELECT c.key FROM delta AS d, unnest(d.keys) AS c (key)
                ), short AS MATERIALIZED (
                    SELECT FROM unnest($3, $2) AS c (owner, key)
                    WHERE EXISTS (SELECT FROM changed)
                    GROUP BY c.owner
                    HAVING count(*) >= $5
                        AND count(*) FILTER (WHERE c.key NOT IN (SELECT h.key FROM changed AS h)) < $6
                ), pairs AS (
                    SELECT c.owner, c.key FROM unnest($3, $2) AS c (owner, key)
                    UNION
                    SELECT s.owner, h.key
                    FROM changed AS h, generate_series(1, cardinality($1)) AS s (owner)
                ), placed AS (
                    SELECT
                        p.owner, t.key, t.metadata, 0.0 + (t.embedding %3$s v.query) AS distance
                    FROM pairs AS p
                    JOIN unnest($1) WITH ORDINALITY AS v (query, owner) ON v.owner = p.owner
                    JOIN %2$s AS t ON t.key = p.key AND %6$s
                    WHERE (SELECT d.keys IS NOT NULL FROM delta AS d)
                        AND NOT EXISTS (SELECT FROM short) AND %7$s
                        AND ($7 IS NULL OR t.metadata @@ $7)
                        AND ($8 IS NULL OR t.metadata ->> %5$L = $8)
                ), ranked AS (
                    SELECT p.*, row_number() OVER (
                        PARTITION BY p.owner ORDER BY p.distance, p.key
                    ) AS place
                    FROM placed AS p
                )
                SELECT r.owner, r.key, r.distance, r.metadata FROM ranked AS r
                WHERE r.place <= $6 ORDER BY r.owner, r.place;
            END
            $body$,
            'check_many_v' || version_id, rows, ehub.distance_operator(metric),
            version_id, coalesce(partition_by, ''),
            CASE WHEN target.relation IS NULL THEN 'true' ELSE ehub.has_keys(
                target, '(SELECT array_agg(DISTINCT o.key) FROM pairs AS o)::text[]'
            ) END, usable, format(unchanged, '$4'),
            CASE WHEN target.relation IS NULL THEN 'true' ELSE ehub.has_keys(target, '$2') END
        )
    );
END $$;

CREATE OR REPLACE FUNCTION ehub.drop_checks(version_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format('DROP FUNCTION ehub_data.%I', 'check_v' || version_id);
    EXECUTE format('DROP FUNCTION ehub_data.%I', 'check_many_v' || version_id);
    EXECUTE format('DROP FUNCTION ehub_data.%I', 'check_matching_v' || version_id);
END $$;

SELECT ehub.create_checks(v.id, v.metric, v.partition_by) FROM ehub.version AS v
WHERE NOT EXISTS (SELECT FROM ehub.attachment AS a WHERE a.version_id = v.id);
SELECT ehub.fit_attached(a.version_id) FROM ehub.attachment AS a;

-- Find the k nearest rows to a query: in any statement, joined with what you like.
--
-- With a `filter` (sql/filter.sql) among the rows that match, with a `partition` among its rows, with
-- an `index` among those of that sub-index; always k, where there are so many.
--
-- ehub.mode: 'auto' asks the index service and goes exact where it cannot help, 'index' fails then,
-- 'exact' never asks. ehub.consistency: 'strong' sees everything that this transaction sees,
-- 'eventual' leaves out what the index has not seen. ehub.ef_search: the candidates that the index
-- keeps while it searches, instead of as many as its target recall needs.
CREATE OR REPLACE FUNCTION ehub.nearest(
    space text,
    query @vector@.vector,
    k int,
    leave_out text[] DEFAULT NULL,
    filter jsonb DEFAULT NULL,
    partition text DEFAULT NULL,
    index text DEFAULT NULL
) RETURNS TABLE (key text, distance float8, metadata jsonb)
LANGUAGE plpgsql ROWS 10 SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    target ehub.catalogue;
    here text := space;
    mode text := coalesce(nullif(current_setting('ehub.mode', true), ''), 'auto');
    matching boolean := filter IS NOT NULL OR partition IS NOT NULL OR index IS NOT NULL;
    -- The square of its length, where that is usual.
    usual boolean := -(query OPERATOR(@vector@.<#>) query) BETWEEN 1e-37 AND 1e38;
    path jsonpath;
    needed int;
    asked int;
    proposed record;
    reason text;
BEGIN
    IF mode NOT IN ('auto', 'index') THEN
        mode := ehub.choice('ehub.mode', 'auto', 'index', 'exact');
    END IF;
    IF matching OR mode = 'exact' OR usual IS NOT TRUE OR (k > 0) IS NOT TRUE
        OR current_setting('transaction_isolation') <> 'read committed'
    THEN
        target := ehub.require_space(space);
        PERFORM ehub.require_query(target, query, k);
        here := ehub.address(target);
    END IF;
    IF leave_out IS NOT NULL THEN
        leave_out := ehub.keys_left_out(leave_out);
    END IF;
    IF matching THEN
        filter := ehub.filter_with_index(target, filter, index);
        PERFORM ehub.require_partition(target, partition);
        path := ehub.filter_path(filter);
    END IF;
    IF mode <> 'exact' THEN
        IF current_setting('ehub.consistency', true) <> '' THEN
            PERFORM ehub.choice('ehub.consistency', 'strong', 'eventual');
        END IF;
        needed := least(k, 1000000000) + coalesce(cardinality(leave_out), 0);
        asked := needed;
        FOR attempt IN 1 .. 3 LOOP
            proposed := ehub.candidates(here, ARRAY[query], asked, filter, partition, index);
            reason := proposed.reason;
            EXIT WHEN reason IS NOT NULL OR proposed.version_id IS NULL;
            IF matching THEN
                RETURN QUERY EXECUTE
                    'SELECT key, distance, metadata FROM ehub_data.check_matching_v'
                    || proposed.version_id || '($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)'
                USING query, proposed.keys, proposed.watermark, asked, needed, k, leave_out, path,
                    partition, proposed.matching;
            ELSE
                RETURN QUERY EXECUTE
                    'SELECT key, distance, metadata FROM ehub_data.check_v'
                    || proposed.version_id || '($1, $2, $3, $4, $5, $6, $7)'
                USING query, proposed.keys, proposed.watermark, asked, needed, k, leave_out;
            END IF;
            IF FOUND THEN
                RETURN;
            ELSIF NOT proposed.matching THEN
                reason := 'too few of the rows near it match';
                asked := ehub.candidates_needed(
                    target, filter, partition, needed, cardinality(proposed.keys)
                );
                EXIT WHEN asked IS NULL;
            ELSIF ehub.deciding_keys(
                proposed.version_id, proposed.watermark, proposed.keys, asked, needed
            ) IS NOT NULL THEN
                RETURN;
            ELSE
                reason := 'too much has changed since it was brought up to date';
                EXIT WHEN attempt = 2;
                asked := 2 * needed + 1000;
            END IF;
        END LOOP;
        target := ehub.require_space(here);
        PERFORM ehub.require_query(target, query, k);
        PERFORM ehub.require_exact_is_allowed(
            mode, target.space, coalesce(reason, 'the service has no such index yet')
        );
    END IF;
    RETURN QUERY
    SELECT * FROM ehub.nearest_exact(ehub.address(target), query, k, leave_out, filter, partition);
END $$;

-- The neighbours of a stored key, without itself.
CREATE OR REPLACE FUNCTION ehub.nearest_to(
    space text,
    stored_key text,
    k int,
    filter jsonb DEFAULT NULL,
    partition text DEFAULT NULL,
    index text DEFAULT NULL
) RETURNS TABLE (key text, distance float8, metadata jsonb)
LANGUAGE plpgsql ROWS 10 SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    -- The key's vector and its neighbours are of one version, whatever is promoted meanwhile.
    here text := ehub.address(ehub.require_space(space));
BEGIN
    RETURN QUERY
    SELECT * FROM ehub.nearest(
        here, ehub.get(here, stored_key), k, ARRAY[stored_key], filter, partition, index
    );
END $$;

-- The k nearest rows to each of many queries, in one trip to the index or, of very many, in several; q
-- counts them from 1.
CREATE OR REPLACE FUNCTION ehub.nearest_many(
    space text,
    queries @vector@.vector[],
    k int,
    filter jsonb DEFAULT NULL,
    partition text DEFAULT NULL,
    index text DEFAULT NULL
) RETURNS TABLE (q int, key text, distance float8, metadata jsonb)
LANGUAGE plpgsql ROWS 1000 SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    target ehub.catalogue := ehub.require_space(space);
    -- Sixteen megabytes, as hexadecimal digits.
    size int := greatest(1, 2000000 / (target.dims + 1));
BEGIN
    IF coalesce(cardinality(queries), 0) = 0 THEN
        RAISE EXCEPTION 'space %: an empty batch: no queries were given', quote_literal(space)
            USING ERRCODE = 'EH005';
    END IF;
    queries := ehub.as_list('queries', queries);
    PERFORM ehub.require_query(target, v.query, k) FROM unnest(queries) AS v (query);
    PERFORM ehub.require_partition(target, partition);
    filter := ehub.filter_with_index(target, filter, index);
    FOR done IN 0 .. cardinality(queries) - 1 BY size LOOP
        RETURN QUERY
        SELECT done + n.q, n.key, n.distance, n.metadata
        FROM ehub.nearest_of_batch(
            target, queries[done + 1 : done + size], k, filter, partition, index
        ) AS n;
    END LOOP;
END $$;

-- The same for a batch that goes in one trip, whose queries were checked.
CREATE OR REPLACE FUNCTION ehub.nearest_of_batch(
    target ehub.catalogue,
    queries @vector@.vector[],
    k int,
    filter jsonb,
    partition text,
    index text
) RETURNS TABLE (q int, key text, distance float8, metadata jsonb)
LANGUAGE plpgsql ROWS 1000 SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    mode text := ehub.choice('ehub.mode', 'auto', 'index', 'exact');
    path jsonpath := ehub.filter_path(filter);
    asked int := least(k, 1000000000);
    proposed record;
    reason text;
BEGIN
    IF mode <> 'exact' THEN
        PERFORM ehub.choice('ehub.consistency', 'strong', 'eventual');
        FOR attempt IN 1 .. 2 LOOP
            proposed := ehub.candidates(
                ehub.address(target), queries, asked, filter, partition, index
            );
            reason := proposed.reason;
            EXIT WHEN reason IS NOT NULL OR proposed.version_id IS NULL;
            IF NOT proposed.matching THEN
                -- Each by itself, for each may need another number of candidates.
                RETURN QUERY
                SELECT v.q::int, n.key, n.distance, n.metadata
                FROM unnest(queries) WITH ORDINALITY AS v (query, q),
                    ehub.nearest(
                        ehub.address(target), v.query, k, NULL, filter, partition
                    ) AS n
                ORDER BY v.q, n.distance, n.key;
                RETURN;
            END IF;
            RETURN QUERY EXECUTE format(
                'SELECT q, key, distance, metadata FROM ehub_data.%I($1, $2, $3, $4, $5, $6, $7, $8)',
                'check_many_v' || target.version_id
            ) USING queries, proposed.keys, (
                SELECT array_agg(c.owner::int)
                FROM unnest(proposed.counts) WITH ORDINALITY AS c (n, owner),
                    generate_series(1, c.n)
            ), proposed.watermark, asked, k, path, partition;
            IF FOUND OR cardinality(proposed.keys) = 0 AND ehub.deciding_keys(
                target.version_id, proposed.watermark, '{}', 1, 1
            ) IS NOT NULL THEN
                RETURN;
            END IF;
            reason := 'too much has changed since it was brought up to date';
            asked := 2 * asked + 1000;
        END LOOP;
        PERFORM ehub.require_exact_is_allowed(
            mode, target.space, coalesce(reason, 'the service has no such index yet')
        );
    END IF;
    RETURN QUERY
    SELECT v.q::int, n.key, n.distance, n.metadata
    FROM unnest(queries) WITH ORDINALITY AS v (query, q),
        ehub.nearest_exact(ehub.address(target), v.query, k, NULL, filter, partition) AS n
    ORDER BY v.q, n.distance, n.key;
END $$;

-- Under mode 'index' the reason why the index cannot answer is an error. Otherwise it is counted.
CREATE OR REPLACE FUNCTION ehub.require_exact_is_allowed(mode text, space text, reason text)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF mode = 'index' THEN
        RAISE EXCEPTION 'space %: the index cannot answer: %', quote_literal(space), reason
            USING ERRCODE = 'EH009', HINT = 'SET ehub.mode = ''auto'' goes exact instead';
    END IF;
    PERFORM ehub.count_exact(reason);
END $$;

-- Count an exact answer that the index could not give. A search writes nothing, and may be in a transaction
-- or on a server that must not write. But Postgres counts in shared memory how often a table was read from
-- its beginning, so there is an empty table for each reason (ehub.exact_answers).
CREATE OR REPLACE FUNCTION ehub.count_exact(reason text) RETURNS void
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF reason ~ '^(no index service is|this server has n|this is a standby)' THEN
        PERFORM FROM ehub.exact_no_service;
    ELSIF reason ~ '^the index service ' THEN
        PERFORM FROM ehub.exact_service_down;
    ELSIF reason ~ '^(it is |it follows |the service has no |parts of its graph|its table was altered)' THEN
        PERFORM FROM ehub.exact_index_not_ready;
    ELSIF reason ~ '^too much has changed' THEN
        PERFORM FROM ehub.exact_index_behind;
    ELSIF reason ~ '^no index has just' THEN
        PERFORM FROM ehub.exact_row_limits;
    ELSIF reason ~ '^too few of' THEN
        PERFORM FROM ehub.exact_filter;
    ELSIF reason ~ '^(more than |the statement that )' THEN
        PERFORM FROM ehub.exact_request;
    ELSE
        PERFORM FROM ehub.exact_service_unreachable;
    END IF;
END $$;

-- How often searches were exact because the index could not answer, since the statistics of the database
-- were reset, and when that was last (which PostgreSQL 15 does not know). Within a second or so.
CREATE OR REPLACE FUNCTION ehub.exact_answers()
RETURNS TABLE (reason text, answers bigint, last_at timestamptz)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY EXECUTE format(
        'SELECT replace(substr(c.relname, 7), ''_'', '' ''), pg_stat_get_numscans(c.oid), %s'
        ' FROM pg_class AS c WHERE c.relnamespace = ''ehub''::regnamespace AND c.relkind = ''r'''
        ' AND c.relname ~ ''^exact_'' ORDER BY c.relname',
        CASE WHEN current_setting('server_version_num')::int >= 160000
            THEN 'pg_stat_get_lastscan(c.oid)' ELSE 'NULL::timestamptz' END
    );
END $$;

-- Why the index service cannot answer yet with all that a snapshot sees; NULL if it can.
CREATE OR REPLACE FUNCTION ehub.index_missing(space text, seen pg_snapshot) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_space(space);
    anything @vector@.vector := array_fill(1::real, ARRAY[target.dims]);
    proposed record;
BEGIN
    proposed := ehub.candidates(ehub.address(target), ARRAY[anything], 1);
    IF proposed.reason IS NULL AND (
        pg_snapshot_xmax(proposed.watermark) < pg_snapshot_xmax(seen)
        OR EXISTS (
            SELECT FROM pg_snapshot_xip(proposed.watermark) AS running
            WHERE pg_visible_in_snapshot(running, seen)
        )
    ) THEN
        RETURN 'it is behind';
    END IF;
    RETURN proposed.reason;
END $$;
