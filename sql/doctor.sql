-- What is not as it was recorded: rights that somebody has given or taken by hand, row policies that
-- were changed, roles that are gone, functions that others could misuse; triggers of data tables, marks of
-- current versions; attached tables that cannot be followed or were lost in a dump; a service that cannot be
-- asked. For the owner of schema ehub.

-- Each difference: what it is about, what is wrong, and what ehub.mend does about it; NULL where that
-- is for a person to decide.
CREATE OR REPLACE FUNCTION ehub.drift()
RETURNS TABLE (subject text, problem text, remedy text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT coalesce('space ' || s.name, 'spaces to come'),
        format('%L was granted to a role that is gone, oid %s', a.privilege, a.role::oid),
        'forget the grant'
    FROM ehub.access AS a LEFT JOIN ehub.space AS s ON s.id = a.space_id
    WHERE NOT EXISTS (SELECT FROM pg_roles AS r WHERE r.oid = a.role);

    RETURN QUERY
    SELECT t.relation::regclass::text,
        format('role %s lacks %s, which was granted', r.rolname, string_agg(t.privilege, ', ')),
        'give it'
    FROM ehub.space AS s
    CROSS JOIN LATERAL (
        SELECT * FROM ehub.rights_due(s.id) EXCEPT SELECT * FROM ehub.rights_given(s.id)
    ) AS t
    JOIN pg_roles AS r ON r.oid = t.holder
    GROUP BY t.relation, r.rolname;

    RETURN QUERY
    SELECT t.relation::regclass::text,
        format(
            '%s has %s, which was not granted by ehub.grant',
            coalesce('role ' || r.rolname, 'everybody'), string_agg(t.privilege, ', ')
        ),
        'take it away'
    FROM ehub.space AS s
    CROSS JOIN LATERAL (
        SELECT * FROM ehub.rights_given(s.id) EXCEPT SELECT * FROM ehub.rights_due(s.id)
    ) AS t
    LEFT JOIN pg_roles AS r ON r.oid = t.holder
    GROUP BY t.relation, r.rolname;

    RETURN QUERY
    SELECT c.oid::regclass::text,
        CASE
            WHEN p.polname IS NULL THEN format('row policy %I is missing', d.name)
            WHEN d.name IS NOT NULL THEN format('row policy %I was changed', p.polname)
            WHEN ours THEN format('row policy %I belongs to no grant', p.polname)
            ELSE format('row policy %I is somebody else''s: searches of whom it limits are exact',
                p.polname)
        END,
        CASE
            WHEN p.polname IS NULL THEN 'create it'
            WHEN d.name IS NOT NULL THEN 'create it again'
            WHEN ours THEN 'drop it'
        END
    FROM ehub.version AS v
    JOIN pg_class AS c ON c.oid = to_regclass('ehub_data.v' || v.id)
    CROSS JOIN LATERAL (
        SELECT * FROM ehub.policies_due(v.id) AS d
        FULL JOIN (SELECT * FROM pg_policy AS p WHERE p.polrelid = c.oid) AS p ON p.polname = d.name
    ) AS x
    CROSS JOIN LATERAL (SELECT x.name) AS d
    CROSS JOIN LATERAL (
        SELECT x.polname, x.polname ~ '^ehub_[0-9]+$',
            ehub.policy_fits(x.polrelid, x.polname, x.command, x.role, x.condition)
    ) AS p (polname, ours, fits)
    WHERE NOT coalesce(p.fits, false);

    RETURN QUERY
    SELECT c.oid::regclass::text, 'row policies are switched off'::text, 'switch them on'::text
    FROM ehub.version AS v JOIN pg_class AS c ON c.oid = to_regclass('ehub_data.v' || v.id)
    WHERE NOT c.relrowsecurity AND EXISTS (SELECT FROM ehub.policies_due(v.id));

    RETURN QUERY
    SELECT 'ehub.create_space'::text,
        coalesce('role ' || r.rolname, 'everybody') || CASE WHEN due
            THEN ' lacks EXECUTE, which was granted'
            ELSE ' has EXECUTE, which was not granted by ehub.grant_create' END,
        CASE WHEN due THEN 'give it' ELSE 'take it away' END
    FROM (
        SELECT true, d.role FROM (
            SELECT * FROM ehub.create_due() EXCEPT SELECT * FROM ehub.create_given()
        ) AS d
        UNION ALL
        SELECT false, g.role FROM (
            SELECT * FROM ehub.create_given() EXCEPT SELECT * FROM ehub.create_due()
        ) AS g
    ) AS x (due, role) LEFT JOIN pg_roles AS r ON r.oid = x.role;

    RETURN QUERY
    SELECT n.nspname::text,
        format('%s may create in it', coalesce('role ' || r.rolname, 'everybody')), 'take it away'::text
    FROM pg_namespace AS n CROSS JOIN LATERAL aclexplode(n.nspacl) AS a
    LEFT JOIN pg_roles AS r ON r.oid = a.grantee
    WHERE n.nspname IN ('ehub', 'ehub_data', 'spaces') AND a.grantee <> n.nspowner
        AND a.privilege_type = 'CREATE';

    RETURN QUERY
    SELECT c.oid::regclass::text,
        format(
            '%s has %s', coalesce('role ' || r.rolname, 'everybody'),
            string_agg(a.privilege_type, ', ')
        ),
        'take it away'::text
    FROM pg_class AS c CROSS JOIN LATERAL aclexplode(c.relacl) AS a
    LEFT JOIN pg_roles AS r ON r.oid = a.grantee
    WHERE c.relnamespace = 'ehub'::regnamespace AND a.grantee <> c.relowner AND NOT (
        a.grantee = 0 AND a.privilege_type = 'SELECT'
        AND c.relname = ANY (ehub.shown_to_everybody())
    )
    GROUP BY c.oid, r.rolname;

    RETURN QUERY
    SELECT 'space ' || a.space, a.problem, NULL::text
    FROM ehub.attached AS a WHERE a.problem IS NOT NULL;

    RETURN QUERY
    SELECT 'space ' || l.space, CASE WHEN l.relation IS NULL THEN 'its table is not in this database'
        ELSE format('that it is attached to %s is not recorded here', l.relation) END,
        CASE WHEN l.relation IS NULL THEN 'forget it' ELSE 'record it' END
    FROM ehub.lost_attachments() AS l;

    RETURN QUERY
    SELECT 'server ehub_service', p.problem, 'make a new secret, for the owner'
    FROM ehub.service_problem() AS p (problem) WHERE p.problem IS NOT NULL;

    RETURN QUERY
    SELECT 'ehub_data.v' || v.id, ehub.wrong_triggers(v.id), 'put them right'
    FROM ehub.version AS v
    WHERE to_regclass('ehub_data.v' || v.id) IS NOT NULL AND ehub.wrong_triggers(v.id) IS NOT NULL;

    RETURN QUERY
    SELECT 'space ' || s.name, 'the mark of the current version is not on the one that is current',
        'mark it'
    FROM ehub.space AS s WHERE NOT ehub.is_marked(s);

    RETURN QUERY
    SELECT p.oid::regprocedure::text, problem, remedy
    FROM pg_proc AS p CROSS JOIN LATERAL (VALUES
        (
            p.pronamespace = 'ehub'::regnamespace
                AND has_function_privilege(0::oid, p.oid, 'EXECUTE')
                AND p.proname <> ALL (ehub.for_everybody()),
            'everybody may call it', 'take it away'
        ),
        (
            p.prosecdef AND NOT coalesce(
                p.proconfig && ARRAY['search_path=pg_catalog, pg_temp'], false
            ),
            'runs with its owner''s rights and a search_path that is not pinned', NULL
        ),
        (p.proowner <> ehub.owner(), 'belongs to somebody else', 'give it to the owner')
    ) AS t (applies, problem, remedy)
    WHERE t.applies AND p.pronamespace IN ('ehub'::regnamespace, 'ehub_data'::regnamespace);

    RETURN QUERY
    SELECT c.oid::regclass::text, format('belongs to %s', c.relowner::regrole), NULL::text
    FROM pg_class AS c
    WHERE c.relnamespace IN ('ehub'::regnamespace, 'ehub_data'::regnamespace, 'spaces'::regnamespace)
        AND c.relkind IN ('r', 'v', 'p', 'm', 'f', 'S') AND c.relowner <> ehub.owner();
END $$;

-- Whether a row policy of a data table is what a grant means.
CREATE OR REPLACE FUNCTION ehub.policy_fits(
    relation oid, name name, command "char", role oid, condition text
) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT p.polpermissive AND p.polcmd = command AND p.polroles = ARRAY[role]
        AND pg_get_expr(p.polqual, p.polrelid) = condition AND p.polwithcheck IS NULL
    FROM pg_policy AS p WHERE p.polrelid = relation AND p.polname = name
$$;

-- Whether the current version of a space has its mark, and no other one (ehub.make_current).
CREATE OR REPLACE FUNCTION ehub.is_marked(space ehub.space) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(bool_and(
        (ehub.mark_of(v.id) IS NOT NULL) = (v.id = space.current_version_id)
    ), true)
    FROM ehub.version AS v
    WHERE v.space_id = space.id AND to_regclass('ehub_data.v' || v.id) IS NOT NULL
$$;

-- Put right what ehub.drift finds and has a remedy for; returns what that was.
CREATE OR REPLACE FUNCTION ehub.mend()
RETURNS TABLE (subject text, problem text, remedy text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    one record;
BEGIN
    FOR subject, problem, remedy IN
        SELECT d.* FROM ehub.drift() AS d WHERE d.remedy IS NOT NULL
    LOOP
        RETURN NEXT;
    END LOOP;
    DELETE FROM ehub.access AS a WHERE NOT EXISTS (SELECT FROM pg_roles AS r WHERE r.oid = a.role);
    PERFORM ehub.apply_usage();
    PERFORM ehub.apply_create();
    FOR one IN SELECT s.id, s.name FROM ehub.space AS s ORDER BY s.id LOOP
        PERFORM ehub.lock_space(one.name);
        PERFORM ehub.apply_access(one.id);
    END LOOP;
    PERFORM ehub.recover_attachments();
    IF ehub.service_problem() IS NOT NULL THEN
        PERFORM ehub.set_service_secret();
    END IF;
    PERFORM ehub.tend_triggers('1 minute');
    PERFORM ehub.make_current(s.name, s.current_version_id)
    FROM ehub.space AS s WHERE NOT ehub.is_marked(s);
    FOR one IN
        SELECT p.oid::regprocedure AS name FROM pg_proc AS p
        WHERE p.pronamespace IN ('ehub'::regnamespace, 'ehub_data'::regnamespace)
            AND p.proowner <> ehub.owner()
    LOOP
        EXECUTE format('ALTER FUNCTION %s OWNER TO %s', one.name, ehub.owner());
    END LOOP;
    PERFORM ehub.log_action(quote_ident(current_user)::regrole, 'mend');
END $$;
