-- What a search does, and why.

-- The ways in which ehub.nearest could answer, and which one it takes: how many rows match, as far as
-- is known or estimated, and how many vectors it compares, which is what it costs.
CREATE OR REPLACE FUNCTION ehub.explain_nearest(
    space text,
    query @vector@.vector,
    k int,
    filter jsonb DEFAULT NULL,
    partition text DEFAULT NULL,
    index text DEFAULT NULL
) RETURNS TABLE (chosen boolean, way text, rows bigint, compared bigint, note text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
SET extra_float_digits = 1 SET datestyle = 'ISO, MDY' AS $$
DECLARE
    target ehub.catalogue := ehub.require_space(space);
    mode text := ehub.choice('ehub.mode', 'auto', 'index', 'exact');
    estimate bigint;
    proposed record;
    plan jsonb;
    more int;
    refused text;
BEGIN
    PERFORM ehub.require_query(target, query, k);
    PERFORM ehub.require_partition(target, partition);
    filter := ehub.filter_with_index(target, filter, index);
    estimate := ehub.estimated_rows(target, filter, partition);
    IF mode = 'exact' THEN
        refused := 'ehub.mode is exact';
    ELSE
        proposed := ehub.candidates(
            ehub.address(target), ARRAY[query], k, filter, partition, index
        );
        refused := proposed.reason;
        plan := proposed.plan;
        IF refused IS NULL AND NOT proposed.matching THEN
            more := ehub.candidates_needed(
                target, filter, partition, k, cardinality(proposed.keys)
            );
            EXECUTE format(
                'SELECT CASE WHEN count(*) < $1 THEN format(''%%s of the %%s nearest match'','
                ' count(*), cardinality($2)) END FROM %s AS t WHERE %s AND %s',
                ehub.rows_of(target), ehub.has_keys(target, '$2'),
                coalesce(ehub.conditions(target, filter, partition), 'true')
            ) INTO refused USING k, proposed.keys;
            IF refused IS NOT NULL AND more IS NOT NULL THEN
                refused := NULL;
                plan := plan || jsonb_build_object('compared', more * 30);
            END IF;
        END IF;
    END IF;
    RETURN QUERY SELECT refused IS NULL, coalesce(plan ->> 'by', 'index'),
        (plan ->> 'rows')::bigint, (plan ->> 'compared')::bigint,
        coalesce(refused, plan ->> 'note');
    RETURN QUERY SELECT refused IS NOT NULL, 'exact', estimate, estimate, 'compares all that match; '
        || CASE WHEN ehub.known_rows(c) < 0 THEN 'their number is a guess until ANALYZE has run'
            ELSE 'their number is the planner''s estimate' END
    FROM coalesce(target.relation, to_regclass('ehub_data.v' || target.version_id)) AS c;
    -- What is often a slip of the pen: a field that no row of a sample has.
    RETURN QUERY EXECUTE format(
        'SELECT false, ''note'', NULL::bigint, NULL::bigint, ''no row of a sample has field '' || f.field'
        ' FROM (SELECT DISTINCT p.field FROM ehub.filter_parts($1) AS p WHERE p.field IS NOT NULL) AS f'
        ' WHERE NOT EXISTS (SELECT FROM (SELECT metadata FROM %s AS t LIMIT 1000) AS s'
        ' WHERE s.metadata @@ (''exists('' || ehub.field_path(f.field) || '')'')::jsonpath)',
        ehub.rows_of(target)
    ) USING coalesce(filter, '{}');
END $$;
