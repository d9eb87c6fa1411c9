-- How everything is.

-- NULL where the table of an attached space is not any more what it was attached as.
CREATE OR REPLACE FUNCTION ehub.count_rows(version_id bigint) RETURNS bigint
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := (
        SELECT c FROM ehub.catalogue AS c WHERE c.version_id = count_rows.version_id
    );
    col name;
    n bigint;
BEGIN
    IF target.relation IS NULL THEN
        EXECUTE format('SELECT count(*) FROM ehub_data.%I', 'v' || version_id) INTO n;
    ELSE
        -- Of those with an embedding, which it does not look at.
        SELECT c.name INTO col
        FROM ehub.attached AS a, ehub.attached_column(a.relation, a."column", NULL) AS c
        WHERE a.version_id = target.version_id;
        IF FOUND THEN
            EXECUTE format('SELECT count(%I) FROM %s', col, target.relation) INTO n;
        END IF;
    END IF;
    RETURN n;
END $$;

-- The keys that changed since a watermark, for those who see all rows.
CREATE OR REPLACE FUNCTION ehub.lag(
    version_id bigint,
    watermark pg_snapshot,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS bigint
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT ehub.sees_all_rows(ehub.role_of(caller), version_id) THEN
        RETURN 0;
    END IF;
    RETURN (
        SELECT coalesce(sum(cardinality(c.keys)), 0) FROM ehub.read_log(version_id, watermark) AS c
    );
END $$;

-- Every version that is kept warm, and beside it every copy of its indexes, for those who see all of
-- its rows. Lag: keys changed since what the copy has last reported as applied. In SQL: what
-- ehub.nearest does, and why it is slow where it is.
CREATE OR REPLACE VIEW ehub.status WITH (security_barrier) AS
SELECT
    c.space,
    c.version,
    c.dims,
    c.metric,
    ehub.count_rows(c.version_id) AS rows,
    c.target_recall,
    r.state AS index_state,
    r.place,
    r.rows AS indexed_rows,
    r.tombstones,
    ehub.lag(c.version_id, r.applied) AS lag,
    r.ef,
    r.recall,
    r.memory,
    r.reported_at,
    coalesce(p.problem, r.last_error) AS last_error,
    coalesce(
        'exact: ' || coalesce(p.problem, ehub.service_missing()), 'by the index service'
    ) AS in_sql,
    coalesce(i.id, c.index_id) AS index_id,
    c.current,
    i.rows AS of_rows,
    i.name AS index
FROM ehub.catalogue AS c
LEFT JOIN ehub.attached AS a ON a.version_id = c.version_id
CROSS JOIN LATERAL (
    SELECT CASE WHEN c.relation IS NULL THEN ehub.own_problem(c.version_id) ELSE a.problem END AS problem
) AS p
LEFT JOIN (
    ehub.index AS i
    LEFT JOIN ehub.replica AS r ON r.index_id = i.id AND r.expires_at > clock_timestamp()
) ON i.version_id = c.version_id AND ehub.sees_all(c.version_id)
WHERE c.current OR c.warm OR r.index_id IS NOT NULL
ORDER BY c.space, c.version_id, i.rows NULLS FIRST, i.name NULLS FIRST, r.reported_at DESC;
