-- Filters: conditions on metadata, as JSON, and what Postgres makes of them.
--
--     {"lang": "en"}                          a field equals a value
--     {"price": {">=": 5, "<": 20}}           =, !=, <, <=, >, >=, in, "not in", exists
--     {"lang": "en", "price": {"<": 20}}      all of them
--     {"or": [filter, ...]}, {"and": [filter, ...]}, {"not": filter}
--
-- A field that holds a list matches where one of its elements does. A value of another type than is
-- asked for matches no comparison, and so does a field that is not there: "not", != and "not in" are
-- true then. "a.b" is field b of the object in a; a backslash before a dot, or before a first letter,
-- takes it as a part of the name.
--
-- A filter becomes a jsonpath predicate that is never unknown, so that "not" is the complement. It is
-- a value: it goes into a statement as a parameter, and a GIN index on metadata serves it.

-- The predicate that a filter means.
CREATE OR REPLACE FUNCTION ehub.filter_path(filter jsonb) RETURNS jsonpath
LANGUAGE plpgsql IMMUTABLE STRICT SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF octet_length(filter::text) > 100000 THEN
        PERFORM ehub.refuse_filter(format(
            'it has 100000 bytes at most, not %s', octet_length(filter::text)
        ));
    END IF;
    RETURN ehub.filter_text(filter, 1)::jsonpath;
END $$;

-- The same, as a condition in the text of a statement.
CREATE OR REPLACE FUNCTION ehub.filter_condition(filter jsonb) RETURNS text
LANGUAGE sql IMMUTABLE STRICT SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on AS $$
    SELECT format('(metadata @@ %L::jsonpath)', ehub.filter_path(filter)::text)
$$;

CREATE OR REPLACE FUNCTION ehub.refuse_filter(why text) RETURNS void
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'filter: %', why USING ERRCODE = 'EH021',
        HINT = 'like {"lang": "en", "price": {"<": 20}}, with =, !=, <, <=, >, >=, in, "not in",'
            ' exists, and, or, not';
END $$;

CREATE OR REPLACE FUNCTION ehub.filter_text(filter jsonb, depth int) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    field text;
    wanted jsonb;
    part text;
    parts text[] := '{}';
    inner_parts text[];
BEGIN
    IF jsonb_typeof(filter) IS DISTINCT FROM 'object' THEN
        PERFORM ehub.refuse_filter(format(
            'an object is needed, not %s', coalesce(left(filter::text, 60), 'NULL')
        ));
    ELSIF depth > 30 THEN
        PERFORM ehub.refuse_filter('"and", "or" and "not" go 30 levels deep at most');
    END IF;
    FOR field, wanted IN SELECT * FROM jsonb_each(filter) LOOP
        IF field = 'not' THEN
            part := '!(' || ehub.filter_text(wanted, depth + 1) || ')';
        ELSIF field IN ('and', 'or') THEN
            IF jsonb_typeof(wanted) <> 'array' THEN
                PERFORM ehub.refuse_filter(format(
                    '%s takes a list of filters, not %s', to_json(field), left(wanted::text, 60)
                ));
            END IF;
            SELECT coalesce(array_agg('(' || ehub.filter_text(one, depth + 1) || ')'), '{}')
            INTO inner_parts FROM jsonb_array_elements(wanted) AS one;
            part := CASE
                WHEN inner_parts <> '{}' THEN
                    ehub.joined(inner_parts, CASE field WHEN 'or' THEN ' || ' ELSE ' && ' END)
                WHEN field = 'or' THEN '1 == 0'
                ELSE '1 == 1'
            END;
        ELSE
            part := ehub.filter_of_field(field, wanted);
        END IF;
        parts := parts || ('(' || part || ')');
    END LOOP;
    RETURN CASE WHEN parts = '{}' THEN '1 == 1' ELSE ehub.joined(parts, ' && ') END;
END $$;

-- Parts with an operator between them. Many are joined in groups: jsonpath goes as deep as a chain is
-- long, and then the stack is too small for it.
CREATE OR REPLACE FUNCTION ehub.joined(parts text[], operator text) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF cardinality(parts) > 500 THEN
        SELECT array_agg(g.part) INTO parts FROM (
            SELECT '(' || string_agg(p.part, operator ORDER BY p.place) || ')' AS part
            FROM unnest(parts) WITH ORDINALITY AS p (part, place)
            GROUP BY p.place / 500 ORDER BY p.place / 500
        ) AS g;
    END IF;
    RETURN array_to_string(parts, operator);
END $$;

-- The jsonpath to a field.
CREATE OR REPLACE FUNCTION ehub.field_path(field text) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on AS $$
BEGIN
    IF strpos(field, '.') = 0 AND strpos(field, '\') = 0 AND field <> '' THEN
        RETURN '$.' || to_json(field);
    END IF;
    RETURN '$' || (
        SELECT string_agg('.' || to_json(step), '' ORDER BY place)
        FROM unnest(ehub.field_steps(field)) WITH ORDINALITY AS s (step, place)
    );
END $$;

-- The names of the objects, and at the end of the field, that a field of metadata stands for.
CREATE OR REPLACE FUNCTION ehub.field_steps(field text) RETURNS text[]
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on AS $$
BEGIN
    IF field !~ '^([^.\\]|\\.)+(\.([^.\\]|\\.)+)*$' THEN
        PERFORM ehub.refuse_filter(format('a field has a name, %s has an empty one', to_json(field)));
    END IF;
    RETURN ARRAY(
        SELECT regexp_replace(m[1], '\\(.)', '\1', 'g')
        FROM regexp_matches(field, '((?:[^.\\]|\\.)+)', 'g') WITH ORDINALITY AS t (m, place)
        ORDER BY place
    );
END $$;

-- What is asked of one field: a value, or an object of operators.
CREATE OR REPLACE FUNCTION ehub.filter_of_field(field text, wanted jsonb) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    path text := ehub.field_path(field);
    operator text;
    value jsonb;
    -- What one and the same element has to be.
    element text[] := '{}';
    parts text[] := '{}';
    bounds text;
    choices text;
BEGIN
    IF jsonb_typeof(wanted) <> 'object' THEN
        PERFORM ehub.require_scalar(field, '=', wanted);
        RETURN format('exists(%s ? (@ == %s))', path, wanted);
    ELSIF wanted = '{}' THEN
        PERFORM ehub.refuse_filter(format('field %s: an operator is missing', to_json(field)));
    END IF;
    FOR operator, value IN SELECT * FROM jsonb_each(wanted) LOOP
        CASE
            WHEN operator = '=' THEN
                PERFORM ehub.require_scalar(field, operator, value);
                element := element || format('@ == %s', value);
            WHEN operator = '!=' THEN
                PERFORM ehub.require_scalar(field, operator, value);
                parts := parts || format('!exists(%s ? (@ == %s))', path, value);
            WHEN operator IN ('<', '<=', '>', '>=') THEN
                IF jsonb_typeof(value) NOT IN ('number', 'string') THEN
                    PERFORM ehub.refuse_filter(format(
                        'field %s: %s compares with a number or a string, not with %s',
                        to_json(field), operator, left(value::text, 60)
                    ));
                ELSIF bounds <> jsonb_typeof(value) THEN
                    PERFORM ehub.refuse_filter(format(
                        'field %s: a number and a string do not compare', to_json(field)
                    ));
                END IF;
                bounds := jsonb_typeof(value);
                element := element || format('@ %s %s', operator, value);
            WHEN operator IN ('in', 'not in') THEN
                IF jsonb_typeof(value) <> 'array' THEN
                    PERFORM ehub.refuse_filter(format(
                        'field %s: %s takes a list, not %s',
                        to_json(field), to_json(operator), left(value::text, 60)
                    ));
                END IF;
                PERFORM ehub.require_scalar(field, operator, one)
                FROM jsonb_array_elements(value) AS one;
                SELECT coalesce(ehub.joined(array_agg(format('@ == %s', one)), ' || '), '1 == 0')
                INTO choices FROM jsonb_array_elements(value) AS one;
                IF operator = 'in' THEN
                    element := element || ('(' || choices || ')');
                ELSE
                    parts := parts || format('!exists(%s ? (%s))', path, choices);
                END IF;
            WHEN operator = 'exists' THEN
                IF jsonb_typeof(value) <> 'boolean' THEN
                    PERFORM ehub.refuse_filter(format(
                        'field %s: exists is true or false, not %s',
                        to_json(field), left(value::text, 60)
                    ));
                END IF;
                parts := parts || format(
                    '%sexists(%s)', CASE WHEN value = 'false' THEN '!' ELSE '' END, path
                );
            ELSE
                PERFORM ehub.refuse_filter(format(
                    'field %s: there is no operator %s', to_json(field), to_json(left(operator, 60))
                ));
        END CASE;
    END LOOP;
    IF element <> '{}' THEN
        parts := parts || format('exists(%s ? (%s))', path, array_to_string(element, ' && '));
    END IF;
    RETURN array_to_string(parts, ' && ');
END $$;

CREATE OR REPLACE FUNCTION ehub.require_scalar(field text, operator text, value jsonb) RETURNS void
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF jsonb_typeof(value) IN ('array', 'object') THEN
        PERFORM ehub.refuse_filter(format(
            'field %s: %s compares with a string, a number, true, false or null, not with %s',
            to_json(field), to_json(operator), left(value::text, 60)
        ));
    END IF;
END $$;

-- The parts of a filter that all have to hold: what is asked of a field, as an object of operators, or
-- a word with what it takes.
CREATE OR REPLACE FUNCTION ehub.filter_parts(filter jsonb)
RETURNS TABLE (field text, word text, wanted jsonb)
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    one record;
BEGIN
    FOR one IN SELECT * FROM jsonb_each(filter) LOOP
        IF one.key = 'and' THEN
            RETURN QUERY
            SELECT p.* FROM jsonb_array_elements(one.value) AS part,
                ehub.filter_parts(part) AS p;
        ELSIF one.key IN ('or', 'not') THEN
            RETURN QUERY SELECT NULL::text, one.key, one.value;
        ELSIF jsonb_typeof(one.value) <> 'object' THEN
            RETURN QUERY SELECT one.key, NULL::text, jsonb_build_object('=', one.value);
        ELSE
            -- These are of all elements of a list, the others of one and the same.
            RETURN QUERY
            SELECT one.key, NULL::text, jsonb_build_object(o.key, o.value)
            FROM jsonb_each(one.value) AS o WHERE o.key IN ('!=', 'not in', 'exists')
            UNION ALL
            SELECT one.key, NULL::text, jsonb_object_agg(o.key, o.value)
            FROM jsonb_each(one.value) AS o WHERE o.key NOT IN ('!=', 'not in', 'exists')
            HAVING count(*) > 0;
        END IF;
    END LOOP;
END $$;

-- Whether what matches one filter surely matches another. Of the many ways in which that can be so it
-- knows those that users write: the same parts, fewer of them, wider bounds, longer lists.
CREATE OR REPLACE FUNCTION ehub.implies(filter jsonb, wider jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT filter = wider OR NOT EXISTS (
        SELECT FROM ehub.filter_parts(wider) AS w
        WHERE NOT EXISTS (
            SELECT FROM ehub.filter_parts(filter) AS f
            WHERE (f.field, f.word, f.wanted) IS NOT DISTINCT FROM (w.field, w.word, w.wanted)
                -- No AND: that looks at its right side also where the left one is unknown.
                OR CASE WHEN f.field = w.field THEN ehub.element_implies(f.wanted, w.wanted) END
        )
    )
$$;

-- The same for what is asked of one element of a field.
CREATE OR REPLACE FUNCTION ehub.element_implies(narrow jsonb, wide jsonb) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    test jsonpath;
BEGIN
    IF narrow ?| ARRAY['!=', 'not in', 'exists'] OR wide ?| ARRAY['!=', 'not in'] THEN
        RETURN false;
    ELSIF wide ? 'exists' THEN
        RETURN wide -> 'exists' = 'true';
    END IF;
    IF narrow ? '=' OR narrow ? 'in' THEN
        -- All values that it can have, tried.
        test := ehub.filter_path(jsonb_build_object('v', wide));
        RETURN NOT EXISTS (
            SELECT FROM jsonb_array_elements(coalesce(
                narrow -> 'in', jsonb_build_array(narrow -> '=')
            )) AS value
            WHERE NOT jsonb_build_object('v', value) @@ test
        );
    END IF;
    RETURN NOT EXISTS (
        SELECT FROM jsonb_each(wide) AS w
        WHERE NOT EXISTS (
            SELECT FROM jsonb_each(narrow) AS n
            WHERE left(n.key, 1) = left(w.key, 1) AND left(w.key, 1) IN ('<', '>')
                -- The bound itself is inside, or left out on both sides.
                AND (
                    n.value = w.value AND (n.key = w.key OR w.key IN ('<=', '>='))
                    OR jsonb_build_object('v', n.value) @@ ehub.filter_path(
                        jsonb_build_object('v', jsonb_build_object(left(w.key, 1), w.value))
                    )
                )
        )
    );
END $$;
