-- Exact search: every row is compared.

CREATE OR REPLACE FUNCTION ehub.nearest_exact(
    space text, query @vector@.vector, k int, leave_out text DEFAULT NULL
) RETURNS TABLE (key text, distance float8, metadata jsonb)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    target ehub.catalogue := ehub.require_space(space);
BEGIN
    IF query IS NULL OR @vector@.vector_dims(query) <> target.dims THEN
        RAISE EXCEPTION 'space %: a query of % dims is needed, this one has %',
            quote_literal($1), target.dims, coalesce(@vector@.vector_dims(query)::text, 'none')
            USING ERRCODE = 'EH004';
    ELSIF k IS NULL OR k < 1 THEN
        RAISE EXCEPTION 'k is a number from 1 to 2147483647, not %', coalesce(k::text, 'NULL')
            USING ERRCODE = 'EH005';
    END IF;
    PERFORM ehub.require_usable(format('space %L, query', space), target.metric, query);
    -- The sum keeps the planner from an approximate index that somebody made on the table.
    RETURN QUERY EXECUTE format(
        'SELECT key, 0.0 + (embedding OPERATOR(@vector@.%s) $1) AS distance, metadata'
        ' FROM spaces.%I WHERE $3 IS NULL OR key <> $3 ORDER BY distance, key LIMIT $2',
        CASE target.metric WHEN 'l2' THEN '<->' WHEN 'cosine' THEN '<=>' ELSE '<#>' END,
        target.space
    ) USING query, k, leave_out;
END $$;

-- The neighbours of a stored key, without itself.
CREATE OR REPLACE FUNCTION ehub.nearest_exact_to(space text, stored_key text, k int)
RETURNS TABLE (key text, distance float8, metadata jsonb)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    query @vector@.vector;
BEGIN
    EXECUTE format(
        'SELECT embedding FROM spaces.%I WHERE key = $1', (ehub.require_space(space)).space
    ) INTO query USING stored_key;
    IF query IS NULL THEN
        RAISE EXCEPTION 'space % has no key %', quote_literal(space),
            coalesce(quote_literal(left(stored_key, 60)), 'NULL') USING ERRCODE = 'EH008';
    END IF;
    RETURN QUERY SELECT * FROM ehub.nearest_exact(space, query, k, stored_key);
END $$;
