-- Versions of a space: made beside the current one, promoted, rolled back, frozen, dropped. All of it for
-- its admins.

-- Make a version of a space beside the others. What is not said is as in `from_version`, whose rows
-- are copied, or as in the current version. Returns the version's id.
CREATE OR REPLACE FUNCTION ehub.create_version(
    space text,
    version text,
    dims int DEFAULT NULL,
    metric text DEFAULT NULL,
    from_version text DEFAULT NULL,
    m int DEFAULT NULL,
    ef_construction int DEFAULT NULL,
    target_recall float8 DEFAULT NULL,
    partition_by text DEFAULT NULL,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    allowed ehub.catalogue := ehub.require_admin(caller, $1);
    owner bigint := ehub.lock_space($1);
    current ehub.catalogue := ehub.require_space($1);
    source ehub.catalogue := current;
    made bigint;
BEGIN
    PERFORM ehub.require_own($1, 'it has no versions');
    PERFORM ehub.require_no_average($1);
    PERFORM ehub.require_name('a version', $2, 22);
    IF EXISTS (SELECT FROM ehub.version AS v WHERE v.space_id = owner AND v.name = $2) THEN
        RAISE EXCEPTION 'space % has a version % already', quote_literal($1), quote_literal($2)
            USING ERRCODE = 'EH013';
    ELSIF from_version IS NOT NULL THEN
        source := ehub.require_space($1 || '@' || from_version);
        IF $3 <> source.dims THEN
            RAISE EXCEPTION 'space %: version % has % dims, a copy of it cannot have %',
                quote_literal($1), quote_literal(from_version), source.dims, $3
                USING ERRCODE = 'EH005';
        END IF;
    END IF;
    $3 := coalesce($3, source.dims);
    $4 := coalesce($4, source.metric);
    $6 := coalesce($6, source.m);
    $7 := coalesce($7, source.ef_construction);
    $8 := coalesce($8, source.target_recall);
    $9 := coalesce($9, source.partition_by);
    PERFORM ehub.require_shape($1, $3, $4, $6, $7, $8);
    PERFORM ehub.require_partition_field($1, $9);
    made := ehub.add_version(
        owner, $2, $3, $4, $6, $7, $8,
        CASE WHEN from_version IS NOT NULL THEN source.version_id END, $9
    );
    PERFORM ehub.carry_policies('ehub_data.v' || current.version_id, 'ehub_data.v' || made);
    PERFORM ehub.carry_indexes(source.version_id, made);
    PERFORM ehub.apply_access(owner);
    PERFORM ehub.add_followers($1, made, source.version_id);
    PERFORM ehub.log_action(
        ehub.role_of(caller), 'create_version', $1,
        jsonb_build_object('version', $2, 'dims', $3, 'metric', $4, 'from_version', from_version)
    );
    PERFORM ehub.ring();
    RETURN made;
END $$;

-- The id of a space, whose versions nobody else makes, promotes or drops until the end of this
-- transaction; NULL where there is none.
CREATE OR REPLACE FUNCTION ehub.lock_space(name text) RETURNS bigint
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT s.id FROM ehub.space AS s WHERE s.name = $1 FOR NO KEY UPDATE
$$;

-- Give one data table the row policies that somebody has made on another, besides its own: whoever may
-- not see a row goes on so when a name comes to mean another version. Ehub's own come with grants.
CREATE OR REPLACE FUNCTION ehub.carry_policies(source regclass, target regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    policy record;
BEGIN
    FOR policy IN
        SELECT p.polname, p.polpermissive, p.polcmd,
            pg_get_expr(p.polqual, p.polrelid) AS shown,
            pg_get_expr(p.polwithcheck, p.polrelid) AS checked,
            (SELECT string_agg(ehub.holder(role), ', ') FROM unnest(p.polroles) AS role) AS roles
        FROM pg_policy AS p
        WHERE p.polrelid = source AND p.polname !~ '^ehub_[0-9]+$'
            AND NOT EXISTS (
                SELECT FROM pg_policy AS o WHERE o.polrelid = target AND o.polname = p.polname
            )
    LOOP
        EXECUTE format(
            'CREATE POLICY %I ON %s AS %s FOR %s TO %s %s %s',
            policy.polname, target,
            CASE WHEN policy.polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END,
            CASE policy.polcmd
                WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE'
                WHEN 'd' THEN 'DELETE' ELSE 'ALL'
            END,
            policy.roles, 'USING (' || policy.shown || ')', 'WITH CHECK (' || policy.checked || ')'
        );
    END LOOP;
    IF (SELECT c.relrowsecurity FROM pg_class AS c WHERE c.oid = source) THEN
        EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', target);
    END IF;
    IF (SELECT c.relforcerowsecurity FROM pg_class AS c WHERE c.oid = source) THEN
        EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', target);
    END IF;
END $$;

-- Whether every copy of an index that answers for the current version has its like for another:
-- then nobody's searches become slower when that one is promoted.
CREATE OR REPLACE FUNCTION ehub.is_warm(target ehub.catalogue) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT count(*) FILTER (WHERE c.version_id = target.version_id)
        >= greatest(1, count(*) FILTER (WHERE c.current))
    FROM ehub.catalogue AS c
    JOIN ehub.replica AS r ON r.index_id = c.index_id
    JOIN pg_roles AS o ON o.rolname = r.role
    WHERE c.space = target.space AND r.state = 'ready' AND r.expires_at > clock_timestamp()
        -- What others say of theirs keeps nobody waiting.
        AND ehub.is_owner(o.oid)
$$;

-- Make a version the current one: from one moment on, its space's name means it.
--
-- `wait` waits so long for its indexes to be warm, and then fails; without, `warm` says whether
-- they were. `min_overlap` refuses where fewer of the `k` nearest of `sample` keys would stay the
-- same. Waits for transactions that use the view of the space, in turns that keep others from it for
-- 0.1 s at most; `patience` is for how long in all.
CREATE OR REPLACE FUNCTION ehub.promote(
    space text,
    version text,
    min_overlap float8 DEFAULT NULL,
    wait interval DEFAULT NULL,
    k int DEFAULT 10,
    sample int DEFAULT 100,
    patience interval DEFAULT '1 minute',
    caller ehub.caller DEFAULT ehub.me(),
    OUT from_version text,
    OUT to_version text,
    OUT warm boolean
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    deadline timestamptz := clock_timestamp() + wait;
    target ehub.catalogue := ehub.require_admin(caller, $1 || '@' || $2);
    current ehub.catalogue := ehub.require_space($1);
    measured float8;
BEGIN
    PERFORM ehub.require_no_average($1);
    PERFORM ehub.require_another(current, target);
    WHILE NOT ehub.is_warm(target) AND clock_timestamp() < deadline LOOP
        PERFORM pg_sleep(0.05);
    END LOOP;
    IF wait IS NOT NULL AND NOT ehub.is_warm(target) THEN
        RAISE EXCEPTION 'space %: after % the index of version % was not ready everywhere',
            quote_literal($1), wait, quote_literal($2) USING ERRCODE = 'EH018',
            HINT = 'nothing was changed; ehub.status shows how far it is';
    END IF;
    IF min_overlap IS NOT NULL THEN
        SELECT avg(o.overlap) INTO measured
        FROM ehub.overlap(ehub.address(current), ehub.address(target), $5, sample => $6) AS o;
        IF measured IS NULL OR measured < min_overlap THEN
            RAISE EXCEPTION 'space %: under version % a share of % of the % nearest would stay the'
                ' same, at least % is wanted', quote_literal($1), quote_literal($2),
                coalesce(round(measured::numeric, 3), 0), $5, min_overlap USING ERRCODE = 'EH017',
                HINT = 'nothing was changed; `ehub diff` shows what moved';
        END IF;
    END IF;
    PERFORM ehub.lock_space($1);
    -- Somebody else may have been faster.
    current := ehub.require_space($1);
    PERFORM ehub.require_another(current, target);
    from_version := current.version;
    to_version := target.version;
    warm := ehub.switch(ehub.role_of(caller), 'promote', current, target, patience);
END $$;

CREATE OR REPLACE FUNCTION ehub.require_another(current ehub.catalogue, target ehub.catalogue)
RETURNS void
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF current.version_id = target.version_id THEN
        RAISE EXCEPTION 'space %: version % is current already', quote_literal(target.space),
            quote_literal(target.version) USING ERRCODE = 'EH005';
    END IF;
END $$;

-- Make that version current again which was so before the last promotion. Each further call goes
-- one promotion further back; versions that have been dropped are passed over.
CREATE OR REPLACE FUNCTION ehub.rollback(
    space text,
    patience interval DEFAULT '1 minute',
    caller ehub.caller DEFAULT ehub.me(),
    OUT from_version text,
    OUT to_version text,
    OUT warm boolean
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    allowed ehub.catalogue := ehub.require_admin(caller, $1);
    owner bigint := ehub.lock_space($1);
    current ehub.catalogue := ehub.require_space($1);
    target ehub.catalogue;
    last bigint;
BEGIN
    PERFORM ehub.require_own($1, 'it has no versions');
    PERFORM ehub.require_no_average($1);
    last := ehub.last_promotion(owner);
    SELECT c.* INTO target FROM ehub.catalogue AS c JOIN ehub.promotion AS p
        ON p.from_version_id = c.version_id
    WHERE p.id = last;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'space % has no earlier version to go back to', quote_literal($1)
            USING ERRCODE = 'EH011';
    END IF;
    UPDATE ehub.promotion AS p SET undone = true WHERE p.space_id = owner AND p.id >= last;
    from_version := current.version;
    to_version := target.version;
    warm := ehub.switch(ehub.role_of(caller), 'rollback', current, target, patience);
END $$;

-- The promotion that a rollback would undo.
CREATE OR REPLACE FUNCTION ehub.last_promotion(space_id bigint) RETURNS bigint
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT max(p.id) FROM ehub.promotion AS p JOIN ehub.space AS s ON s.id = p.space_id
    WHERE s.id = $1 AND p.kind = 'promote' AND NOT p.undone
        AND p.from_version_id <> s.current_version_id
$$;

-- Let the name of a space mean another version, in a transaction that has locked the space. Indexes
-- are kept of the new one and of the old one, for the way back; returns whether they are warm.
CREATE OR REPLACE FUNCTION ehub.switch(
    role regrole, kind text, current ehub.catalogue, target ehub.catalogue, patience interval
) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    owner bigint := (SELECT s.id FROM ehub.space AS s WHERE s.name = target.space);
    warm boolean := ehub.is_warm(target);
    -- What the last switch has left need not be kept warm any longer, unless it is one of the two.
    left_before bigint := (
        SELECT nullif(nullif(p.from_version_id, current.version_id), target.version_id)
        FROM ehub.promotion AS p WHERE p.space_id = owner ORDER BY p.id DESC LIMIT 1
    );
BEGIN
    PERFORM ehub.carry_policies(
        'ehub_data.v' || current.version_id, 'ehub_data.v' || target.version_id
    );
    PERFORM ehub.in_turns(
        format('spaces.%I', target.space),
        format(
            'SELECT ehub.make_current(%1$L, %2$s), ehub.show_followers(%1$L, %2$s)',
            target.space, target.version_id
        ),
        patience
    );
    UPDATE ehub.space AS s SET current_version_id = target.version_id WHERE s.id = owner;
    UPDATE ehub.version AS v SET warm = v.id IS DISTINCT FROM left_before
    WHERE v.id IN (left_before, current.version_id, target.version_id);
    INSERT INTO ehub.promotion (space_id, by, kind, from_version, to_version, from_version_id)
    VALUES (owner, role::text, $2, current.version, target.version, current.version_id);
    PERFORM ehub.log_action(
        role, $2, target.space, jsonb_build_object('from', current.version, 'to', target.version)
    );
    PERFORM ehub.switch_followers(
        role, $2, target.space, current.version_id, target.version_id
    );
    IF NOT warm THEN
        RAISE NOTICE 'the index of %@% is not ready everywhere; searches are exact meanwhile',
            target.space, target.version;
    END IF;
    PERFORM ehub.ring();
    RETURN warm;
END $$;

-- Say whether replicas of its space keep an index of a version that is not current: as they do of
-- a new one, and of the one before. Of the current version they always do.
CREATE OR REPLACE FUNCTION ehub.keep_warm(
    address text,
    warm boolean DEFAULT true,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_admin(caller, $1);
BEGIN
    UPDATE ehub.version AS v SET warm = $2 WHERE v.id = target.version_id;
    PERFORM ehub.log_action(
        ehub.role_of(caller), 'keep_warm', target.space,
        jsonb_build_object('version', target.version, 'warm', $2)
    );
    PERFORM ehub.ring();
END $$;

-- Refuse all writes to a version from now on, by whomever and by whatever way. For good.
CREATE OR REPLACE FUNCTION ehub.freeze(
    address text,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_admin(caller, address);
BEGIN
    PERFORM ehub.require_no_average(address);
    PERFORM ehub.require_own(target.space, 'it cannot be frozen');
    PERFORM ehub.stop_writers(target);
    PERFORM ehub.add_refusal(target.version_id, 'ehub_frozen');
    UPDATE ehub.version AS v SET frozen_at = clock_timestamp()
    WHERE v.id = target.version_id AND v.frozen_at IS NULL;
    PERFORM ehub.log_action(
        ehub.role_of(caller), 'freeze', target.space, jsonb_build_object('version', target.version)
    );
END $$;

CREATE OR REPLACE FUNCTION ehub.refuse_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'space %: version % is frozen', quote_literal(TG_ARGV[0]),
        quote_literal(TG_ARGV[1]) USING ERRCODE = 'EH015',
        HINT = 'ehub.create_version(..., from_version => ...) makes a copy that can be written';
END $$;

-- Wait for the transactions that write to a version, and keep others from it until the end of this
-- one. What is read afterwards must be what they have left, so an older snapshot will not do.
CREATE OR REPLACE FUNCTION ehub.stop_writers(target ehub.catalogue) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM ehub.require_read_committed(target.space);
    EXECUTE format(
        'LOCK TABLE ehub_data.%I IN SHARE ROW EXCLUSIVE MODE', 'v' || target.version_id
    );
END $$;

CREATE OR REPLACE FUNCTION ehub.require_read_committed(space text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'space %: this needs isolation level READ COMMITTED', quote_literal(space)
            USING ERRCODE = 'EH005';
    END IF;
END $$;

-- Drop a version with its rows. Refused while it is current; and, without `force`, while a rollback
-- would go back to it or it has checkpoints.
CREATE OR REPLACE FUNCTION ehub.drop_version(
    space text,
    version text,
    force boolean DEFAULT false,
    caller ehub.caller DEFAULT ehub.me()
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    allowed ehub.catalogue := ehub.require_admin(caller, $1);
    owner bigint := ehub.lock_space($1);
    target ehub.catalogue := ehub.require_space($1 || '@' || $2);
    needed text;
BEGIN
    PERFORM ehub.require_no_average($1);
    IF target.current THEN
        RAISE EXCEPTION 'space %: version % is current', quote_literal($1), quote_literal($2)
            USING ERRCODE = 'EH016', HINT = 'promote another one first';
    END IF;
    SELECT concat_ws(
        '; ',
        (
            SELECT 'a rollback would go back to it' FROM ehub.promotion AS p
            WHERE p.id = ehub.last_promotion(owner) AND p.from_version_id = target.version_id
        ),
        (
            SELECT 'it has checkpoints: ' || string_agg(c.name, ', ' ORDER BY c.id)
            FROM ehub.checkpoint AS c WHERE c.version_id = target.version_id HAVING count(*) > 0
        )
    ) INTO needed;
    IF needed <> '' AND NOT force THEN
        RAISE EXCEPTION 'space %: version % is still needed: %', quote_literal($1),
            quote_literal($2), needed USING ERRCODE = 'EH016', HINT = 'force drops it all the same';
    END IF;
    PERFORM ehub.drop_followers($1, target.version_id);
    PERFORM ehub.remove_version($1, $2, target.version_id);
    PERFORM ehub.log_action(
        ehub.role_of(caller), 'drop_version', $1, jsonb_build_object('version', $2)
    );
    PERFORM ehub.ring();
END $$;

-- The versions of the spaces, with their numbers of rows.
CREATE OR REPLACE VIEW ehub.versions AS
SELECT
    c.space,
    c.version,
    c.dims,
    c.metric,
    ehub.count_rows(c.version_id) AS rows,
    c.current,
    c.frozen,
    c.warm
FROM ehub.catalogue AS c
ORDER BY c.space, c.version_id;

-- What has been current: each promotion and rollback, the last one first. For those who read the space
-- by its name, whatever version that means.
CREATE OR REPLACE VIEW ehub.promotions WITH (security_barrier) AS
SELECT s.name AS space, p.at, p.by, p.kind, p.from_version, p.to_version
FROM ehub.promotion AS p JOIN ehub.space AS s ON s.id = p.space_id
WHERE (SELECT ehub.hear_of_revocations())
    AND has_table_privilege(to_regclass('spaces.' || quote_ident(s.name)), 'SELECT')
ORDER BY p.id DESC;

-- Current versions that are older than their mark.
SELECT ehub.make_current(s.name, s.current_version_id) FROM ehub.space AS s
WHERE ehub.mark_of(s.current_version_id) IS NULL
    AND to_regclass('ehub_data.v' || s.current_version_id) IS NOT NULL;

-- Versions that are older than their views.
SELECT ehub.show_version(s.name || '@' || v.name, v.id)
FROM ehub.version AS v JOIN ehub.space AS s ON s.id = v.space_id
WHERE to_regclass('spaces.' || quote_ident(s.name || '@' || v.name)) IS NULL
    AND to_regclass('ehub_data.v' || v.id) IS NOT NULL;
