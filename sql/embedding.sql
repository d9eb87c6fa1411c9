-- What a row of a data table must be.

-- The last word of each data table's check, reached only by a row that is wrong: it says how.
CREATE OR REPLACE FUNCTION ehub.refuse_row(
    space text, dims int, metric text, key text, embedding @vector@.vector, metadata jsonb
) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    place text := format('space %L, key %L', space, left(key, 60));
    found int := @vector@.vector_dims(embedding);
BEGIN
    IF octet_length(key) NOT BETWEEN 1 AND 1024 THEN
        RAISE EXCEPTION '%: a key has 1 to 1024 bytes, this one has %', place, octet_length(key)
            USING ERRCODE = 'EH006';
    ELSIF found <> dims THEN
        RAISE EXCEPTION '%: a vector of % dims is needed, this one has % dims', place, dims, found
            USING ERRCODE = 'EH004';
    ELSIF jsonb_typeof(metadata) <> 'object' THEN
        RAISE EXCEPTION '%: metadata is a JSON object, not %', place, jsonb_typeof(metadata)
            USING ERRCODE = 'EH007';
    END IF;
    PERFORM ehub.require_usable(place, metric, embedding);
    RETURN false;
END $$;

-- Refuse a vector that has no distance to anything under a metric.
CREATE OR REPLACE FUNCTION ehub.require_usable(
    place text, metric text, embedding @vector@.vector
) RETURNS void
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    square float8 := -(embedding OPERATOR(@vector@.<#>) embedding);
BEGIN
    IF square >= 'Infinity' THEN
        RAISE EXCEPTION '%: its values are too large for distances in float32', place
            USING ERRCODE = 'EH004';
    ELSIF metric = 'cosine' AND square < 1.1754943508222875e-38 THEN
        IF @vector@.vector_norm(embedding) > 0 THEN
            RAISE EXCEPTION '%: its length of % is too small for a direction in float32, and so for'
                ' distances under cosine', place, @vector@.vector_norm(embedding)::real
                USING ERRCODE = 'EH004';
        END IF;
        RAISE EXCEPTION '%: a zero vector has no direction, and so no distance under cosine', place
            USING ERRCODE = 'EH004';
    END IF;
END $$;

-- Which vectors have distances under a metric, as a condition.
CREATE OR REPLACE FUNCTION ehub.has_distances(metric text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT 'embedding OPERATOR(@vector@.<#>) embedding > ''-Infinity''' || CASE metric
        WHEN 'cosine' THEN ' AND embedding OPERATOR(@vector@.<#>) embedding <= -1.1754943508222875e-38'
        ELSE ''
    END
$$;

-- The rule itself, as the text of a check: plain operators, because it runs for every row.
CREATE OR REPLACE FUNCTION ehub.row_check(space text, dims int, metric text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format(
        $check$
            octet_length(key) BETWEEN 1 AND 1024
            AND @vector@.vector_dims(embedding) = %2$s
            AND %4$s
            AND jsonb_typeof(metadata) = 'object'
            OR ehub.refuse_row(%1$L, %2$s, %3$L, key, embedding, metadata)
        $check$,
        space, dims, metric, ehub.has_distances(metric)
    )
$$;
