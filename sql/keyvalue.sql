-- A row at a time, by its key. Writers go by the name, so that what they write is seen by those who
-- ask by it, whatever is promoted meanwhile.

-- Store an embedding, in place of what was there; without metadata a known key keeps its own.
CREATE OR REPLACE FUNCTION ehub.set(
    space text, key text, embedding @vector@.vector, metadata jsonb DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    kept text := ehub.kept_metadata(ehub.require_space($1), '$1');
BEGIN
    PERFORM ehub.require_own($1, 'its rows are written there');
    IF $2 IS NULL OR $3 IS NULL THEN
        RAISE EXCEPTION 'space %: a row has a key and an embedding', quote_literal($1)
            USING ERRCODE = CASE WHEN $2 IS NULL THEN 'EH006' ELSE 'EH004' END;
    END IF;
    EXECUTE format(
        'INSERT INTO spaces.%I (key, embedding, metadata) VALUES ($1, $2, coalesce($3, %s))'
        ' ON CONFLICT (key) DO UPDATE SET embedding = EXCLUDED.embedding%s',
        $1, kept,
        CASE WHEN $4 IS NOT NULL THEN ', metadata = EXCLUDED.metadata' ELSE '' END
    ) USING $2, $3, $4;
END $$;

-- The metadata that a row without any is inserted with, as an expression: nothing; or, where a row
-- without its partition is refused before it is seen that there is one already, what that one has.
CREATE OR REPLACE FUNCTION ehub.kept_metadata(target ehub.catalogue, key text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN target.partition_by IS NULL THEN '''{}''' ELSE format(
        'coalesce((SELECT t.metadata FROM ehub_data.%I AS t WHERE t.key = %s), ''{}'')',
        'v' || target.version_id, key
    ) END
$$;

-- The embedding of a key.
CREATE OR REPLACE FUNCTION ehub.get(space text, key text) RETURNS @vector@.vector
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_space($1);
    stored @vector@.vector;
BEGIN
    EXECUTE format(
        'SELECT embedding FROM %s AS t WHERE %s',
        ehub.rows_of(target), ehub.has_keys(target, 'ARRAY[$1]')
    ) INTO stored USING $2;
    IF stored IS NULL THEN
        PERFORM ehub.refuse_key($1, $2);
    END IF;
    RETURN stored;
END $$;

-- Delete a key.
CREATE OR REPLACE FUNCTION ehub.delete(space text, key text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    gone bigint;
BEGIN
    PERFORM ehub.require_own($1, 'its rows are deleted there');
    EXECUTE format('DELETE FROM spaces.%I WHERE key = $1', $1) USING $2;
    GET DIAGNOSTICS gone = ROW_COUNT;
    IF gone = 0 THEN
        PERFORM ehub.refuse_key($1, $2);
    END IF;
END $$;

-- Refuse keys of which one is not there: the first of them is named.
CREATE OR REPLACE FUNCTION ehub.require_keys(target ehub.catalogue, keys text[]) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    missing text[];
BEGIN
    IF coalesce(cardinality(keys), 0) = 0 THEN
        RAISE EXCEPTION 'space %: an empty batch: no keys were given', quote_literal(target.space)
            USING ERRCODE = 'EH005';
    END IF;
    EXECUTE format(
        'SELECT ARRAY[w.key] FROM unnest($1) WITH ORDINALITY AS w (key, place)'
        ' WHERE w.key IS NULL OR w.key NOT IN (SELECT t.key FROM %s AS t WHERE %s)'
        ' ORDER BY w.place LIMIT 1',
        ehub.rows_of(target), ehub.has_keys(target, '$1')
    ) INTO missing USING keys;
    IF missing IS NOT NULL THEN
        PERFORM ehub.refuse_key(target.space, missing[1]);
    END IF;
END $$;

CREATE OR REPLACE FUNCTION ehub.refuse_key(space text, key text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- By the name of the space: which version was meant is often not what the caller has said.
    RAISE EXCEPTION 'space % has no key %', quote_literal(split_part(space, '@', 1)),
        coalesce(quote_literal(left(key, 60)), 'NULL') USING ERRCODE = 'EH008';
END $$;
