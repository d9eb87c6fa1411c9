-- Two versions side by side: what was added, removed, changed, how far it moved, and how many of the
-- answers stay the same.

-- The rows of two versions by key, as a relation in the text of a statement: what became of each key,
-- and how far its vector moved (NULL where the dims differ). Under 'l2' and 'ip' that is the
-- Euclidean distance, under 'cosine' the cosine distance.
CREATE OR REPLACE FUNCTION ehub.relation_of_diff(earlier ehub.catalogue, later ehub.catalogue)
RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format(
        $relation$(
            SELECT
                coalesce(a.key, b.key) AS key,
                CASE
                    WHEN a.key IS NULL THEN 'added'
                    WHEN b.key IS NULL THEN 'removed'
                    WHEN ROW(a.embedding, a.metadata)::record
                        OPERATOR(pg_catalog.*=) ROW(b.embedding, b.metadata)::record THEN 'same'
                    ELSE 'changed'
                END AS change,
                %s AS moved
            FROM %s AS a FULL JOIN %s AS b ON b.key = a.key
        )$relation$,
        CASE
            WHEN earlier.dims <> later.dims THEN 'NULL::float8'
            ELSE format(
                'a.embedding %s b.embedding',
                ehub.distance_operator(CASE later.metric WHEN 'cosine' THEN 'cosine' ELSE 'l2' END)
            )
        END,
        ehub.rows_of(earlier), ehub.rows_of(later)
    )
$$;

-- How many keys were added, removed, changed (the vector or the metadata) and left the same from one
-- version to another, by their addresses; and of the keys that both have, how far they moved:
-- minimum, quartiles, 90 %, 99 % and maximum.
CREATE OR REPLACE FUNCTION ehub.diff(
    earlier text,
    later text,
    OUT added bigint,
    OUT removed bigint,
    OUT changed bigint,
    OUT same bigint,
    OUT drift float8[]
)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET extra_float_digits = 1 SET datestyle = 'ISO, MDY' AS $$
BEGIN
    EXECUTE format(
        'SELECT count(*) FILTER (WHERE change = ''added''),'
        ' count(*) FILTER (WHERE change = ''removed''),'
        ' count(*) FILTER (WHERE change = ''changed''),'
        ' count(*) FILTER (WHERE change = ''same''),'
        ' percentile_cont(ARRAY[0, 0.25, 0.5, 0.75, 0.9, 0.99, 1]) WITHIN GROUP (ORDER BY moved)'
        ' FROM %s AS rows',
        ehub.relation_of_diff(ehub.require_space(earlier), ehub.require_space(later))
    ) INTO added, removed, changed, same, drift;
END $$;

-- The keys that differ between two versions: 'added', 'removed' or 'changed', and how far they moved.
CREATE OR REPLACE FUNCTION ehub.diff_keys(earlier text, later text)
RETURNS TABLE (key text, change text, moved float8)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET extra_float_digits = 1 SET datestyle = 'ISO, MDY' AS $$
BEGIN
    RETURN QUERY EXECUTE format(
        'SELECT * FROM %s AS rows WHERE change <> ''same''',
        ehub.relation_of_diff(ehub.require_space(earlier), ehub.require_space(later))
    );
END $$;

-- For some keys, or a sample of those that both versions have: the share of the k nearest of each
-- that is the same under both. The same seed draws the same sample.
CREATE OR REPLACE FUNCTION ehub.overlap(
    earlier text,
    later text,
    k int DEFAULT 10,
    keys text[] DEFAULT NULL,
    sample int DEFAULT 100,
    seed bigint DEFAULT 0
) RETURNS TABLE (key text, overlap float8)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    a ehub.catalogue := ehub.require_space(earlier);
    b ehub.catalogue := ehub.require_space(later);
BEGIN
    IF keys IS NULL THEN
        EXECUTE format(
            'SELECT array_agg(key) FROM ('
            ' SELECT key FROM %s AS a JOIN %s AS b USING (key)'
            ' ORDER BY hashtextextended(key, $2), key LIMIT $1) AS drawn',
            ehub.rows_of(a), ehub.rows_of(b)
        ) INTO keys USING sample, seed;
    END IF;
    keys := ehub.as_list('keys', keys);
    RETURN QUERY
    SELECT one.key, ehub.shared(
        ARRAY(SELECT n.key FROM ehub.nearest_to(ehub.address(a), one.key, k) AS n),
        ARRAY(SELECT n.key FROM ehub.nearest_to(ehub.address(b), one.key, k) AS n)
    )
    FROM unnest(keys) AS one (key);
END $$;

-- The same for queries, q counted from 1; where the dims differ, each in the form of either version.
CREATE OR REPLACE FUNCTION ehub.overlap_of_queries(
    earlier text,
    later text,
    queries @vector@.vector[],
    later_queries @vector@.vector[] DEFAULT NULL,
    k int DEFAULT 10
) RETURNS TABLE (q int, overlap float8)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    a ehub.catalogue := ehub.require_space(earlier);
    b ehub.catalogue := ehub.require_space(later);
BEGIN
    queries := ehub.as_list('queries', queries);
    later_queries := ehub.as_list('later_queries', later_queries);
    IF cardinality(queries) <> cardinality(later_queries) THEN
        RAISE EXCEPTION 'each query in the form of either version is needed, not % and %',
            cardinality(queries), cardinality(later_queries) USING ERRCODE = 'EH005';
    END IF;
    RETURN QUERY
    WITH found_earlier AS (
        SELECT n.q, array_agg(n.key) AS keys
        FROM ehub.nearest_many(ehub.address(a), queries, k) AS n GROUP BY n.q
    ), found_later AS (
        SELECT n.q, array_agg(n.key) AS keys
        FROM ehub.nearest_many(ehub.address(b), coalesce(later_queries, queries), k) AS n
        GROUP BY n.q
    )
    SELECT one.q, ehub.shared(coalesce(f.keys, '{}'), coalesce(l.keys, '{}'))
    FROM generate_series(1, cardinality(queries)) AS one (q)
    LEFT JOIN found_earlier AS f ON f.q = one.q
    LEFT JOIN found_later AS l ON l.q = one.q;
END $$;

-- The share of keys that two answers have in common.
CREATE OR REPLACE FUNCTION ehub.shared(a text[], b text[]) RETURNS float8
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN greatest(cardinality(a), cardinality(b)) = 0 THEN 1 ELSE (
        SELECT count(*)::float8 FROM unnest(a) AS key WHERE key = ANY (b)
    ) / greatest(cardinality(a), cardinality(b)) END
$$;
