-- What there is, to those who may know it.

-- The mark of a version that is current; NULL of others.
CREATE OR REPLACE FUNCTION ehub.mark_of(version_id bigint) RETURNS regclass
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN to_regclass('ehub_data.current_v' || version_id);
END $$;

-- The versions of all spaces with their indexes, as replicas and clients ask for them: those of
-- which one may read or write the rows. And for the owner of ehub all attached ones, so that one whose
-- table it may not read any more is seen to be broken.
--
-- Which version is current is a row's matter, seen in the statement's snapshot, as long as each statement
-- has its own. A transaction that keeps its snapshot (REPEATABLE READ, SERIALIZABLE) would see one
-- version by that row and another by the view of the space, for views are never looked up in snapshots:
-- it goes by the mark of the current version (ehub.make_current), which is not either.
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
    CASE WHEN current_setting('transaction_isolation') = 'read committed'
        THEN v.id = s.current_version_id
        ELSE a.relation IS NOT NULL OR ehub.mark_of(v.id) IS NOT NULL
    END AS current,
    v.frozen_at IS NOT NULL AS frozen,
    v.warm,
    v.partition_by,
    a.relation
FROM ehub.space AS s
JOIN ehub.version AS v ON v.space_id = s.id
JOIN ehub.index AS i ON i.version_id = v.id AND i.rows IS NULL AND i.name IS NULL
LEFT JOIN ehub.attachment AS a ON a.version_id = v.id
WHERE (SELECT ehub.hear_of_revocations()) AND (
    has_table_privilege(
        coalesce(a.relation, to_regclass('ehub_data.v' || v.id)), 'SELECT, INSERT, UPDATE, DELETE'
    )
    OR a.relation IS NOT NULL AND pg_has_role(ehub.owner(), 'USAGE')
        AND EXISTS (SELECT FROM pg_class AS c WHERE c.oid = a.relation)
);

-- The table of a version: its own, or the one that is attached; NULL where that is gone.
CREATE OR REPLACE FUNCTION ehub.table_of(version_id bigint) RETURNS regclass
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN coalesce(
        to_regclass('ehub_data.v' || $1),
        (
            SELECT a.relation FROM ehub.attachment AS a JOIN pg_class AS c ON c.oid = a.relation
            WHERE a.version_id = $1
        )
    );
END $$;

-- The rows of a version (key, embedding, metadata) as a relation in the text of a statement, where it
-- needs a name.
CREATE OR REPLACE FUNCTION ehub.rows_of(target ehub.catalogue) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    rows text;
BEGIN
    IF target.relation IS NULL THEN
        RETURN format('ehub_data.%I', 'v' || target.version_id);
    END IF;
    rows := (
        SELECT ehub.attached_rows(a.relation, a."column", NULL, a.dims)
        FROM ehub.attached AS a WHERE a.version_id = target.version_id
    );
    IF rows IS NULL THEN
        RAISE EXCEPTION 'space %: %', quote_literal(target.space), coalesce(
            (SELECT a.problem FROM ehub.attached AS a WHERE a.version_id = target.version_id),
            'its table is gone'
        ) USING ERRCODE = 'EH027', HINT = 'ehub.detach, and attach it as it is now';
    END IF;
    RETURN rows;
END $$;

-- Of these rows just those with some keys, as a condition; `keys` is an expression for a text[].
CREATE OR REPLACE FUNCTION ehub.has_keys(target ehub.catalogue, keys text, rows text DEFAULT 't')
RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF target.relation IS NULL THEN
        RETURN format('%s.key = ANY (%s)', rows, keys);
    END IF;
    RETURN (
        -- NULL where it has another key by now.
        SELECT CASE
            WHEN k.kind = 'text' AND EXISTS (
                SELECT FROM pg_attribute AS a JOIN pg_collation AS c ON c.oid = a.attcollation
                WHERE a.attrelid = target.relation AND a.attnum = k.number
                    AND NOT c.collisdeterministic
            ) THEN format('(%1$s.pk = ANY (%2$s) AND %1$s.key = ANY (%2$s))', rows, keys)
            WHEN k.kind = 'text' THEN format('%s.pk = ANY (%s)', rows, keys)
            WHEN k.kind IS NOT NULL
                THEN format('%s.pk = ANY (ehub.%I(%s))', rows, k.kind || '_keys', keys)
        END FROM ehub.attached_key(target.relation) AS k
    );
END $$;

-- Of these rows just those that match a filter, as a condition; NULL without one.
CREATE OR REPLACE FUNCTION ehub.has_filter(target ehub.catalogue, filter jsonb) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF target.relation IS NULL THEN
        RETURN ehub.filter_condition(filter);
    ELSIF filter IS NOT NULL THEN
        RETURN ehub.attached_condition(target.relation, filter);
    END IF;
    RETURN NULL;
END $$;

-- How many rows a table has, as far as the planner knows; negative where it does not.
CREATE OR REPLACE FUNCTION ehub.known_rows(relation regclass) RETURNS float8
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN c.relkind = 'p' THEN (
        SELECT coalesce(sum(p.reltuples) FILTER (WHERE p.reltuples >= 0), -1) FROM pg_class AS p
        WHERE p.oid = ANY (ehub.tree_of(c.oid)) AND p.relkind <> 'p'
    ) ELSE c.reltuples END
    FROM pg_class AS c WHERE c.oid = relation
$$;

-- Find what an address means: 'items', which is the current version of that space, or 'items@v1'.
-- What is unknown, or not for this role, is an error.
--
-- In a transaction that keeps its snapshot the name of a space means one version to its end, as for who
-- reads the view.
CREATE OR REPLACE FUNCTION ehub.require_space(address text) RETURNS ehub.catalogue
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    at int := strpos(address, '@');
    name text := CASE WHEN at > 0 THEN left(address, at - 1) ELSE address END;
    keeps_snapshot boolean := current_setting('transaction_isolation') <> 'read committed';
    target ehub.catalogue;
BEGIN
    IF keeps_snapshot AND at = 0 THEN
        PERFORM ehub.hold_current(name);
    END IF;
    IF at > 0 THEN
        SELECT * INTO target FROM ehub.catalogue AS c
        WHERE c.space = name AND c.version = substr(address, at + 1);
    ELSE
        SELECT * INTO target FROM ehub.catalogue AS c WHERE c.space = name AND c.current;
    END IF;
    IF FOUND THEN
        RETURN target;
    ELSIF keeps_snapshot AND has_table_privilege(
        to_regclass('spaces.' || quote_ident(address)), 'SELECT, INSERT, UPDATE, DELETE'
    ) THEN
        RAISE EXCEPTION 'space %: % came after the snapshot of this transaction', quote_literal(name),
            CASE WHEN at > 0 THEN 'this version' ELSE 'the version that is current' END
            USING ERRCODE = 'serialization_failure', HINT = 'begin the transaction again';
    ELSIF at > 0 AND EXISTS (SELECT FROM ehub.catalogue AS c WHERE c.space = name) THEN
        RAISE EXCEPTION 'space % has no version %', quote_literal(name),
            quote_literal(left(substr(address, at + 1), 60)) USING ERRCODE = 'EH011',
            HINT = 'SELECT version FROM ehub.versions lists them';
    END IF;
    PERFORM ehub.refuse_space(name);
END $$;

-- Keep the version that a name means from changing until the end of this transaction, for who may read
-- or write it: whoever makes another one current waits, as for who reads the view.
CREATE OR REPLACE FUNCTION ehub.hold_current(space text, caller ehub.caller DEFAULT ehub.me())
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    me regrole := ehub.role_of(caller);
BEGIN
    IF EXISTS (
        SELECT FROM ehub.space AS s JOIN ehub.version AS v ON v.space_id = s.id
        WHERE s.name = $1 AND ehub.may_touch(me, v.id)
    ) AND to_regclass('spaces.' || quote_ident($1)) IS NOT NULL THEN
        EXECUTE format('LOCK TABLE spaces.%I IN ACCESS SHARE MODE', $1);
    END IF;
END $$;

-- Find what an address means, for who may manage that space. To others it is what it is to them:
-- unknown, or not theirs.
CREATE OR REPLACE FUNCTION ehub.require_admin(caller ehub.caller, address text)
RETURNS ehub.catalogue
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    me regrole := ehub.role_of(caller);
    name text := split_part(address, '@', 1);
BEGIN
    IF ehub.manages(me, name) THEN
        RETURN ehub.require_space(address);
    ELSIF EXISTS (
        SELECT FROM ehub.catalogue AS c WHERE c.space = name AND ehub.may_touch(me, c.version_id)
    ) THEN
        RAISE EXCEPTION 'space %: role % does not manage it', quote_literal(name), me
            USING ERRCODE = 'insufficient_privilege',
            HINT = 'whoever does says ehub.grant(space, role, ''admin'')';
    END IF;
    PERFORM ehub.refuse_space(name);
END $$;

CREATE OR REPLACE FUNCTION ehub.refuse_space(name text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'there is no space %', coalesce(quote_literal(name), 'NULL')
        USING ERRCODE = 'EH001',
        HINT = 'SELECT space FROM ehub.catalogue lists them; ehub.create_space makes one';
END $$;

-- The address of a version, which goes on to mean that one when another becomes current.
CREATE OR REPLACE FUNCTION ehub.address(target ehub.catalogue) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT target.space || '@' || target.version
$$;
