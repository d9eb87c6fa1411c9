-- Distances without an index: of pairs, and of everything within a radius.

-- The distance of two keys.
CREATE OR REPLACE FUNCTION ehub.distance(space text, a text, b text) RETURNS float8
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_space(space);
    here text := ehub.address(target);
    distance float8;
BEGIN
    EXECUTE format('SELECT 0.0 + ($1 %s $2)', ehub.distance_operator(target.metric))
    INTO distance USING ehub.get(here, a), ehub.get(here, b);
    RETURN distance;
END $$;

-- The distance of each pair of some keys; each pair once, and none of a key to itself.
CREATE OR REPLACE FUNCTION ehub.distances(space text, keys text[])
RETURNS TABLE (a text, b text, distance float8)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    target ehub.catalogue := ehub.require_space(space);
BEGIN
    keys := ehub.as_list('keys', keys);
    PERFORM ehub.require_keys(target, keys);
    RETURN QUERY EXECUTE format(
        'WITH asked AS MATERIALIZED ('
        ' SELECT t.key, t.embedding, w.place FROM %s AS t JOIN ('
        '  SELECT k, min(place) AS place FROM unnest($1) WITH ORDINALITY AS w (k, place) GROUP BY k'
        ' ) AS w ON w.k = t.key WHERE %s)'
        ' SELECT x.key, y.key, 0.0 + (x.embedding %s y.embedding) FROM asked AS x'
        ' JOIN asked AS y ON y.place > x.place ORDER BY x.place, y.place',
        ehub.rows_of(target), ehub.has_keys(target, '$1'), ehub.distance_operator(target.metric)
    ) USING keys;
END $$;

-- Everything within a distance of a query, the nearest first; at most `most` rows where that is given.
--
-- Complete: every row that matches is compared. With `complete => false` the index is asked for more
-- and more until what it finds is farther away: several times as fast where little is that near,
-- and approximate, as ehub.nearest is.
CREATE OR REPLACE FUNCTION ehub.within(
    space text,
    query @vector@.vector,
    radius float8,
    most int DEFAULT NULL,
    filter jsonb DEFAULT NULL,
    partition text DEFAULT NULL,
    index text DEFAULT NULL,
    complete boolean DEFAULT true,
    leave_out text[] DEFAULT NULL
) RETURNS TABLE (key text, distance float8, metadata jsonb)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
SET extra_float_digits = 1 SET datestyle = 'ISO, MDY' SET gin_fuzzy_search_limit = 0 AS $$
#variable_conflict use_column
DECLARE
    target ehub.catalogue := ehub.require_space(space);
    asked int := 100;
    found record;
BEGIN
    PERFORM ehub.require_query(target, query, coalesce(most, 1));
    IF radius IS NULL OR radius = 'NaN' THEN
        RAISE EXCEPTION 'space %: a distance is a number, not %', quote_literal(space),
            coalesce(radius::text, 'NULL') USING ERRCODE = 'EH005';
    END IF;
    leave_out := ehub.keys_left_out(leave_out);
    filter := ehub.filter_with_index(target, filter, index);
    WHILE NOT complete AND asked <= 10000 LOOP
        SELECT array_agg(n.key) AS keys, array_agg(n.distance) AS distances,
            array_agg(n.metadata) AS notes, count(*) AS n, max(n.distance) AS farthest
        INTO found
        FROM ehub.nearest(
            ehub.address(target), query, asked, leave_out, filter, partition, index
        ) AS n;
        IF found.n < asked OR found.farthest > radius OR asked >= most THEN
            RETURN QUERY
            SELECT f.* FROM unnest(found.keys, found.distances, found.notes) AS f (key, distance, note)
            WHERE f.distance <= radius ORDER BY f.distance, f.key LIMIT most;
            RETURN;
        END IF;
        asked := asked * 10;
    END LOOP;
    RETURN QUERY EXECUTE format(
        'SELECT key, distance, metadata FROM ('
        ' SELECT key, 0.0 + (embedding %s $1) AS distance, metadata FROM %s AS t WHERE %s'
        ') AS compared WHERE distance <= $2 ORDER BY distance, key LIMIT $3',
        ehub.distance_operator(target.metric), ehub.rows_of(target),
        concat_ws(
            ' AND ', '($4 IS NULL OR key <> ALL ($4))', ehub.conditions(target, filter, partition)
        )
    ) USING query, radius, most, leave_out;
END $$;

-- What lies where examples lie: the (weighted) mean p of those that are liked, and where others are
-- not, p + (p - n) with their mean n. Under cosine of vectors of length 1. The way of Rocchio, 1971,
-- with the constants of Qdrant's "average vector".
CREATE OR REPLACE FUNCTION ehub.example_query(
    space text,
    likes text[],
    unlikes text[] DEFAULT NULL,
    weights float8[] DEFAULT NULL,
    unlike_weights float8[] DEFAULT NULL
) RETURNS @vector@.vector
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_space(space);
    liked float8[] := ehub.mean_of_examples(target, likes, weights);
    unliked float8[];
    found @vector@.vector;
BEGIN
    IF coalesce(cardinality(unlikes), 0) > 0 THEN
        unliked := ehub.mean_of_examples(target, unlikes, unlike_weights);
        SELECT array_agg(2 * p - n ORDER BY place) INTO liked
        FROM unnest(liked, unliked) WITH ORDINALITY AS e (p, n, place);
    ELSIF unlike_weights IS NOT NULL AND cardinality(unlike_weights) > 0 THEN
        RAISE EXCEPTION 'space %: weights of no examples', quote_literal(space)
            USING ERRCODE = 'EH005';
    END IF;
    found := liked::real[]::@vector@.vector;
    IF target.metric = 'cosine' AND @vector@.vector_norm(found) = 0 THEN
        RAISE EXCEPTION 'space %: the examples cancel each other out', quote_literal(space)
            USING ERRCODE = 'EH005';
    END IF;
    RETURN found;
END $$;

-- The weighted mean of some rows, each number in float8.
CREATE OR REPLACE FUNCTION ehub.mean_of_examples(
    target ehub.catalogue, keys text[], weights float8[]
) RETURNS float8[]
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    here text := ehub.address(target);
    total float8;
    mean float8[];
BEGIN
    keys := ehub.as_list('examples', keys);
    weights := ehub.as_list('weights', weights);
    IF coalesce(cardinality(keys), 0) = 0 THEN
        RAISE EXCEPTION 'space %: an empty batch: no examples were given',
            quote_literal(target.space) USING ERRCODE = 'EH005';
    ELSIF cardinality(keys) <> cardinality(weights) THEN
        RAISE EXCEPTION 'space %: % examples, % weights', quote_literal(target.space),
            cardinality(keys), cardinality(weights) USING ERRCODE = 'EH005';
    ELSIF EXISTS (
        SELECT FROM unnest(weights) AS w
        WHERE w IS NULL OR w IN ('NaN', 'Infinity', '-Infinity') OR w < 0
    ) THEN
        RAISE EXCEPTION 'space %: the weight of an example is a number that is not negative',
            quote_literal(target.space) USING ERRCODE = 'EH005',
            HINT = 'what is not liked has a list of its own';
    ELSIF EXISTS (
        SELECT FROM unnest(weights) AS w WHERE w <> 0 AND w NOT BETWEEN 1e-100 AND 1e100
    ) THEN
        -- Sums and products of others leave the range of float8.
        RAISE EXCEPTION 'space %: the weight of an example is 0 or from 1e-100 to 1e100',
            quote_literal(target.space) USING ERRCODE = 'EH005';
    END IF;
    total := coalesce((SELECT sum(w) FROM unnest(weights) AS w), cardinality(keys));
    IF total = 0 THEN
        RAISE EXCEPTION 'space %: the weights sum to zero', quote_literal(target.space)
            USING ERRCODE = 'EH005';
    END IF;
    SELECT array_agg(value ORDER BY place) INTO mean FROM (
        SELECT e.place, sum(e.value * v.weight / v.length) / total AS value
        FROM (
            SELECT x.vector, coalesce(x.weight, 1) AS weight,
                CASE target.metric WHEN 'cosine' THEN @vector@.vector_norm(x.vector) ELSE 1 END
                    AS length
            FROM (
                SELECT ehub.get(here, k.key) AS vector, k.weight
                FROM unnest(keys, weights) AS k (key, weight)
            ) AS x
        ) AS v, unnest(v.vector::real[]) WITH ORDINALITY AS e (value, place)
        GROUP BY e.place
    ) AS sums;
    RETURN mean;
END $$;

-- The neighbours of examples, without the examples themselves.
CREATE OR REPLACE FUNCTION ehub.nearest_like(
    space text,
    likes text[],
    k int,
    unlikes text[] DEFAULT NULL,
    weights float8[] DEFAULT NULL,
    unlike_weights float8[] DEFAULT NULL,
    filter jsonb DEFAULT NULL,
    partition text DEFAULT NULL,
    index text DEFAULT NULL
) RETURNS TABLE (key text, distance float8, metadata jsonb)
LANGUAGE plpgsql ROWS 10 SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    here text := ehub.address(ehub.require_space(space));
BEGIN
    RETURN QUERY
    SELECT * FROM ehub.nearest(
        here, ehub.example_query(here, likes, unlikes, weights, unlike_weights), k,
        ehub.as_list('likes', likes) || ehub.as_list('unlikes', unlikes), filter, partition, index
    );
END $$;
