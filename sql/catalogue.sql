-- What there is, and to whom it shows.

-- The role whose statement this is. A function with its owner's rights that takes one knows who
-- calls it, which it cannot see for itself: the value is checked where the call is written, under
-- the caller's rights, so nobody can name another.
DO $$
BEGIN
    IF to_regtype('ehub.caller') IS NULL THEN
        CREATE DOMAIN ehub.caller AS regrole CHECK (VALUE = quote_ident(current_user)::regrole);
    END IF;
END $$;

-- The versions of all spaces with their indexes, as replicas and clients ask for them: those of
-- which one may read or write the rows.
CREATE OR REPLACE VIEW ehub.catalogue WITH (security_barrier) AS
SELECT
    s.name AS space,
    v.name AS version,
    v.id AS version_id,
    v.dims,
    v.metric,
    i.id AS index_id,
    i.m,
    i.ef_construction,
    i.target_recall,
    v.id = s.current_version_id AS current,
    v.frozen_at IS NOT NULL AS frozen,
    v.warm
FROM ehub.space AS s
JOIN ehub.version AS v ON v.space_id = s.id
JOIN ehub.index AS i ON i.version_id = v.id
WHERE has_table_privilege(
    to_regclass('ehub_data.v' || v.id), 'SELECT, INSERT, UPDATE, DELETE'
);

-- Find what an address means: 'items', which is the current version of that space, or 'items@v1'.
-- What is unknown, or not for this role, is an error.
CREATE OR REPLACE FUNCTION ehub.require_space(address text) RETURNS ehub.catalogue
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    at int := strpos(address, '@');
    name text := CASE WHEN at > 0 THEN left(address, at - 1) ELSE address END;
    target ehub.catalogue;
BEGIN
    IF at > 0 THEN
        SELECT * INTO target FROM ehub.catalogue AS c
        WHERE c.space = name AND c.version = substr(address, at + 1);
    ELSE
        SELECT * INTO target FROM ehub.catalogue AS c WHERE c.space = name AND c.current;
    END IF;
    IF FOUND THEN
        RETURN target;
    ELSIF at > 0 AND EXISTS (SELECT FROM ehub.catalogue AS c WHERE c.space = name) THEN
        RAISE EXCEPTION 'space % has no version %', quote_literal(name),
            quote_literal(left(substr(address, at + 1), 60)) USING ERRCODE = 'EH011',
            HINT = 'SELECT version FROM ehub.versions lists them';
    END IF;
    RAISE EXCEPTION 'there is no space %', coalesce(quote_literal(name), 'NULL')
        USING ERRCODE = 'EH001',
        HINT = 'SELECT space FROM ehub.catalogue lists them; ehub.create_space makes one';
END $$;

-- The address of a version, which goes on to mean that one when another becomes current.
CREATE OR REPLACE FUNCTION ehub.address(target ehub.catalogue) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT target.space || '@' || target.version
$$;

-- Whether a role sees every row of a version: who does may be told what its index says.
CREATE OR REPLACE FUNCTION ehub.sees_all_rows(role regrole, version_id bigint) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    relation record;
BEGIN
    SELECT c.oid, c.relowner, c.relrowsecurity, c.relforcerowsecurity INTO relation
    FROM pg_class AS c WHERE c.oid = to_regclass('ehub_data.v' || version_id);
    IF role IS NULL OR NOT FOUND OR NOT has_table_privilege(role, relation.oid, 'SELECT') THEN
        RETURN false;
    ELSIF NOT relation.relrowsecurity THEN
        RETURN true;
    END IF;
    RETURN EXISTS (
        SELECT FROM pg_roles AS r WHERE r.oid = role AND (r.rolsuper OR r.rolbypassrls)
    ) OR NOT relation.relforcerowsecurity AND pg_has_role(role, relation.relowner, 'USAGE');
END $$;
