-- Local copies of a version: what changed since they were taken, and how they are written back.

-- Keep the change log for a copy, for an hour from now; returns what names this state (see
-- ehub.acknowledge), NULL for those who may not know which rows they do not see.
CREATE OR REPLACE FUNCTION ehub.hold_log(
    id uuid,
    version_id bigint,
    watermark pg_snapshot,
    place text,
    rows bigint,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    nonce uuid := gen_random_uuid();
BEGIN
    IF pg_is_in_recovery() OR NOT ehub.sees_all_rows(ehub.role_of(caller), $2) OR EXISTS (
        SELECT FROM ehub.replica AS r WHERE r.id = $1 AND r.state <> 'snapshot'
    ) THEN
        RETURN NULL;
    END IF;
    PERFORM ehub.acknowledge(
        $1, i.id, $4, $3, nonce, $5, interval '1 hour', 'snapshot'
    )
    FROM ehub.index AS i WHERE i.version_id = $2 AND i.rows IS NULL AND i.name IS NULL;
    RETURN nonce;
END $$;

-- The keys that have changed since the log was held; NULL where that is not known any more.
CREATE OR REPLACE FUNCTION ehub.changed_since(
    id uuid,
    nonce uuid,
    version_id bigint,
    watermark pg_snapshot,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS text[]
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    whole boolean;
    keys text[];
BEGIN
    IF NOT ehub.sees_all_rows(ehub.role_of(caller), $3)
        OR NOT EXISTS (SELECT FROM ehub.replica AS r WHERE r.id = $1 AND r.nonce = $2)
    THEN
        RETURN NULL;
    END IF;
    SELECT bool_or(c.keys IS NULL), array_agg(DISTINCT key) INTO whole, keys
    FROM ehub.read_log($3, watermark) AS c LEFT JOIN unnest(c.keys) AS key ON true;
    RETURN CASE WHEN whole THEN NULL ELSE coalesce(keys, '{}') END;
END $$;

-- Let the log go that a copy held.
CREATE OR REPLACE FUNCTION ehub.release_log(id uuid) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    DELETE FROM ehub.replica AS r WHERE r.id = $1 AND r.state = 'snapshot'
$$;

-- Write the staged rows of a copy to a version.
--
-- `whole`: afterwards these rows are all there is; else the rest stays. `origin` says that they were
-- taken from this version: then pg_temp.ehub_base holds the rows that the copy has changed, as they
-- were, with NULL for those that it has added; and unless `whole`, only these are written. Of another
-- version nothing was taken.
--
-- A conflict is a row of the version that is neither as it was taken nor as it is to be. On conflict
-- 'ours' is written, 'theirs' left alone; with 'error' nothing is written at all, `written` is NULL,
-- and `conflicts` says why.
CREATE OR REPLACE FUNCTION ehub.write_staged(
    address text,
    whole boolean,
    origin boolean,
    on_conflict text,
    OUT written bigint,
    OUT deleted bigint,
    OUT conflicts text[]
)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_space(address);
    relation text := format('ehub_data.%I', 'v' || target.version_id);
BEGIN
    PERFORM ehub.require_own(address, 'its rows are written there');
    PERFORM ehub.stop_writers(target);
    DROP TABLE IF EXISTS pg_temp.ehub_plan;
    EXECUTE format(
        $plan$
            CREATE TEMPORARY TABLE ehub_plan ON COMMIT DROP AS
            SELECT
                coalesce(t.key, o.key) AS key, o.embedding, o.metadata,
                CASE
                    WHEN b.key IS NOT NULL THEN ROW(t.embedding, t.metadata)::record
                        OPERATOR(pg_catalog.*<>) ROW(b.embedding, b.metadata)::record
                    WHEN %2$L THEN true
                    ELSE t.key IS NOT NULL
                END AS conflict
            FROM %1$s AS t
            FULL JOIN pg_temp.ehub_staging AS o ON o.key = t.key
            LEFT JOIN pg_temp.ehub_base AS b ON b.key = coalesce(t.key, o.key)
            WHERE ROW(t.embedding, t.metadata)::record
                    OPERATOR(pg_catalog.*<>) ROW(o.embedding, o.metadata)::record
                AND CASE
                    WHEN %3$L THEN true
                    WHEN %2$L THEN b.key IS NOT NULL
                    ELSE o.key IS NOT NULL
                END
        $plan$,
        relation, origin, whole
    );
    SELECT coalesce(array_agg(p.key ORDER BY p.key), '{}') INTO conflicts
    FROM pg_temp.ehub_plan AS p WHERE p.conflict;
    IF on_conflict = 'error' AND cardinality(conflicts) > 0 THEN
        RETURN;
    ELSIF on_conflict = 'theirs' THEN
        DELETE FROM pg_temp.ehub_plan AS p WHERE p.conflict;
    END IF;
    EXECUTE format(
        'DELETE FROM %s AS t USING pg_temp.ehub_plan AS p'
        ' WHERE p.embedding IS NULL AND t.key = p.key',
        relation
    );
    GET DIAGNOSTICS deleted = ROW_COUNT;
    EXECUTE format(
        'INSERT INTO %s (key, embedding, metadata)'
        ' SELECT key, embedding, metadata FROM pg_temp.ehub_plan WHERE embedding IS NOT NULL'
        ' ORDER BY key'
        ' ON CONFLICT (key) DO UPDATE'
        ' SET embedding = EXCLUDED.embedding, metadata = EXCLUDED.metadata',
        relation
    );
    GET DIAGNOSTICS written = ROW_COUNT;
END $$;
