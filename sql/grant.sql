-- Grants: recorded in ehub.access, and applied as Postgres' own privileges and row policies.
--
-- 'read' is SELECT, 'write' that and INSERT, UPDATE, DELETE, 'admin' all of it and managing the
-- space. A grant is of a space with all its versions, also those to come, or of one version; and of
-- all rows, or of those whose metadata contains an object. Several grants add up.

-- Give a role a right on a space. For its admins.
CREATE OR REPLACE FUNCTION ehub.grant(
    space text,
    role text,
    privilege text,
    version text DEFAULT NULL,
    rows jsonb DEFAULT NULL,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    target ehub.catalogue := ehub.require_admin(caller, concat_ws('@', $1, $4));
    owner bigint := ehub.lock_space(target.space);
    holder regrole := ehub.require_role($2);
    of_version bigint := CASE WHEN strpos(concat_ws('@', $1, $4), '@') > 0 THEN target.version_id END;
BEGIN
    PERFORM ehub.require_own(target.space, 'whoever may SELECT from it may search it');
    PERFORM ehub.require_read_committed(target.space);
    PERFORM ehub.require_privilege($3, $5);
    IF $3 = 'write' THEN
        PERFORM ehub.require_no_average(target.space);
    END IF;
    IF $3 = 'admin' AND of_version IS NOT NULL THEN
        RAISE EXCEPTION 'space %: ''admin'' is of a space, not of one version',
            quote_literal(target.space) USING ERRCODE = 'EH005';
    END IF;
    INSERT INTO ehub.access (space_id, version_id, role, privilege, rows, granted_by)
    VALUES (owner, of_version, holder, $3, $5, ehub.role_of(caller)::text)
    ON CONFLICT DO NOTHING;
    IF $5 IS NOT NULL AND EXISTS (
        SELECT FROM ehub.access AS a
        WHERE a.space_id = owner AND a.rows IS NULL
            AND coalesce(a.version_id, target.version_id) = target.version_id
            AND pg_has_role(holder, a.role::oid, 'USAGE')
    ) THEN
        RAISE NOTICE 'role % sees all rows of space % by another grant', $2, target.space;
    END IF;
    PERFORM ehub.apply_access(owner, holder);
    PERFORM ehub.end_of_grant(caller, 'grant', target.space, jsonb_build_object(
        'role', $2, 'privilege', $3, 'rows', $5,
        'version', (SELECT v.name FROM ehub.version AS v WHERE v.id = of_version)
    ));
END $$;

-- Take a role's rights on a space away: all of them, or those that are named. For its admins. Takes
-- effect with the next statement of whoever had them.
CREATE OR REPLACE FUNCTION ehub.revoke(
    space text,
    role text,
    privilege text DEFAULT NULL,
    version text DEFAULT NULL,
    rows jsonb DEFAULT NULL,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    target ehub.catalogue := ehub.require_admin(caller, concat_ws('@', $1, $4));
    owner bigint := ehub.lock_space(target.space);
    holder regrole := ehub.require_role($2);
    of_version bigint := CASE WHEN strpos(concat_ws('@', $1, $4), '@') > 0 THEN target.version_id END;
BEGIN
    PERFORM ehub.require_own(target.space, 'whoever may SELECT from it may search it');
    PERFORM ehub.require_read_committed(target.space);
    IF $3 IS NOT NULL THEN
        PERFORM ehub.require_privilege($3, $5);
    END IF;
    DELETE FROM ehub.access AS a
    WHERE a.space_id = owner AND a.role = holder
        AND a.privilege = coalesce($3, a.privilege)
        AND ($5 IS NULL OR a.rows = $5)
        AND (of_version IS NULL OR a.version_id = of_version);
    IF NOT FOUND THEN
        RAISE EXCEPTION 'space %: role % has no such grant', quote_literal($1), quote_literal($2)
            USING ERRCODE = 'EH019', HINT = 'SELECT * FROM ehub.grants lists them';
    END IF;
    PERFORM ehub.apply_access(owner, holder);
    PERFORM ehub.end_of_grant(caller, 'revoke', target.space, jsonb_build_object(
        'role', $2, 'privilege', $3, 'rows', $5,
        'version', (SELECT v.name FROM ehub.version AS v WHERE v.id = of_version)
    ));
END $$;

-- Write a change of grants down, and have replicas look at once what they may still keep.
CREATE OR REPLACE FUNCTION ehub.end_of_grant(
    caller ehub.caller, action text, space text, detail jsonb
) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT ehub.log_action(ehub.role_of(caller), action, space, detail), ehub.ring()
$$;

-- Let a role make spaces; it manages those that it makes. For the owner of schema ehub.
CREATE OR REPLACE FUNCTION ehub.grant_create(
    role text,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM ehub.require_owner(caller);
    PERFORM ehub.add_default(caller, $1, 'create', NULL);
END $$;

CREATE OR REPLACE FUNCTION ehub.revoke_create(
    role text,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM ehub.require_owner(caller);
    PERFORM ehub.remove_default(caller, $1, true);
END $$;

-- Give a role a right on every space to come. For the owner of schema ehub.
CREATE OR REPLACE FUNCTION ehub.grant_default(
    role text,
    privilege text,
    rows jsonb DEFAULT NULL,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM ehub.require_owner(caller);
    PERFORM ehub.require_privilege($2, $3);
    PERFORM ehub.add_default(caller, $1, $2, $3);
END $$;

-- Give a role nothing any more on spaces to come; what it has on others stays.
CREATE OR REPLACE FUNCTION ehub.revoke_default(
    role text,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM ehub.require_owner(caller);
    PERFORM ehub.remove_default(caller, $1, false);
END $$;

-- What belongs to no space: 'create', and rights on spaces to come.
CREATE OR REPLACE FUNCTION ehub.add_default(
    caller ehub.caller, role text, privilege text, rows jsonb
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    holder regrole := ehub.require_role($2);
BEGIN
    INSERT INTO ehub.access (role, privilege, rows, granted_by)
    VALUES (holder, $3, $4, ehub.role_of(caller)::text)
    ON CONFLICT DO NOTHING;
    PERFORM ehub.apply_create();
    PERFORM ehub.log_action(
        ehub.role_of(caller), CASE $3 WHEN 'create' THEN 'grant_create' ELSE 'grant_default' END,
        NULL, jsonb_build_object('role', $2, 'privilege', $3, 'rows', $4)
    );
END $$;

CREATE OR REPLACE FUNCTION ehub.remove_default(caller ehub.caller, role text, of_create boolean)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    holder regrole := ehub.require_role($2);
BEGIN
    DELETE FROM ehub.access AS a
    WHERE a.space_id IS NULL AND a.role = holder AND (a.privilege = 'create') = of_create;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'role % has no such grant', quote_literal($2)
            USING ERRCODE = 'EH019', HINT = 'SELECT * FROM ehub.grants lists them';
    END IF;
    PERFORM ehub.apply_create();
    PERFORM ehub.log_action(
        ehub.role_of(caller), CASE WHEN of_create THEN 'revoke_create' ELSE 'revoke_default' END,
        NULL, jsonb_build_object('role', $2)
    );
END $$;

-- A role to give rights to, by its name.
CREATE OR REPLACE FUNCTION ehub.require_role(name text) RETURNS regrole
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    found regrole := (SELECT r.oid FROM pg_roles AS r WHERE r.rolname = $1);
BEGIN
    IF found IS NULL THEN
        RAISE EXCEPTION 'there is no role %', coalesce(quote_literal(left($1, 63)), 'NULL')
            USING ERRCODE = 'EH020',
            HINT = 'roles are Postgres'' roles: CREATE ROLE; for everybody, a group role';
    ELSIF found = ehub.owner() THEN
        RAISE EXCEPTION '% owns schema ehub and may do everything', quote_literal($1)
            USING ERRCODE = 'EH005';
    END IF;
    RETURN found;
END $$;

CREATE OR REPLACE FUNCTION ehub.require_privilege(privilege text, rows jsonb) RETURNS void
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF privilege IS NULL OR privilege NOT IN ('read', 'write', 'admin') THEN
        RAISE EXCEPTION 'a privilege is ''read'', ''write'' or ''admin'', not %',
            coalesce(quote_literal(left(privilege, 60)), 'NULL') USING ERRCODE = 'EH005';
    ELSIF rows IS NULL THEN
        RETURN;
    ELSIF privilege = 'admin' THEN
        RAISE EXCEPTION '''admin'' is of all rows' USING ERRCODE = 'EH005';
    ELSIF jsonb_typeof(rows) <> 'object' OR rows = '{}' THEN
        RAISE EXCEPTION 'rows are those whose metadata contains an object with something in it,'
            ' like {"tenant": 42}, not %', left(rows::text, 60) USING ERRCODE = 'EH005';
    ELSIF octet_length(rows::text) > 1000 THEN
        RAISE EXCEPTION 'an object that limits rows has 1000 bytes at most, not %',
            octet_length(rows::text) USING ERRCODE = 'EH005';
    END IF;
END $$;

-- The privileges that ehub.access means, on the views and data tables of a space: of all roles, or of
-- one.
CREATE OR REPLACE FUNCTION ehub.rights_due(space_id bigint, role oid DEFAULT NULL)
RETURNS TABLE (relation oid, holder oid, privilege text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT DISTINCT t.relation, a.role::oid, p.privilege
    FROM ehub.access AS a
    JOIN pg_roles AS r ON r.oid = a.role
    JOIN ehub.space AS s ON s.id = a.space_id
    JOIN ehub.version AS v ON v.space_id = s.id AND coalesce(a.version_id, v.id) = v.id
    CROSS JOIN LATERAL (VALUES
        ('data', to_regclass('ehub_data.v' || v.id)::oid),
        ('version', to_regclass('spaces.' || quote_ident(s.name || '@' || v.name))::oid),
        ('space', CASE WHEN a.version_id IS NULL THEN to_regclass('spaces.' || quote_ident(s.name)) END)
    ) AS t (kind, relation)
    JOIN LATERAL (VALUES
        ('SELECT', true),
        ('INSERT', a.privilege <> 'read'),
        ('UPDATE', a.privilege <> 'read'),
        ('DELETE', a.privilege <> 'read'),
        ('TRUNCATE', a.privilege = 'admin' AND t.kind = 'space'),
        ('REFERENCES', a.rows IS NULL AND t.kind = 'version')
    ) AS p (privilege, due) ON p.due
    WHERE s.id = $1 AND t.relation IS NOT NULL AND a.role::oid = coalesce($2, a.role::oid)
$$;

-- The privileges that there are, besides the owner's; those of PUBLIC under role 0.
CREATE OR REPLACE FUNCTION ehub.rights_given(space_id bigint, role oid DEFAULT NULL)
RETURNS TABLE (relation oid, holder oid, privilege text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT DISTINCT c.oid, a.grantee, a.privilege_type
    FROM ehub.space AS s
    JOIN ehub.version AS v ON v.space_id = s.id
    JOIN pg_class AS c ON c.oid IN (
        to_regclass('ehub_data.v' || v.id), to_regclass('ehub_data.h' || v.id),
        to_regclass('spaces.' || quote_ident(s.name || '@' || v.name)),
        to_regclass('spaces.' || quote_ident(s.name))
    )
    CROSS JOIN LATERAL aclexplode(c.relacl) AS a
    WHERE s.id = $1 AND a.grantee <> c.relowner AND a.grantee = coalesce($2, a.grantee)
$$;

-- Make the privileges on a space what ehub.access means: those of one role, or of everybody. For a
-- transaction that has locked the space.
CREATE OR REPLACE FUNCTION ehub.apply_access(space_id bigint, role regrole DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    change record;
    version_id bigint;
BEGIN
    FOR change IN
        SELECT coalesce(d.relation, g.relation)::regclass AS relation, d.holder IS NOT NULL AS due,
            string_agg(coalesce(d.privilege, g.privilege), ', ') AS privileges,
            ehub.holder(coalesce(d.holder, g.holder)) AS holder
        FROM ehub.rights_due($1, $2) AS d
        FULL JOIN ehub.rights_given($1, $2) AS g USING (relation, holder, privilege)
        WHERE (d.holder IS NULL) <> (g.holder IS NULL)
        GROUP BY 1, 2, 4
    LOOP
        EXECUTE format(
            CASE WHEN change.due THEN 'GRANT %s ON %s TO %s' ELSE 'REVOKE %s ON %s FROM %s CASCADE' END,
            change.privileges, change.relation, change.holder
        );
    END LOOP;
    FOR version_id IN
        SELECT v.id FROM ehub.version AS v
        WHERE v.space_id = $1 AND to_regclass('ehub_data.v' || v.id) IS NOT NULL
    LOOP
        PERFORM ehub.apply_policies(version_id);
        PERFORM ehub.tend_indexes(version_id, $2);
    END LOOP;
END $$;

-- The row policies that the grants on a version mean where there are any; `condition` is as Postgres
-- writes it.
CREATE OR REPLACE FUNCTION ehub.policies_of_grants(version_id bigint)
RETURNS TABLE (name text, role oid, command "char", condition text, limited boolean)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT 'ehub_' || a.id, r.oid, CASE a.privilege WHEN 'read' THEN 'r' ELSE '*' END::"char",
        CASE WHEN a.rows IS NULL THEN 'true' ELSE ehub.condition(a.rows) END, a.rows IS NOT NULL
    FROM ehub.access AS a
    JOIN ehub.version AS v ON v.space_id = a.space_id
    JOIN pg_roles AS r ON r.oid = a.role
    WHERE v.id = $1 AND coalesce(a.version_id, v.id) = v.id
$$;

-- Those that there are to be: none while no grant is limited, so that no search pays for them.
CREATE OR REPLACE FUNCTION ehub.policies_due(version_id bigint)
RETURNS TABLE (name text, role oid, command "char", condition text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT g.name, g.role, g.command, g.condition FROM ehub.policies_of_grants($1) AS g
    WHERE EXISTS (SELECT FROM ehub.policies_of_grants($1) AS l WHERE l.limited)
$$;

-- Make the row policies of a version what its grants mean. For a transaction that has locked the
-- space: what was read of the grants must not change before it is applied.
--
-- That needs the table for itself, and a transaction of just the role that is to lose a right may
-- hold it. So what shows nothing to anybody, because whom it was for has no privilege left, is tidied
-- up only if that can be done at once; ehub.tend tries again.
CREATE OR REPLACE FUNCTION ehub.apply_policies(version_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on AS $$
DECLARE
    relation regclass := to_regclass('ehub_data.v' || version_id);
    index name := 'v' || version_id || '_metadata_idx';
    limited boolean := EXISTS (SELECT FROM ehub.policies_due($1));
    change record;
BEGIN
    IF limited AND to_regclass(format('ehub_data.%I', index)) IS NULL THEN
        -- For the searches of those who see few rows. First, while readers are not kept out. Not IF NOT
        -- EXISTS, which waits for the writers before it looks: one of them may be who is to lose a right.
        EXECUTE format(
            'CREATE INDEX %I ON %s USING gin (metadata jsonb_path_ops)', index, relation
        );
    END IF;
    FOR change IN
        SELECT p.polname, EXISTS (
            SELECT FROM pg_roles AS r, unnest(p.polroles) AS holder
            WHERE pg_has_role(r.oid, holder, 'USAGE') AND NOT ehub.is_owner(r.oid::regrole)
                AND has_table_privilege(r.oid, relation, 'SELECT, INSERT, UPDATE, DELETE')
        ) AS shows
        FROM pg_policy AS p
        LEFT JOIN ehub.policies_of_grants($1) AS g ON g.name = p.polname
            AND ehub.policy_fits(p.polrelid, p.polname, g.command, g.role, g.condition)
        WHERE p.polrelid = relation AND p.polname ~ '^ehub_[0-9]+$' AND g.name IS NULL
    LOOP
        BEGIN
            PERFORM ehub.in_turns(
                relation::text, format('DROP POLICY %I ON %s', change.polname, relation),
                CASE WHEN change.shows THEN interval '10 s' ELSE '0' END
            );
        EXCEPTION WHEN SQLSTATE 'EH018' THEN
            IF change.shows THEN
                RAISE;
            END IF;
        END;
    END LOOP;
    IF limited THEN
        FOR change IN
            SELECT d.* FROM ehub.policies_due($1) AS d
            WHERE NOT EXISTS (
                SELECT FROM pg_policy AS p WHERE p.polrelid = relation AND p.polname = d.name
            )
        LOOP
            PERFORM ehub.in_turns(relation::text, format(
                'CREATE POLICY %I ON %s FOR %s TO %s USING (%s)', change.name, relation,
                CASE change.command WHEN 'r' THEN 'SELECT' ELSE 'ALL' END,
                change.role::regrole, change.condition
            ));
        END LOOP;
        IF NOT (SELECT c.relrowsecurity FROM pg_class AS c WHERE c.oid = relation) THEN
            PERFORM ehub.in_turns(
                relation::text, format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', relation)
            );
        END IF;
    ELSIF EXISTS (SELECT FROM pg_class AS c WHERE c.oid = to_regclass(format('ehub_data.%I', index)))
    THEN
        BEGIN
            PERFORM ehub.in_turns(
                relation::text, format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', relation), '0'
            );
            FOR change IN
                SELECT p.polname FROM pg_policy AS p
                WHERE p.polrelid = relation AND p.polname ~ '^ehub_[0-9]+$'
            LOOP
                EXECUTE format('DROP POLICY %I ON %s', change.polname, relation);
            END LOOP;
            IF NOT EXISTS (SELECT FROM pg_policy AS p WHERE p.polrelid = relation) THEN
                EXECUTE format('ALTER TABLE %s DISABLE ROW LEVEL SECURITY', relation);
            END IF;
            EXECUTE format('DROP INDEX ehub_data.%I', index);
        EXCEPTION WHEN SQLSTATE 'EH018' THEN
            NULL;
        END;
    END IF;
END $$;

-- Let the indexes over limited rows be those that searches need: one for the limits of each role, or of
-- the one that is given, where that many rows are within them that comparing all of them would be slow.
CREATE OR REPLACE FUNCTION ehub.tend_indexes(version_id bigint, role regrole DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    limits jsonb[];
    present ehub.index;
BEGIN
    FOR limits IN
        SELECT DISTINCT ehub.limits_of(a.role, $1)
        FROM ehub.access AS a
        JOIN pg_roles AS r ON r.oid = a.role
        JOIN ehub.version AS v ON v.space_id = a.space_id
        WHERE v.id = $1 AND coalesce(a.version_id, v.id) = v.id AND a.rows IS NOT NULL
            AND a.role = coalesce($2, a.role) AND NOT ehub.sees_all_rows(a.role, $1)
    LOOP
        -- No more limits than an entry of the index on their table can hold.
        CONTINUE WHEN limits IS NULL OR octet_length(limits::text) > 2000 OR EXISTS (
            SELECT FROM ehub.index AS i WHERE i.version_id = $1 AND i.rows = limits
        );
        IF ehub.are_many($1, limits, 2000) THEN
            INSERT INTO ehub.index (version_id, m, ef_construction, target_recall, rows)
            SELECT i.version_id, i.m, i.ef_construction, i.target_recall, limits
            FROM ehub.index AS i
            WHERE i.version_id = $1 AND i.rows IS NULL AND i.name IS NULL
            ON CONFLICT DO NOTHING;
        END IF;
    END LOOP;
    FOR present IN SELECT * FROM ehub.index AS i WHERE i.version_id = $1 AND i.rows IS NOT NULL LOOP
        IF NOT EXISTS (
            SELECT FROM ehub.access AS a
            JOIN pg_roles AS r ON r.oid = a.role
            JOIN ehub.version AS v ON v.space_id = a.space_id
            WHERE v.id = $1 AND coalesce(a.version_id, v.id) = v.id AND a.rows = present.rows[1]
                AND NOT ehub.sees_all_rows(a.role, $1)
                AND ehub.limits_of(a.role, $1) = present.rows
        ) OR NOT ehub.are_many($1, present.rows, 1000) THEN
            DELETE FROM ehub.index AS i WHERE i.id = present.id;
        END IF;
    END LOOP;
END $$;

-- Whether more than so many rows of a version are within limits.
CREATE OR REPLACE FUNCTION ehub.are_many(version_id bigint, limits jsonb[], number int)
RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on AS $$
DECLARE
    many boolean;
BEGIN
    EXECUTE format(
        'SELECT count(*) > $1 FROM (SELECT FROM ehub_data.%I WHERE %s LIMIT $1 + 1) AS found',
        'v' || version_id, ehub.condition(VARIADIC limits)
    ) INTO many USING number;
    RETURN many;
END $$;

-- Look after all versions, from time to time: rows come and go, and what could not be tidied up may
-- be free by now. Of a space that somebody is managing, another time.
CREATE OR REPLACE FUNCTION ehub.tend() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    version record;
BEGIN
    -- Replicas that do not live any more, or whose index is gone; not those that somebody is writing.
    DELETE FROM ehub.replica AS r WHERE (r.id, r.index_id) IN (
        SELECT o.id, o.index_id FROM ehub.replica AS o
        WHERE o.expires_at < clock_timestamp()
            OR NOT EXISTS (SELECT FROM ehub.index AS i WHERE i.id = o.index_id)
        FOR UPDATE SKIP LOCKED
    );
    FOR version IN
        SELECT v.id, v.space_id FROM ehub.version AS v
        WHERE to_regclass('ehub_data.v' || v.id || '_metadata_idx') IS NOT NULL
    LOOP
        PERFORM FROM ehub.space AS s WHERE s.id = version.space_id FOR NO KEY UPDATE SKIP LOCKED;
        IF FOUND THEN
            PERFORM ehub.tend_indexes(version.id);
            PERFORM ehub.apply_policies(version.id);
        END IF;
    END LOOP;
    PERFORM ehub.tend_triggers();
    PERFORM ehub.tend_attached();
END $$;

-- Who may make spaces: EXECUTE on the function that does.
CREATE OR REPLACE FUNCTION ehub.create_due() RETURNS TABLE (role oid)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT r.oid FROM ehub.access AS a JOIN pg_roles AS r ON r.oid = a.role
    WHERE a.privilege = 'create'
$$;

CREATE OR REPLACE FUNCTION ehub.create_given() RETURNS TABLE (role oid)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT g.grantee FROM pg_proc AS p, aclexplode(p.proacl) AS g
    WHERE p.pronamespace = 'ehub'::regnamespace AND p.proname = 'create_space'
        AND g.grantee <> p.proowner
$$;

CREATE OR REPLACE FUNCTION ehub.apply_create() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    change record;
BEGIN
    FOR change IN
        SELECT d.role IS NOT NULL AS due,
            ehub.holder(coalesce(d.role, g.role)) AS holder
        FROM ehub.create_due() AS d FULL JOIN ehub.create_given() AS g USING (role)
        WHERE (d.role IS NULL) <> (g.role IS NULL)
    LOOP
        EXECUTE format(
            CASE WHEN change.due THEN 'GRANT EXECUTE ON FUNCTION ehub.create_space TO %s'
                ELSE 'REVOKE EXECUTE ON FUNCTION ehub.create_space FROM %s CASCADE' END,
            change.holder
        );
    END LOOP;
END $$;

-- Run a statement that needs a relation for itself. It waits for those who use it, in turns that keep
-- others from it for 0.1 s at most; `patience` is for how long in all. It tells now and then whom it waits
-- for.
--
-- Autovacuum leaves a table only to whoever waits for it longer than deadlock_timeout. So each turn takes
-- first, and with more time, what keeps out autovacuum and its like, and no reader or writer.
CREATE OR REPLACE FUNCTION ehub.in_turns(
    relation text, statement text, patience interval DEFAULT '10 seconds'
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET lock_timeout = '100ms' AS $$
DECLARE
    started timestamptz := clock_timestamp();
    tell_at timestamptz := started + interval '1 s';
    maintenance interval := least(patience, current_setting('deadlock_timeout')::interval + interval '0.5 s');
    is_table boolean := (
        SELECT c.relkind IN ('r', 'p') FROM pg_class AS c WHERE c.oid = to_regclass(relation)
    );
BEGIN
    LOOP
        BEGIN
            IF is_table AND patience > '0' THEN
                PERFORM set_config(
                    'lock_timeout', round(1000 * extract(epoch FROM maintenance)) || 'ms', true
                );
                EXECUTE format('LOCK TABLE %s IN SHARE UPDATE EXCLUSIVE MODE', relation);
                PERFORM set_config('lock_timeout', '100ms', true);
            END IF;
            EXECUTE statement;
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            IF clock_timestamp() > started + patience THEN
                RAISE EXCEPTION 'transactions have been using % all the time', relation
                    USING ERRCODE = 'EH018', HINT = concat_ws(
                        '; ', 'nothing was changed', 'in use by ' || ehub.users_of(relation)
                    );
            ELSIF clock_timestamp() > tell_at THEN
                RAISE NOTICE 'waiting for %, for % of % seconds: in use by %', relation,
                    round(extract(epoch FROM clock_timestamp() - started)),
                    round(extract(epoch FROM patience)),
                    coalesce(ehub.users_of(relation), 'others, now and then')
                    USING ERRCODE = 'EH018';
                tell_at := clock_timestamp() + interval '5 s';
            END IF;
            PERFORM pg_sleep(0.05);
        END;
    END LOOP;
END $$;

-- Who holds locks on a relation, or a part of it, but for this session; NULL if nobody does.
CREATE OR REPLACE FUNCTION ehub.users_of(relation text) RETURNS text
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    WITH holder AS (
        SELECT l.pid, l.virtualtransaction AS transaction, string_agg(DISTINCT l.mode, ', ') AS modes
        FROM pg_locks AS l
        WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
            AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
            AND l.relation = ANY (ehub.tree_of(to_regclass($1)))
        GROUP BY l.pid, l.virtualtransaction
    )
    SELECT string_agg(concat(
        CASE
            WHEN h.pid IS NULL THEN format('prepared transaction %L', (
                -- It holds a lock on its own id.
                SELECT p.gid FROM pg_locks AS l JOIN pg_prepared_xacts AS p ON p.transaction = l.transactionid
                WHERE l.pid IS NULL AND l.virtualtransaction = h.transaction
            ))
            WHEN a.usesysid IS NULL THEN format('%s %s', coalesce(a.backend_type, 'autovacuum'), h.pid)
            ELSE format('process %s of role %I', h.pid, a.usename)
        END,
        ' (' || concat_ws(
            ', ', nullif(a.application_name, ''),
            a.state || coalesce(
                format(' for %s s', round(extract(epoch FROM clock_timestamp() - a.state_change))), ''
            ),
            h.modes
        ) || ')'
    ), '; ' ORDER BY h.pid)
    FROM holder AS h LEFT JOIN pg_stat_activity AS a ON a.pid = h.pid
$$;

-- Whether a role has now what a grant gave it. A snapshot may see a grant that was revoked since, and
-- privileges are never looked up in one.
CREATE OR REPLACE FUNCTION ehub.is_granted(
    space text, version_id bigint, role oid, privilege text
) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF privilege = 'create' THEN
        RETURN coalesce(
            has_function_privilege(role, to_regproc('ehub.create_space'), 'EXECUTE'), false
        );
    END IF;
    RETURN coalesce(has_table_privilege(
        role,
        CASE WHEN version_id IS NULL THEN to_regclass('spaces.' || quote_ident(space))
            ELSE to_regclass('ehub_data.v' || version_id) END,
        CASE privilege WHEN 'read' THEN 'SELECT' WHEN 'write' THEN 'INSERT' ELSE 'TRUNCATE' END
    ), false);
END $$;

-- The grants: of the spaces that one manages all, of others those to oneself, directly or through a
-- group. Without a space: 'create', and rights on spaces to come.
CREATE OR REPLACE VIEW ehub.grants WITH (security_barrier) AS
SELECT
    s.name AS space,
    v.name AS version,
    coalesce(r.rolname::text, '(dropped role ' || a.role::oid || ')') AS role,
    a.privilege,
    a.rows,
    a.granted_by,
    a.granted_at
FROM ehub.access AS a
LEFT JOIN ehub.space AS s ON s.id = a.space_id
LEFT JOIN ehub.version AS v ON v.id = a.version_id
LEFT JOIN pg_roles AS r ON r.oid = a.role
WHERE (SELECT ehub.hear_of_revocations()) AND (
    has_table_privilege(to_regclass('spaces.' || quote_ident(s.name)), 'TRUNCATE')
    OR pg_has_role(r.oid, 'USAGE')
        AND (a.space_id IS NULL OR ehub.is_granted(s.name, v.id, r.oid, a.privilege))
    OR pg_has_role((SELECT n.nspowner FROM pg_namespace AS n WHERE n.nspname = 'ehub'), 'USAGE')
)
ORDER BY s.name, v.id, r.rolname, a.id;

-- What one may do, and through which role.
CREATE OR REPLACE VIEW ehub.whoami WITH (security_barrier) AS
SELECT s.name AS space, v.name AS version, a.privilege, a.rows, r.rolname::text AS through
FROM ehub.access AS a
JOIN pg_roles AS r ON r.oid = a.role
LEFT JOIN ehub.space AS s ON s.id = a.space_id
LEFT JOIN ehub.version AS v ON v.id = a.version_id
WHERE (SELECT ehub.hear_of_revocations())
    AND pg_has_role(r.oid, 'USAGE') AND (s.id IS NOT NULL OR a.privilege = 'create')
    AND ehub.is_granted(s.name, v.id, r.oid, a.privilege)
    AND NOT pg_has_role((SELECT n.nspowner FROM pg_namespace AS n WHERE n.nspname = 'ehub'), 'USAGE')
UNION ALL
SELECT s.name, NULL, 'admin', NULL, n.nspowner::regrole::text
FROM pg_namespace AS n LEFT JOIN ehub.space AS s ON true
WHERE (SELECT ehub.hear_of_revocations())
    AND n.nspname = 'ehub' AND s.id IS NOT NULL AND pg_has_role(n.nspowner, 'USAGE')
UNION ALL
SELECT NULL, NULL, 'create', NULL, n.nspowner::regrole::text
FROM pg_namespace AS n
WHERE (SELECT ehub.hear_of_revocations())
    AND n.nspname = 'ehub' AND pg_has_role(n.nspowner, 'USAGE')
ORDER BY 1 NULLS FIRST, 2 NULLS FIRST, 3;
