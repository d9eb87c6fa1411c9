-- The index service: where it is, which incarnation of the database it follows, what it proposes.

-- This life of the database: a crash, a promotion, a restart or a copy is another one. After the
-- first two, transaction ids are used again and a watermark of before says nothing; an UNLOGGED
-- table is emptied by both. NULL while no service has come.
CREATE OR REPLACE FUNCTION ehub.incarnation() RETURNS ehub.incarnation
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    this ehub.incarnation;
BEGIN
    SELECT * INTO this FROM ehub.incarnation AS i
    WHERE i.started_at = pg_postmaster_start_time()
        AND i.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database());
    RETURN this;
END $$;

-- Begin to serve this life of the database, and return its name. Whoever asks has forgotten what it
-- knew through earlier connections.
CREATE OR REPLACE FUNCTION ehub.enter_incarnation() RETURNS uuid
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    LOCK TABLE ehub.incarnation IN SHARE ROW EXCLUSIVE MODE;
    IF (ehub.incarnation()).token IS NULL THEN
        DELETE FROM ehub.incarnation;
        INSERT INTO ehub.incarnation (token, started_at, database, prompt)
        SELECT gen_random_uuid(), pg_postmaster_start_time(), d.oid, false
        FROM pg_database AS d WHERE d.datname = current_database();
    END IF;
    RETURN (ehub.incarnation()).token;
END $$;

-- Say whether the service ends whatever it is asked, because it is killed when it hangs: then its
-- answers can be waited for without a deadline. What lies between could hang as well, so this is true
-- only of a service on this machine, at the very address that it listens on, or where whoever
-- installed it says that nothing but a network does. Before PostgreSQL 17 such a wait could not be
-- cancelled.
CREATE OR REPLACE FUNCTION ehub.promise_answers(watched boolean, host text, port int) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    promised boolean := watched
        AND current_setting('server_version_num')::int >= 170000
        AND (
            EXISTS (SELECT FROM ehub.setting AS s WHERE s.name = 'service_is_direct')
            OR coalesce(inet_client_addr() = inet_server_addr(), true) AND EXISTS (
                SELECT FROM pg_foreign_server AS s WHERE s.srvname = 'ehub_service'
                    AND s.srvoptions @> ARRAY['host=' || host, 'port=' || port]
            )
        );
BEGIN
    UPDATE ehub.incarnation AS i SET prompt = promised WHERE i.prompt <> promised;
END $$;

-- Tell the database where its index service is; the secret between the two is made here, and kept
-- when only the address changes. For the owner of schema ehub; needs extension ehub_link or dblink, or
-- the right to create one of them. `direct` says that no proxy or tunnel lies between
-- (ehub.promise_answers).
--
-- dblink has a schema of its own, on which nobody else has USAGE: the connection to the service
-- belongs to a session, and any role in it could use it otherwise.
CREATE OR REPLACE FUNCTION ehub.install_service(
    host text,
    port int,
    sslmode text DEFAULT 'disable',
    sslrootcert text DEFAULT NULL,
    direct boolean DEFAULT false
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    owner name := (
        SELECT pg_get_userbyid(n.nspowner) FROM pg_namespace AS n WHERE n.nspname = 'ehub'
    );
    place text := (
        SELECT n.nspname FROM pg_extension AS e JOIN pg_namespace AS n ON n.oid = e.extnamespace
        WHERE e.extname = 'dblink'
    );
    secret text := ehub.service_secret();
    options text;
BEGIN
    IF NOT pg_has_role(owner, 'USAGE') THEN
        RAISE EXCEPTION 'only %, the owner of schema ehub, can install a service', owner
            USING ERRCODE = 'insufficient_privilege';
    ELSIF port IS NULL OR port NOT BETWEEN 1 AND 65535 OR coalesce(host, '') = '' THEN
        RAISE EXCEPTION 'a service has a host and a port from 1 to 65535, not % and %',
            coalesce(quote_literal(host), 'NULL'), coalesce(port::text, 'NULL')
            USING ERRCODE = 'EH005';
    END IF;
    IF to_regproc('ehub.link_ask') IS NULL
        AND EXISTS (SELECT FROM pg_available_extensions AS e WHERE e.name = 'ehub_link')
    THEN
        IF (SELECT r.rolsuper FROM pg_roles AS r WHERE r.rolname = current_user) THEN
            CREATE EXTENSION ehub_link;
        ELSE
            RAISE NOTICE 'searches are faster with extension ehub_link; a superuser may create it';
        END IF;
    END IF;
    IF place IS NULL
        AND EXISTS (SELECT FROM pg_available_extensions AS e WHERE e.name = 'dblink')
    THEN
        CREATE SCHEMA IF NOT EXISTS ehub_dblink;
        CREATE EXTENSION dblink SCHEMA ehub_dblink;
        place := 'ehub_dblink';
    END IF;
    IF place IS NULL THEN
        IF to_regproc('ehub.link_ask') IS NULL THEN
            RAISE EXCEPTION 'this server has neither extension ehub_link nor dblink:'
                ' searches in SQL stay exact' USING ERRCODE = 'EH010',
                HINT = 'dblink is part of postgresql-contrib; `ehub build-link` makes ehub_link';
        END IF;
    ELSIF place <> 'ehub_dblink' THEN
        RAISE EXCEPTION 'dblink is in schema %, where others could use the service''s connection',
            quote_ident(place) USING ERRCODE = 'EH010',
            HINT = 'CREATE SCHEMA ehub_dblink; ALTER EXTENSION dblink SET SCHEMA ehub_dblink';
    ELSIF has_schema_privilege('public', 'ehub_dblink', 'USAGE') THEN
        RAISE EXCEPTION 'everybody could use the service''s connection'
            USING ERRCODE = 'EH010', HINT = 'REVOKE ALL ON SCHEMA ehub_dblink FROM PUBLIC';
    ELSIF NOT EXISTS (
        SELECT FROM pg_namespace AS n JOIN pg_roles AS r ON r.oid = n.nspowner
        WHERE n.nspname = 'ehub_dblink' AND (r.rolsuper OR r.rolname = owner)
    ) THEN
        -- Whoever owns it can put functions of their own there.
        RAISE EXCEPTION 'schema ehub_dblink belongs to somebody else' USING ERRCODE = 'EH010',
            HINT = format('ALTER SCHEMA ehub_dblink OWNER TO %I', owner);
    END IF;

    options := format(
        'host %L, port %L, dbname %L, sslmode %L, connect_timeout %L, keepalives_idle %L,'
        ' keepalives_interval %L, keepalives_count %L, tcp_user_timeout %L',
        host, port, 'ehub', sslmode, 3, 5, 2, 2, 5000
    );
    IF sslrootcert IS NOT NULL THEN
        options := options || format(', sslrootcert %L', sslrootcert);
    END IF;
    IF place IS NOT NULL AND current_setting('server_version_num')::int >= 160000 THEN
        -- Who does not know the secret does not learn it by asking for it.
        options := options || format(', require_auth %L', 'scram-sha-256');
    END IF;
    DROP SERVER IF EXISTS ehub_service CASCADE;
    EXECUTE format(
        'CREATE SERVER ehub_service FOREIGN DATA WRAPPER %I OPTIONS (%s)',
        CASE WHEN place IS NULL THEN 'ehub_link' ELSE 'dblink_fdw' END, options
    );
    PERFORM ehub.set_service_secret(secret);
    DELETE FROM ehub.setting WHERE name = 'service_is_direct';
    IF direct THEN
        INSERT INTO ehub.setting VALUES ('service_is_direct', 'yes');
    END IF;
END $$;

-- Give the owner of ehub, and nobody else, the secret between database and service: a new one where none is
-- given. The service learns of it within some seconds, and refuses new connections until then.
CREATE OR REPLACE FUNCTION ehub.set_service_secret(secret text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    holder text;
    one regprocedure;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_foreign_server AS s WHERE s.srvname = 'ehub_service') THEN
        RAISE EXCEPTION 'no index service is installed' USING ERRCODE = 'EH010',
            HINT = '`ehub install-service` does that';
    END IF;
    FOR holder IN
        SELECT ehub.holder(m.umuser) FROM pg_user_mappings AS m WHERE m.srvname = 'ehub_service'
    LOOP
        EXECUTE format('DROP USER MAPPING FOR %s SERVER ehub_service', holder);
    END LOOP;
    EXECUTE format(
        'CREATE USER MAPPING FOR %s SERVER ehub_service OPTIONS (user %L, password %L)',
        ehub.owner(), 'ehub',
        coalesce(secret, replace(gen_random_uuid()::text || gen_random_uuid(), '-', ''))
    );
    IF to_regnamespace('ehub_dblink') IS NOT NULL THEN
        EXECUTE format('GRANT USAGE ON SCHEMA ehub_dblink TO %s', ehub.owner());
    END IF;
    EXECUTE format('GRANT USAGE ON FOREIGN SERVER ehub_service TO %s', ehub.owner());
    FOR one IN
        SELECT p.oid FROM pg_proc AS p
        WHERE p.pronamespace = 'ehub'::regnamespace AND p.proname IN ('link_ask', 'link_recall', 'link_remember')
            AND NOT has_function_privilege(ehub.owner(), p.oid, 'EXECUTE')
            AND pg_has_role(p.proowner, 'USAGE')
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', one, ehub.owner());
    END LOOP;
END $$;

-- Why searches do not go by extension ehub_link, which is the shorter way to the service; NULL if they do.
CREATE OR REPLACE FUNCTION ehub.link_problem() RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN CASE
        WHEN to_regproc('ehub.link_ask') IS NULL THEN 'extension ehub_link is not installed'
        WHEN NOT has_function_privilege(ehub.owner(), to_regproc('ehub.link_ask'), 'EXECUTE')
            THEN format('role %s, which owns ehub, may not use extension ehub_link', ehub.owner())
        WHEN current_setting('ehub.link', true) = 'off' THEN 'ehub.link is off'
        WHEN getdatabaseencoding() <> 'UTF8'
            THEN 'extension ehub_link is for databases in UTF8, this one is in ' || getdatabaseencoding()
        WHEN NOT EXISTS (
            SELECT FROM pg_foreign_server AS s
            WHERE s.srvname = 'ehub_service' AND s.srvoptions @> '{sslmode=disable}'
        ) THEN 'extension ehub_link does not encrypt'
    END;
END $$;

-- Why the owner of ehub cannot ask the service that is installed, as after REASSIGN OWNED; NULL if it can.
CREATE OR REPLACE FUNCTION ehub.service_problem() RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN CASE
        WHEN NOT EXISTS (SELECT FROM pg_foreign_server AS s WHERE s.srvname = 'ehub_service') THEN NULL
        WHEN NOT EXISTS (
            SELECT FROM pg_user_mappings AS m
            WHERE m.srvname = 'ehub_service' AND m.umuser = ehub.owner()
        ) THEN format('role %s, which owns ehub, has not the secret of the index service', ehub.owner())
        WHEN NOT has_schema_privilege(ehub.owner(), to_regnamespace('ehub_dblink'), 'USAGE')
        THEN format('role %s, which owns ehub, may not use schema ehub_dblink', ehub.owner())
        WHEN NOT has_server_privilege(ehub.owner(), 'ehub_service', 'USAGE')
            THEN format('role %s, which owns ehub, may not use server ehub_service', ehub.owner())
    END;
END $$;

-- Forget the service and what install_service made: searches in SQL are exact from then on. What a
-- superuser has made for it stays, unless that is who asks.
CREATE OR REPLACE FUNCTION ehub.uninstall_service() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    DROP SERVER IF EXISTS ehub_service CASCADE;
    IF EXISTS (
        SELECT FROM pg_namespace AS n
        WHERE n.nspname = 'ehub_dblink' AND pg_has_role(n.nspowner, 'USAGE')
    ) THEN
        DROP SCHEMA ehub_dblink CASCADE;
    END IF;
    DELETE FROM ehub.setting WHERE name = 'service_is_direct';
    DELETE FROM ehub.incarnation;
END $$;

-- The secret between database and service, for the owner (and superusers) alone; NULL where no
-- service is installed.
CREATE OR REPLACE FUNCTION ehub.service_secret() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT o.option_value
    FROM pg_user_mappings AS m, pg_options_to_table(m.umoptions) AS o
    WHERE m.srvname = 'ehub_service' AND o.option_name = 'password'
$$;

-- Why no service can be asked, NULL if one can. A service shows that it lives by a connection that
-- does something twice a second; to find out by connecting takes unbounded time, if it is hung.
CREATE OR REPLACE FUNCTION ehub.service_missing() RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    problem text;
    alive boolean;
BEGIN
    IF pg_is_in_recovery() THEN
        RETURN 'this is a standby';
    ELSIF NOT EXISTS (SELECT FROM pg_foreign_server AS s WHERE s.srvname = 'ehub_service') THEN
        IF NOT EXISTS (
            SELECT FROM pg_available_extensions AS e WHERE e.name IN ('dblink', 'ehub_link')
        ) THEN
            RETURN 'this server has neither extension ehub_link nor dblink';
        END IF;
        RETURN 'no index service is installed';
    END IF;
    problem := ehub.service_problem();
    IF problem IS NOT NULL THEN
        RETURN 'the index service cannot be asked: ' || problem || '; `ehub doctor --mend` puts that right';
    ELSIF (ehub.incarnation()).token IS NULL THEN
        RETURN 'the index service has not come since the database was started';
    END IF;
    SELECT bool_or(coalesce(a.state_change > clock_timestamp() - interval '2 s', true)) INTO alive
    FROM pg_stat_activity AS a
    WHERE a.application_name = 'ehub pulse' AND a.datname = current_database()
        -- Others may call themselves the same.
        AND ehub.is_owner(a.usesysid::regrole);
    RETURN CASE
        WHEN alive IS NULL THEN 'the index service is not connected'
        WHEN NOT alive THEN 'the index service does not move'
    END;
END $$;

-- Ask the service for the `k` nearest of each of some queries, in the space of an address; by the index that
-- has just the rows that the caller sees. With a filter, a partition or the name of a sub-index it is
-- about rows that match; `matching` says whether all candidates do, and there are no others, or whether
-- they are just near.
--
-- Returns the candidates, one query's after the other's, how many each has, and the watermark as of
-- which they are right; or the reason why there are none. `version_id` is the version that they are of;
-- without it the space is not known, or not for this role. Takes bounded time, and a service that failed
-- is left alone for a while, longer each time.
--
-- Every search waits for this, so what most of them need to know is one statement.
CREATE OR REPLACE FUNCTION ehub.candidates(
    space text,
    queries @vector@.vector[],
    k int,
    filter jsonb DEFAULT NULL,
    partition text DEFAULT NULL,
    index text DEFAULT NULL,
    caller ehub.caller DEFAULT ehub.me(),
    OUT version_id bigint,
    OUT reason text,
    OUT watermark pg_snapshot,
    OUT counts int[],
    OUT keys text[],
    OUT plan text,
    OUT matching boolean
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    me regrole := ehub.role_of(caller);
    -- Until when the service is left alone, in seconds since 1970, and how often it has failed.
    breaker float8[] := substring(
        current_setting('ehub.breaker', true), '^[{][0-9]{1,12}[.][0-9]{3},[0-9]{1,2}[}]$'
    );
    ef int := CASE WHEN current_setting('ehub.ef_search', true) <> ''
        THEN ehub.whole_setting('ehub.ef_search', 0) ELSE 0 END;
    patience int := 20 * cardinality(queries) + CASE
        WHEN current_setting('ehub.service_timeout', true) <> ''
        THEN ehub.whole_setting('ehub.service_timeout', 1000) ELSE 1000 END;
    -- Extension ehub_link: `SET ehub.link = off` rules it out.
    linked boolean := has_function_privilege(to_regproc('ehub.link_ask'), 'EXECUTE') IS TRUE
        AND current_setting('ehub.link', true) IS DISTINCT FROM 'off';
    recalled boolean := false;
    here record;
    answer record;
BEGIN
    IF pg_is_in_recovery() THEN
        reason := 'this is a standby';
        RETURN;
    END IF;
    FOR attempt IN 1 .. 2 LOOP
        -- Most searches are like the one before.
        IF attempt = 1 AND linked AND filter IS NULL AND partition IS NULL AND k <= 10000
            AND breaker IS NULL AND pg_current_xact_id_if_assigned() IS NULL
        THEN
            here := ehub.link_recall(space, me);
            recalled := here.version_id IS NOT NULL;
        END IF;
        IF NOT recalled THEN
            here := ehub.index_for_search(me, space, k, filter, partition, index, breaker[1]);
        END IF;
        version_id := here.version_id;
        IF version_id IS NULL THEN
            RETURN;
        ELSIF NOT recalled THEN
            reason := here.reason;
            IF reason IS NOT NULL THEN
                RETURN;
            END IF;
            filter := here.filter;
            partition := here.partition;
            IF linked AND here.relations IS NOT NULL THEN
                PERFORM ehub.link_remember(
                    space, me, version_id, here.index_id, here.state, here.attached, here.relations
                );
            END IF;
        END IF;
        IF linked THEN
            answer := ehub.link_ask(
                here.state, here.index_id, k, ef, filter::text, partition, queries, patience
            );
            linked := NOT answer IS NULL;
        END IF;
        IF NOT linked THEN
            answer := ehub.ask_by_dblink(
                here.state, here.index_id, k, ef, filter::text, partition, queries, patience
            );
        END IF;
        -- What was remembered may not be so any more.
        EXIT WHEN answer.reason IS NULL OR NOT recalled;
        recalled := false;
    END LOOP;

    reason := answer.failure;
    IF reason IS NOT NULL THEN
        breaker := ARRAY[
            date_part('epoch', clock_timestamp()) + least(0.5 * 2 ^ coalesce(breaker[2], 0), 15),
            least(coalesce(breaker[2], 0) + 1, 10)
        ];
        PERFORM set_config(
            'ehub.breaker', format('{%s,%s}', round(breaker[1]::numeric, 3), breaker[2]), false
        );
        IF breaker[2] = 1 THEN
            RAISE LOG 'ehub: searches are exact, the index service cannot be asked: %', reason;
        END IF;
        RETURN;
    ELSIF breaker IS NOT NULL THEN
        RAISE LOG 'ehub: the index service answers again';
        PERFORM set_config('ehub.breaker', '', false);
    END IF;
    IF here.attached THEN
        -- For ehub.deciding_keys.
        PERFORM set_config('ehub.proposed_under', version_id || ' ' || here.state, true);
    END IF;
    reason := answer.reason;
    watermark := answer.watermark;
    counts := answer.counts;
    keys := answer.keys;
    plan := answer.plan;
    matching := answer.matching;
END $$;

-- Which index has the rows that a search by a role is about, and what it must be as of: the life of the
-- database, and what changes with its table where that may have changed without being logged. Or the
-- reason why no index can be asked; without a `version_id` the role has no such space.
--
-- `relations` are those on which it depends and nothing else does, if the next search without a filter may
-- take it for granted until one of them changes.
CREATE OR REPLACE FUNCTION ehub.index_for_search(
    role regrole,
    space text,
    k int,
    INOUT filter jsonb,
    INOUT partition text,
    index text,
    left_alone_until float8,
    OUT version_id bigint,
    OUT reason text,
    OUT index_id bigint,
    OUT state text,
    OUT attached boolean,
    OUT relations oid[]
)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    at int := strpos(space, '@');
    name text := CASE WHEN at > 0 THEN left(space, at - 1) ELSE space END;
    here record;
    table_ ehub.attachment;
BEGIN
    SELECT
        c.version_id, c.index_id, c.relation, t.relation AS own, t.token, i.token AS life,
        shown.oid AS shown,
        -- What ehub.sees_all_rows looks at first, and mostly last.
        (
            NOT t.has_policies AND has_table_privilege(role, t.relation, 'SELECT')
            AND has_table_privilege(role, shown.oid, 'REFERENCES')
        ) IS TRUE AS sees_all
    INTO here
    FROM ehub.catalogue AS c
    LEFT JOIN ehub.own_tables AS t ON t.version_id = c.version_id
    LEFT JOIN pg_class AS shown ON shown.relname = (c.space || '@' || c.version)::name
        AND shown.relnamespace = 'spaces'::regnamespace
    LEFT JOIN ehub.incarnation AS i ON i.started_at = pg_postmaster_start_time()
        AND i.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
    WHERE c.space = name
        AND CASE WHEN at > 0 THEN c.version = substr(space, at + 1) ELSE c.current END;
    IF NOT FOUND OR NOT here.sees_all AND NOT ehub.may_touch(role, here.version_id) THEN
        RETURN;
    END IF;
    version_id := here.version_id;
    index_id := here.index_id;
    attached := here.relation IS NOT NULL;
    reason := CASE
        WHEN left_alone_until > date_part('epoch', clock_timestamp())
            THEN 'the service failed a moment ago'
        WHEN here.life IS NULL THEN ehub.service_missing()
        -- The index would be taken to know them.
        WHEN pg_current_xact_id_if_assigned() IS NOT NULL AND ehub.has_unlogged_changes(version_id)
            THEN 'the statement that is under way changes the rows'
        -- A search that keeps so many takes long, and memory that is everybody's.
        WHEN k > 10000 THEN 'more than 10000 are asked for'
    END;
    IF reason IS NOT NULL THEN
        RETURN;
    END IF;

    IF filter IS NOT NULL OR partition IS NOT NULL THEN
        -- Whoever calls this may send anything, and the service reads what matches for all of them.
        PERFORM ehub.filter_path(filter);
        SELECT c.index_id, c.filter, c.partition INTO index_id, filter, partition
        FROM ehub.choose_index(role, version_id, index, filter, partition) AS c;
    ELSIF attached AND ehub.sees_all_rows(role, version_id) THEN
        relations := ehub.tree_of(here.relation);
    ELSIF NOT here.sees_all THEN
        index_id := ehub.index_of(role, version_id);
    ELSE
        relations := ARRAY[here.own, here.shown, to_regclass('spaces.' || quote_ident(name))];
    END IF;
    IF index_id IS NULL THEN
        reason := 'no index has just the rows that may be read';
    ELSIF NOT attached THEN
        state := here.life || '/' || here.token;
    ELSE
        SELECT * INTO table_ FROM ehub.attachment AS a WHERE a.version_id = here.version_id;
        IF table_.shape <> ehub.attached_shape(table_.relation) THEN
            reason := 'its table was altered a moment ago';
            RETURN;
        END IF;
        state := here.life || '/' || ehub.attached_token(
            version_id, table_.relation, table_.column_name, table_.column_number
        );
        IF filter IS NOT NULL OR index_id <> here.index_id THEN
            -- Its columns may have changed their names, and that is logged nowhere.
            state := state || '/' || table_.shape;
        END IF;
    END IF;
END $$;

-- Ask by dblink, for servers without extension ehub_link: what the service answers, or as `failure` why it
-- does not.
--
-- dblink waits without a deadline. Where the service does not promise to keep one, the answer is
-- polled for: for a moment without rest, then once a millisecond, for there is no shorter sleep.
CREATE OR REPLACE FUNCTION ehub.ask_by_dblink(
    state text,
    index_id bigint,
    k int,
    ef int,
    filter text,
    partition text,
    queries @vector@.vector[],
    patience int,
    OUT failure text,
    OUT reason text,
    OUT watermark pg_snapshot,
    OUT counts int[],
    OUT keys text[],
    OUT plan text,
    OUT matching boolean
)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
DECLARE
    n int := cardinality(queries);
    prompt boolean := (ehub.incarnation()).prompt;
    sent timestamptz := clock_timestamp();
    nonce text := date_part('epoch', sent);
    statement text := format(
        'CANDIDATES %s %s %s %s %s %s %s %s %s', nonce, state, index_id, n, k, ef,
        coalesce('x' || encode(convert_to(filter, 'UTF8'), 'hex'), '-'),
        coalesce('x' || encode(convert_to(partition, 'UTF8'), 'hex'), '-'),
        CASE WHEN n = 1 THEN encode(@vector@.vector_send(queries[1]), 'hex') ELSE (
            SELECT string_agg(encode(@vector@.vector_send(q.query), 'hex'), '' ORDER BY q.place)
            FROM unnest(queries) WITH ORDINALITY AS q (query, place)
        ) END
    );
    waited float8;
    answer record;
    detail text;
BEGIN
    IF to_regnamespace('ehub_dblink') IS NULL THEN
        failure := concat_ws(': ', 'this server has no extension dblink', ehub.link_problem());
        RETURN;
    END IF;
    FOR attempt IN 1 .. 2 LOOP
        BEGIN
            failure := NULL;
            IF attempt = 2 THEN
                failure := ehub.service_missing();
                EXIT WHEN failure IS NOT NULL;
                PERFORM ehub_dblink.dblink_connect('ehub', 'ehub_service');
            END IF;
            sent := clock_timestamp();
            IF ehub_dblink.dblink_send_query('ehub', statement) <> 1 THEN
                RAISE EXCEPTION 'the connection is in use';
            END IF;
            FOR part IN 1 .. 2 LOOP
                WHILE NOT prompt AND ehub_dblink.dblink_is_busy('ehub') = 1 LOOP
                    waited := 1000 * date_part('epoch', clock_timestamp() - sent);
                    IF waited > patience THEN
                        failure := format('no answer in %s ms', patience);
                        EXIT;
                    ELSIF waited > 0.3 THEN
                        PERFORM pg_sleep(0.001);
                    END IF;
                END LOOP;
                EXIT WHEN failure IS NOT NULL;
                IF part = 1 THEN
                    SELECT * INTO STRICT answer FROM ehub_dblink.dblink_get_result('ehub') AS t (
                        nonce text, reason text, watermark pg_snapshot, counts int[], keys text[],
                        plan text, matching boolean
                    );
                ELSE
                    -- The end of the answer.
                    PERFORM FROM ehub_dblink.dblink_get_result('ehub') AS t (nothing text);
                END IF;
            END LOOP;
            IF failure IS NULL THEN
                IF answer.nonce IS DISTINCT FROM nonce THEN
                    RAISE EXCEPTION 'the answer to another question';
                ELSIF answer.reason IS NULL AND (
                    answer.watermark IS NULL OR answer.matching IS NULL
                    OR cardinality(answer.counts) IS DISTINCT FROM n
                    OR (SELECT sum(c) FROM unnest(answer.counts) AS c)
                        IS DISTINCT FROM cardinality(answer.keys)
                ) THEN
                    RAISE EXCEPTION 'an answer that does not fit together';
                END IF;
            END IF;
        EXCEPTION WHEN OTHERS THEN
            -- Also where this session has no connection yet: the second attempt makes one.
            GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL;
            failure := concat_ws(': ', SQLERRM, nullif(detail, ''));
        END;
        IF failure IS NULL THEN
            reason := answer.reason;
            watermark := answer.watermark;
            counts := answer.counts;
            keys := answer.keys;
            plan := answer.plan;
            matching := answer.matching;
            RETURN;
        END IF;
        BEGIN
            PERFORM ehub_dblink.dblink_disconnect('ehub');
        EXCEPTION WHEN OTHERS THEN
            NULL;
        END;
        EXIT WHEN waited > patience;
    END LOOP;
END $$;

-- A setting of the session, role or database that is a whole number.
CREATE OR REPLACE FUNCTION ehub.whole_setting(setting text, otherwise int) RETURNS int
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    chosen text := nullif(current_setting(setting, true), '');
BEGIN
    IF chosen !~ '^[0-9]{1,6}$' THEN
        RAISE EXCEPTION '% is a whole number from 0 to 999999, not %', setting,
            quote_literal(chosen) USING ERRCODE = 'EH005';
    END IF;
    RETURN coalesce(chosen::int, otherwise);
END $$;
