-- What there is.

-- The spaces with their current versions and indexes, as replicas and clients ask for them.
CREATE OR REPLACE VIEW ehub.catalogue AS
SELECT
    s.name AS space,
    v.name AS version,
    v.id AS version_id,
    v.dims,
    v.metric,
    i.id AS index_id,
    i.m,
    i.ef_construction,
    i.target_recall
FROM ehub.space AS s
JOIN ehub.version AS v ON v.id = s.current_version_id
JOIN ehub.index AS i ON i.version_id = v.id;

-- Find a space; an unknown one is an error.
CREATE OR REPLACE FUNCTION ehub.require_space(name text) RETURNS ehub.catalogue
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue;
BEGIN
    SELECT * INTO target FROM ehub.catalogue AS c WHERE c.space = name;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no space %', coalesce(quote_literal(name), 'NULL')
            USING ERRCODE = 'EH001',
            HINT = 'SELECT space FROM ehub.catalogue lists them; ehub.create_space makes one';
    END IF;
    RETURN target;
END $$;
