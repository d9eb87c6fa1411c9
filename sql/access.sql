-- Who calls, and what a role may do. Postgres enforces it: what ehub.access records is applied as
-- privileges on views and data tables and as row policies (sql/grant.sql).
--
-- Two rights have no privilege of their own, so two that mean nothing on a view stand for them:
-- TRUNCATE on the view of a space for managing it, REFERENCES on the view of a version for seeing
-- all of its rows. Other than rows of a table, privileges are looked up as they are at the moment,
-- also for a transaction with an older snapshot: what was revoked is gone with the next statement.

-- Learn of what others have revoked and committed. True.
--
-- A session keeps what it has read of the catalogues, privileges too, until it processes the messages of
-- those who have changed them. Postgres does that when a transaction begins, when it parses the name of
-- a relation, and when it takes a lock that it does not hold yet. A statement that is planned already,
-- on relations that its transaction has locked already, does none of these, and would go on with what a
-- role was allowed to do before. To look an object up by its address processes the messages, whatever is
-- locked, in 0.4 us, and leaves no lock behind. Which object that is means nothing: nobody ever locks
-- this one against readers.
--
-- Whatever decides by privileges asks this first: the views that are for everybody, so whoever looks a
-- space up, and functions with their owner's rights when they look who calls (ehub.role_of).
CREATE OR REPLACE FUNCTION ehub.hear_of_revocations() RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN pg_get_object_address('table', '{pg_catalog,pg_am}', '{}') IS NOT NULL;
END $$;

-- The role whose statement this is, and when that began. A function with its owner's rights that
-- takes one knows who calls it, which it cannot see for itself: the value is checked where the call
-- is written, under the caller's rights, so nobody can name another; and by its time it is of no
-- use any more to whoever keeps it. All such functions have it as their last parameter, by default.
CREATE OR REPLACE FUNCTION ehub.me() RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN quote_ident(current_user)::regrole::oid
        || ' ' || (1000000 * date_part('epoch', statement_timestamp()))::bigint;
END $$;

DO $$
BEGIN
    IF to_regtype('ehub.caller') IS NULL THEN
        -- What ehub.me returns; written out, for every search checks it.
        CREATE DOMAIN ehub.caller AS text NOT NULL CHECK (
            VALUE = quote_ident(current_user)::regrole::oid
                || ' ' || (1000000 * date_part('epoch', statement_timestamp()))::bigint
        );
    END IF;
END $$;

CREATE OR REPLACE FUNCTION ehub.role_of(caller ehub.caller) RETURNS regrole
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    role text := split_part(caller, ' ', 1);
    -- As ehub.hear_of_revocations does, in whose way this is as often.
    heard boolean := pg_get_object_address('table', '{pg_catalog,pg_am}', '{}') IS NOT NULL;
BEGIN
    IF caller IS NULL OR caller
        <> role || ' ' || (1000000 * date_part('epoch', statement_timestamp()))::bigint
    THEN
        -- A subquery without rows, or a value of another statement: no check has seen it.
        RAISE EXCEPTION 'who calls cannot be told; leave the argument "caller" out'
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN role::oid;
END $$;

-- Whom a privilege or policy is for, by the oid that Postgres keeps of it, as statements name it.
CREATE OR REPLACE FUNCTION ehub.holder(role oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN role = 0 THEN 'PUBLIC' ELSE role::regrole::text END
$$;

-- The role that owns schema ehub, and with it all data tables.
CREATE OR REPLACE FUNCTION ehub.owner() RETURNS regrole
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT n.nspowner::regrole FROM pg_namespace AS n WHERE n.nspname = 'ehub'
$$;

-- Whether a role may do everything: the owner, its members, superusers.
CREATE OR REPLACE FUNCTION ehub.is_owner(role regrole) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(pg_has_role(role, ehub.owner(), 'USAGE'), false)
$$;

CREATE OR REPLACE FUNCTION ehub.manages(role regrole, space text) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(
        has_table_privilege(role, to_regclass('spaces.' || quote_ident(space)), 'TRUNCATE'),
        (
            -- An attached one: who owns the table, or ehub.
            SELECT coalesce(pg_has_role(role, c.relowner, 'USAGE'), false) OR ehub.is_owner(role)
            FROM ehub.space AS s JOIN ehub.version AS v ON v.space_id = s.id
            JOIN ehub.attachment AS a ON a.version_id = v.id
            LEFT JOIN pg_class AS c ON c.oid = a.relation
            WHERE s.name = space
        ),
        false
    )
$$;

CREATE OR REPLACE FUNCTION ehub.require_owner(caller ehub.caller) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT ehub.is_owner(ehub.role_of(caller)) THEN
        RAISE EXCEPTION 'only %, the owner of schema ehub, may do this', ehub.owner()
            USING ERRCODE = 'insufficient_privilege';
    END IF;
END $$;

-- Whether a role may read or write rows of a version.
CREATE OR REPLACE FUNCTION ehub.may_touch(role regrole, version_id bigint) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(has_table_privilege(
        role, ehub.table_of(version_id), 'SELECT, INSERT, UPDATE, DELETE'
    ), false)
$$;

-- Whether a role sees every row of a version, and may be told what an index of it says.
--
-- Where there are row policies, one of ehub's must show all rows to the role, and none of somebody
-- else's may hide any.
CREATE OR REPLACE FUNCTION ehub.sees_all_rows(role regrole, version_id bigint) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    relation record;
BEGIN
    IF to_regclass('ehub_data.v' || version_id) IS NULL THEN
        -- What Postgres says of somebody's own table is all there is to know.
        RETURN coalesce(
            (
                SELECT has_table_privilege(role, c.oid, 'SELECT')
                    AND has_schema_privilege(role, c.relnamespace, 'USAGE')
                    AND NOT ehub.hides_rows(c.oid, role)
                FROM pg_class AS c WHERE c.oid = ehub.table_of(version_id)
            ),
            false
        );
    END IF;
    SELECT c.oid, c.relowner, c.relrowsecurity, c.relforcerowsecurity, v.space_id,
        to_regclass('spaces.' || quote_ident(s.name || '@' || v.name)) AS shown
    INTO relation
    FROM ehub.version AS v
    JOIN ehub.space AS s ON s.id = v.space_id
    JOIN pg_class AS c ON c.oid = to_regclass('ehub_data.v' || v.id)
    WHERE v.id = version_id;
    IF NOT coalesce(
        has_table_privilege(role, relation.oid, 'SELECT')
            AND has_table_privilege(role, relation.shown, 'REFERENCES'),
        false
    ) THEN
        RETURN false;
    ELSIF NOT relation.relrowsecurity OR EXISTS (
        SELECT FROM pg_roles AS r WHERE r.oid = role AND (r.rolsuper OR r.rolbypassrls)
    ) OR NOT relation.relforcerowsecurity AND pg_has_role(role, relation.relowner, 'USAGE') THEN
        RETURN true;
    END IF;
    -- By the few grants that are not limited: there may be as many policies as tenants.
    RETURN EXISTS (
        SELECT FROM ehub.access AS a
        JOIN pg_policy AS p ON p.polrelid = relation.oid AND p.polname = ('ehub_' || a.id)::name
        WHERE a.space_id = relation.space_id
            AND coalesce(a.version_id, sees_all_rows.version_id) = sees_all_rows.version_id
            AND a.rows IS NULL
            AND pg_has_role(sees_all_rows.role, a.role::oid, 'USAGE')
            AND pg_get_expr(p.polqual, p.polrelid) = 'true'
    ) AND NOT EXISTS (
        SELECT FROM pg_policy AS p
        WHERE p.polrelid = relation.oid AND p.polname !~ '^ehub_[0-9]+$'
    );
END $$;

-- The same, for whoever asks about itself.
CREATE OR REPLACE FUNCTION ehub.sees_all(
    version_id bigint,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN ehub.sees_all_rows(ehub.role_of(caller), version_id);
END $$;

-- The index that holds just the rows of a version that a role sees: the one over all of them, or the
-- one over its row limits; NULL where there is none.
--
-- Limits are read in the transaction's snapshot. In one that is kept they may have been taken away
-- since, so a limited role is answered under READ COMMITTED alone.
CREATE OR REPLACE FUNCTION ehub.index_of(role regrole, version_id bigint) RETURNS bigint
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    limits jsonb[];
BEGIN
    IF ehub.sees_all_rows(role, version_id) THEN
        RETURN (SELECT i.id FROM ehub.index AS i WHERE i.version_id = $2 AND i.rows IS NULL AND i.name IS NULL);
    ELSIF NOT coalesce(
        has_table_privilege(role, ehub.table_of(version_id), 'SELECT'), false
    ) OR current_setting('transaction_isolation') <> 'read committed' THEN
        RETURN NULL;
    END IF;
    limits := ehub.limits_of(role, version_id);
    RETURN (SELECT i.id FROM ehub.index AS i WHERE i.version_id = $2 AND i.rows = limits);
END $$;

-- What rows of a version a role is limited to: the objects of which a row's metadata contains one;
-- NULL where no grant limits it, or somebody else's row policies do.
CREATE OR REPLACE FUNCTION ehub.limits_of(role regrole, version_id bigint) RETURNS jsonb[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT array_agg(DISTINCT a.rows ORDER BY a.rows)
    FROM ehub.access AS a
    JOIN ehub.version AS v ON v.space_id = a.space_id
    JOIN pg_roles AS r ON r.oid = a.role
    WHERE v.id = $2 AND coalesce(a.version_id, v.id) = v.id
        AND a.rows IS NOT NULL AND pg_has_role($1, r.oid, 'USAGE')
        AND NOT EXISTS (
            SELECT FROM pg_policy AS p
            WHERE p.polrelid = to_regclass('ehub_data.v' || $2) AND p.polname !~ '^ehub_[0-9]+$'
        )
$$;

-- Rows within limits, as a condition in the text of a statement or policy: as Postgres writes it, and
-- so for those who have standard_conforming_strings on.
CREATE OR REPLACE FUNCTION ehub.condition(VARIADIC limits jsonb[]) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT string_agg(
        format('(metadata @> ''%s''::jsonb)', replace(one::text, '''', '''''')), ' OR '
    )
    FROM unnest(limits) AS one
$$;
