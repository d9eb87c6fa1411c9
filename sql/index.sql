-- Indexes: which there are, and which one a search goes by.

-- The indexes that a replica may keep for this role: those whose rows it may know all of, by the
-- condition that says which these are (NULL for all of them). Those over limited rows are for the
-- index service. The one over all rows is kept by partitions where there are some. `source` is what to
-- read, `by_keys` the condition for some keys of it; `token` stands for the table as long as all changes of
-- it are logged, and `problem` says why no index can follow it. Of attached tables: whether their
-- functions were made for another shape, and the shape under which filters are read.
CREATE OR REPLACE VIEW ehub.indexes WITH (security_barrier) AS
SELECT
    c.space, c.version, c.version_id, c.dims, c.metric, i.id AS index_id, i.m, i.ef_construction,
    i.target_recall, c.current, c.warm, i.rows, i.name,
    CASE WHEN i.rows IS NULL AND i.name IS NULL THEN c.partition_by END AS partition_by,
    CASE
        WHEN c.relation IS NULL
            THEN coalesce(ehub.condition(VARIADIC i.rows), ehub.filter_condition(i.filter))
        -- A table of others has rows that have no distance to anything.
        ELSE concat_ws(' AND ', ehub.has_distances(c.metric), ehub.has_filter(c, i.filter))
    END AS condition,
    i.filter,
    i.rows IS NULL AND i.name IS NULL AS whole,
    CASE
        WHEN c.relation IS NULL THEN ehub.rows_of(c)
        ELSE ehub.attached_rows(a.relation, a.column_name, a.column_number, c.dims)
    END AS source,
    ehub.has_keys(c, '$1', 'rows') AS by_keys,
    c.relation IS NOT NULL AS attached,
    CASE
        WHEN c.relation IS NULL THEN ehub.own_token(c.version_id)
        ELSE ehub.attached_token(c.version_id, a.relation, a.column_name, a.column_number)
    END AS token,
    CASE WHEN c.relation IS NOT NULL THEN a.shape <> ehub.attached_shape(a.relation) END AS outdated,
    CASE
        WHEN c.relation IS NULL THEN ehub.own_problem(c.version_id)
        ELSE ehub.attached_problem(
            c.version_id, a.relation, a.column_name, a.column_number, c.dims,
            quote_ident(current_user)::regrole
        )
    END AS problem,
    CASE WHEN c.relation IS NOT NULL THEN ehub.attached_shape(a.relation) END AS shape
FROM ehub.catalogue AS c
JOIN ehub.index AS i ON i.version_id = c.version_id
LEFT JOIN ehub.attachment AS a ON a.version_id = c.version_id
WHERE ehub.sees_all(c.version_id)
    -- What cannot be read for now is not forgotten: its problem says so.
    OR c.relation IS NOT NULL AND pg_has_role(ehub.owner(), 'USAGE');

-- Make an index over the rows of a version that match a filter, beside the one over all of them. It
-- is built in the background, and kept equal like that one; searches use it by its name, and where
-- their filter implies its own. What is not said is as in the index over all rows. Returns its id.
CREATE OR REPLACE FUNCTION ehub.create_index(
    space text,
    name text,
    "where" jsonb,
    m int DEFAULT NULL,
    ef_construction int DEFAULT NULL,
    target_recall float8 DEFAULT NULL,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_admin(caller, $1);
    made bigint;
BEGIN
    PERFORM ehub.lock_space(target.space);
    PERFORM ehub.require_name('an index', $2, 60);
    IF $3 IS NULL OR $3 = '{}' THEN
        PERFORM ehub.refuse_filter('a sub-index is over the rows that match one');
    ELSIF octet_length($3::text) > 2000 THEN
        PERFORM ehub.refuse_filter('that of a sub-index has 2000 bytes at most');
    END IF;
    PERFORM ehub.filter_path($3);
    $4 := coalesce($4, target.m);
    $5 := coalesce($5, target.ef_construction);
    $6 := coalesce($6, target.target_recall);
    PERFORM ehub.require_shape(target.space, target.dims, target.metric, $4, $5, $6);
    INSERT INTO ehub.index (version_id, m, ef_construction, target_recall, name, filter)
    VALUES (target.version_id, $4, $5, $6, $2, $3)
    ON CONFLICT DO NOTHING RETURNING id INTO made;
    IF made IS NULL THEN
        RAISE EXCEPTION 'space % has an index % already', quote_literal($1), quote_literal($2)
            USING ERRCODE = 'EH023';
    END IF;
    PERFORM ehub.log_action(
        ehub.role_of(caller), 'create_index', target.space,
        jsonb_build_object('version', target.version, 'index', $2, 'where', $3)
    );
    PERFORM ehub.ring();
    RETURN made;
END $$;

-- Give a new version the sub-indexes of another: searches by their names go on when it is promoted.
CREATE OR REPLACE FUNCTION ehub.carry_indexes(source bigint, target bigint) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO ehub.index (version_id, m, ef_construction, target_recall, name, filter)
    SELECT target, i.m, i.ef_construction, i.target_recall, i.name, i.filter
    FROM ehub.index AS i WHERE i.version_id = source AND i.name IS NOT NULL
$$;

-- Drop an index that ehub.create_index has made.
CREATE OR REPLACE FUNCTION ehub.drop_index(
    space text,
    name text,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_admin(caller, $1);
BEGIN
    PERFORM ehub.lock_space(target.space);
    PERFORM ehub.filter_of_index(target.version_id, $2);
    DELETE FROM ehub.index AS i WHERE i.version_id = target.version_id AND i.name = $2;
    PERFORM ehub.log_action(
        ehub.role_of(caller), 'drop_index', target.space,
        jsonb_build_object('version', target.version, 'index', $2)
    );
    PERFORM ehub.ring();
END $$;

-- The sub-indexes that there are, with the copy of each that is farthest.
CREATE OR REPLACE VIEW ehub.sub_indexes WITH (security_barrier) AS
SELECT
    c.space, c.version, i.name AS index, i.filter AS "where", i.m, i.ef_construction,
    i.target_recall, r.state, r.rows, r.recall, c.version_id, i.id AS index_id
FROM ehub.catalogue AS c
JOIN ehub.index AS i ON i.version_id = c.version_id AND i.name IS NOT NULL
LEFT JOIN LATERAL (
    SELECT * FROM ehub.replica AS r
    WHERE r.index_id = i.id AND r.expires_at > clock_timestamp() AND ehub.sees_all(c.version_id)
    ORDER BY r.state = 'ready' DESC, r.reported_at DESC LIMIT 1
) AS r ON true
ORDER BY c.space, c.version_id, i.name;

-- The filter of a sub-index; one that is unknown is an error.
CREATE OR REPLACE FUNCTION ehub.filter_of_index(version_id bigint, name text) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    stored jsonb;
BEGIN
    SELECT i."where" INTO stored FROM ehub.sub_indexes AS i
    WHERE i.version_id = $1 AND i.index = $2;
    IF stored IS NULL THEN
        RAISE EXCEPTION 'space % has no index %', (
            SELECT quote_literal(c.space) FROM ehub.catalogue AS c WHERE c.version_id = $1
        ), coalesce(quote_literal(left(name, 60)), 'NULL') USING ERRCODE = 'EH022',
            HINT = 'SELECT * FROM ehub.sub_indexes lists them';
    END IF;
    RETURN stored;
END $$;

-- What rows of a sub-index have to match that match a filter besides; NULL where all rows do.
CREATE OR REPLACE FUNCTION ehub.filter_with_index(
    target ehub.catalogue, filter jsonb, index text
) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    own jsonb;
BEGIN
    IF index IS NULL THEN
        RETURN nullif(filter, '{}');
    END IF;
    own := ehub.filter_of_index(target.version_id, index);
    RETURN CASE
        WHEN coalesce(filter, '{}') IN (own, '{}') THEN own
        ELSE jsonb_build_object('and', jsonb_build_array(own, filter))
    END;
END $$;

-- The conditions of a search as the text of a statement; NULL where there are none.
CREATE OR REPLACE FUNCTION ehub.conditions(target ehub.catalogue, filter jsonb, partition text)
RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM ehub.require_partition(target, partition);
    RETURN nullif(concat_ws(
        ' AND ', ehub.has_filter(target, filter),
        format('metadata ->> %L = ', target.partition_by) || quote_literal(partition)
    ), '');
END $$;

-- The indexes that hold all rows that match, among those that a replica may keep, the one over just
-- these first; and what their rows have to match still.
CREATE OR REPLACE FUNCTION ehub.indexes_for(space text, filter jsonb, index text DEFAULT NULL)
RETURNS TABLE (index_id bigint, rest jsonb)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    target ehub.catalogue := ehub.require_space(space);
    asked jsonb := ehub.filter_with_index(target, filter, index);
BEGIN
    PERFORM ehub.filter_path(asked);
    RETURN QUERY
    SELECT i.index_id, nullif(asked, i.filter) FROM ehub.indexes AS i
    WHERE i.version_id = target.version_id AND i.rows IS NULL AND (
        i.name IS NULL OR i.name = index OR ehub.implies(asked, i.filter)
    )
    ORDER BY i.filter = asked DESC NULLS LAST, i.name = index DESC NULLS LAST, i.name IS NULL;
END $$;

-- The index that a role's search goes by: the one over all rows that it sees, or a sub-index whose
-- rows include all those that match; and what its rows have to match still. NULL where there is none.
CREATE OR REPLACE FUNCTION ehub.choose_index(
    role regrole,
    version_id bigint,
    name text,
    INOUT filter jsonb,
    INOUT partition text,
    OUT index_id bigint
)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    asked jsonb := filter;
    chosen record;
    field text;
BEGIN
    index_id := ehub.index_of(role, version_id);
    IF index_id IS NULL THEN
        RETURN;
    ELSIF NOT ehub.sees_all_rows(role, version_id) THEN
        IF partition IS NOT NULL THEN
            -- Its index is over the rows that it sees, and not by partitions.
            SELECT v.partition_by INTO field FROM ehub.version AS v WHERE v.id = version_id;
            IF ehub.limits_of(role, version_id) = ARRAY[jsonb_build_object(field, partition)] THEN
                partition := NULL;
            ELSE
                index_id := NULL;
            END IF;
        END IF;
        RETURN;
    ELSIF partition IS NOT NULL THEN
        RETURN;
    END IF;
    SELECT i.id, i.filter = asked AS same INTO chosen
    FROM ehub.index AS i
    LEFT JOIN LATERAL (
        SELECT r.rows, r.state FROM ehub.replica AS r
        WHERE r.index_id = i.id AND r.expires_at > clock_timestamp()
        ORDER BY r.state = 'ready' DESC LIMIT 1
    ) AS r ON true
    WHERE i.version_id = $2 AND i.name IS NOT NULL
        AND ehub.implies(asked, i.filter) AND (i.name = $3 OR r.state = 'ready')
    ORDER BY i.name = $3 DESC NULLS LAST, i.filter = asked DESC, r.rows LIMIT 1;
    IF FOUND THEN
        index_id := chosen.id;
        IF chosen.same THEN
            filter := NULL;
        END IF;
    END IF;
END $$;

-- How many candidates to ask for where so many near ones were too few to find as many as are needed
-- that match; NULL where it takes less to compare all that match.
CREATE OR REPLACE FUNCTION ehub.candidates_needed(
    target ehub.catalogue, filter jsonb, partition text, needed int, seen int
) RETURNS int
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    every float8 := greatest(1, (
        SELECT ehub.known_rows(coalesce(target.relation, to_regclass('ehub_data.v' || target.version_id)))
    ));
    matching float8 := ehub.estimated_rows(target, filter, partition);
    asked float8 := 2 * needed * every / matching;
BEGIN
    RETURN CASE WHEN asked > seen AND asked <= 10000 AND 20 * asked < every THEN asked END;
END $$;

-- The planner's idea of how many rows match, from the statistics on the metadata.
CREATE OR REPLACE FUNCTION ehub.estimated_rows(
    target ehub.catalogue, filter jsonb, partition text
) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    plan json;
BEGIN
    EXECUTE format(
        'EXPLAIN (FORMAT json) SELECT FROM %s AS t WHERE %s', ehub.rows_of(target),
        coalesce(ehub.conditions(target, filter, partition), 'true')
    ) INTO plan;
    RETURN greatest(1, (plan #>> '{0,Plan,Plan Rows}')::bigint);
END $$;
