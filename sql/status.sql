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

-- The same for who looks at many versions: NULL also where the caller may not read the rows of one.
CREATE OR REPLACE FUNCTION ehub.rows_shown(version_id bigint) RETURNS bigint
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN ehub.count_rows(version_id);
EXCEPTION WHEN insufficient_privilege OR undefined_table OR undefined_column THEN
    RETURN NULL;
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

-- Why a search that asks the index is exact now, of a version with such a problem and such a state of its
-- index in the service; NULL where the index service answers.
CREATE OR REPLACE FUNCTION ehub.exact_because(problem text, state text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    missing text := coalesce(problem, ehub.service_missing());
    failed timestamptz;
BEGIN
    IF missing IS NOT NULL THEN
        RETURN missing;
    ELSIF state IS NULL THEN
        RETURN 'the index service has no index of it yet';
    ELSIF state <> 'ready' THEN
        RETURN 'its index in the service is ' || state;
    END IF;
    SELECT e.last_at INTO failed FROM ehub.exact_answers() AS e
    WHERE e.reason = 'service unreachable' AND e.last_at > clock_timestamp() - interval '20 s';
    -- NULL where it was not.
    RETURN 'Postgres could not ask the index service ' || round(
        extract(epoch FROM clock_timestamp() - failed)
    ) || ' s ago; the server''s log says why';
END $$;

-- Every version that is kept warm, and beside it every copy of its indexes, for those who see all of
-- its rows. Lag: keys changed since what the copy has last reported as applied. In SQL: what
-- ehub.nearest does, and why it is slow where it is. What is wrong with one space is said in its rows.
CREATE OR REPLACE VIEW ehub.status WITH (security_barrier) AS
SELECT
    c.space,
    c.version,
    c.dims,
    c.metric,
    ehub.rows_shown(c.version_id) AS rows,
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
        'exact: ' || ehub.exact_because(p.problem, s.state),
        'by the index service' || coalesce(', through dblink: ' || ehub.link_problem(), '')
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
LEFT JOIN LATERAL (
    SELECT r.state FROM ehub.replica AS r
    WHERE r.index_id = c.index_id AND r.place LIKE 'service at %' AND r.expires_at > clock_timestamp()
    ORDER BY r.state = 'ready' DESC, r.reported_at DESC LIMIT 1
) AS s ON true
LEFT JOIN (
    ehub.index AS i
    LEFT JOIN ehub.replica AS r ON r.index_id = i.id AND r.expires_at > clock_timestamp()
) ON i.version_id = c.version_id AND ehub.sees_all(c.version_id)
WHERE c.current OR c.warm OR r.index_id IS NOT NULL
ORDER BY c.space, c.version_id, i.rows NULLS FIRST, i.name NULLS FIRST, r.reported_at DESC;
