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
-- when only the address changes. For the owner of schema ehub; needs extension dblink, or the right
-- to create it. `direct` says that no proxy or tunnel lies between (ehub.promise_answers).
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
    ELSIF place IS NULL THEN
        IF NOT EXISTS (SELECT FROM pg_available_extensions AS e WHERE e.name = 'dblink') THEN
            RAISE EXCEPTION 'this server has no extension dblink: searches in SQL stay exact'
                USING ERRCODE = 'EH010', HINT = 'it is part of postgresql-contrib';
        END IF;
        CREATE SCHEMA IF NOT EXISTS ehub_dblink;
        CREATE EXTENSION dblink SCHEMA ehub_dblink;
    ELSIF place <> 'ehub_dblink' THEN
        RAISE EXCEPTION 'dblink is in schema %, where others could use the service''s connection',
            quote_ident(place) USING ERRCODE = 'EH010',
            HINT = 'CREATE SCHEMA ehub_dblink; ALTER EXTENSION dblink SET SCHEMA ehub_dblink';
    END IF;
    IF has_schema_privilege('public', 'ehub_dblink', 'USAGE') THEN
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
    IF current_setting('server_version_num')::int >= 160000 THEN
        -- Who does not know the secret does not learn it by asking for it.
        options := options || format(', require_auth %L', 'scram-sha-256');
    END IF;
    DROP SERVER IF EXISTS ehub_service CASCADE;
    EXECUTE format(
        'CREATE SERVER ehub_service FOREIGN DATA WRAPPER dblink_fdw OPTIONS (%s)', options
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
    EXECUTE format('GRANT USAGE ON SCHEMA ehub_dblink TO %s', ehub.owner());
    EXECUTE format('GRANT USAGE ON FOREIGN SERVER ehub_service TO %s', ehub.owner());
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
        WHEN NOT coalesce(
            has_schema_privilege(ehub.owner(), to_regnamespace('ehub_dblink'), 'USAGE'), false
        ) THEN format('role %s, which owns ehub, may not use schema ehub_dblink', ehub.owner())
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
        IF NOT EXISTS (SELECT FROM pg_available_extensions AS e WHERE e.name = 'dblink') THEN
            RETURN 'this server has no extension dblink';
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

-- Ask the service for the `k` nearest of each of `n` queries, given as the hexadecimal form of what
-- vector_send writes, one after the other; by the index that has just the rows that the caller sees.
-- With a filter, a partition or the name of a sub-index it is about rows that match; `matching` says
-- whether all candidates do, and there are no others, or whether they are just near.
--
-- Returns the candidates, one query's after the other's, how many each has, and the watermark as of
-- which they are right; or the reason why there are none. Takes bounded time, and a service that
-- failed is left alone for a while, longer each time.
--
-- dblink waits without a deadline. Where the service does not promise to keep one, the answer is
-- polled for: for a moment without rest, then once a millisecond, for there is no shorter sleep.
CREATE OR REPLACE FUNCTION ehub.candidates(
    version_id bigint,
    n int,
    k int,
    queries text,
    filter jsonb DEFAULT NULL,
    partition text DEFAULT NULL,
    index text DEFAULT NULL,
    caller ehub.caller DEFAULT ehub.me(),
    OUT reason text,
    OUT watermark pg_snapshot,
    OUT counts int[],
    OUT keys text[],
    OUT plan text,
    OUT matching boolean
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET client_min_messages = error AS $$
DECLARE
    me regrole := ehub.role_of(caller);
    -- Until when the service is left alone, in seconds since 1970, and how often it has failed.
    breaker float8[] := substring(
        current_setting('ehub.breaker', true), '^[{][0-9]{1,12}[.][0-9]{3},[0-9]{1,2}[}]$'
    );
    patience float8 := ehub.whole_setting('ehub.service_timeout', 1000) + 20 * n;
    sent timestamptz := clock_timestamp();
    nonce text := date_part('epoch', sent);
    life ehub.incarnation;
    index_id bigint;
    attached ehub.attachment;
    -- What the index has to be as of: the life of the database, and what changes with its table where
    -- that may have changed without being logged.
    state text;
    proposed_under text;
    statement text;
    waited float8;
    answer record;
    detail text;
BEGIN
    IF breaker[1] > date_part('epoch', sent) THEN
        reason := 'the service failed a moment ago';
        RETURN;
    ELSIF pg_is_in_recovery() THEN
        reason := 'this is a standby';
        RETURN;
    END IF;
    life := ehub.incarnation();
    IF life.token IS NULL THEN
        reason := ehub.service_missing();
        RETURN;
    END IF;
    IF ehub.has_unlogged_changes(version_id) THEN
        -- The index would be taken to know them.
        reason := 'the statement that is under way changes the rows';
        RETURN;
    END IF;
    IF k > 10000 THEN
        -- A search that keeps so many takes long, and memory that is everybody's.
        reason := 'more than 10000 are asked for';
        RETURN;
    END IF;
    IF filter IS NULL AND partition IS NULL THEN
        index_id := ehub.index_of(me, version_id);
    ELSE
        -- Whoever calls this may send anything, and the service reads what matches for all of them.
        PERFORM ehub.filter_path(filter);
        SELECT c.index_id, c.filter, c.partition INTO index_id, filter, partition
        FROM ehub.choose_index(me, version_id, index, filter, partition) AS c;
    END IF;
    IF index_id IS NULL THEN
        reason := 'no index has just the rows that may be read';
        RETURN;
    END IF;
    state := life.token;
    SELECT * INTO attached FROM ehub.attachment AS a WHERE a.version_id = $1;
    IF NOT FOUND THEN
        state := state || '/' || ehub.own_token($1);
    ELSE
        IF attached.shape <> ehub.attached_shape(attached.relation) THEN
            reason := 'its table was altered a moment ago';
            RETURN;
        END IF;
        state := state || '/' || ehub.attached_token(
            $1, attached.relation, attached.column_name, attached.column_number
        );
        proposed_under := $1 || ' ' || state;
        IF filter IS NOT NULL OR index_id <> ehub.index_of(me, version_id) THEN
            -- Its columns may have changed their names, and that is logged nowhere.
            state := state || '/' || attached.shape;
        END IF;
    END IF;
    statement := format(
        'CANDIDATES %s %s %s %s %s %s %s %s %s',
        nonce, state, index_id, n, k, ehub.whole_setting('ehub.ef_search', 0),
        coalesce('x' || encode(convert_to(filter::text, 'UTF8'), 'hex'), '-'),
        coalesce('x' || encode(convert_to(partition, 'UTF8'), 'hex'), '-'), queries
    );

    FOR attempt IN 1 .. 2 LOOP
        BEGIN
            reason := NULL;
            IF attempt = 2 THEN
                reason := ehub.service_missing();
                EXIT WHEN reason IS NOT NULL;
                PERFORM ehub_dblink.dblink_connect('ehub', 'ehub_service');
            END IF;
            sent := clock_timestamp();
            IF ehub_dblink.dblink_send_query('ehub', statement) <> 1 THEN
                RAISE EXCEPTION 'the connection is in use';
            END IF;
            FOR part IN 1 .. 2 LOOP
                WHILE NOT life.prompt AND ehub_dblink.dblink_is_busy('ehub') = 1 LOOP
                    waited := 1000 * date_part('epoch', clock_timestamp() - sent);
                    IF waited > patience THEN
                        reason := format('no answer in %s ms', round(patience));
                        EXIT;
                    ELSIF waited > 0.3 THEN
                        PERFORM pg_sleep(0.001);
                    END IF;
                END LOOP;
                EXIT WHEN reason IS NOT NULL;
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
            IF reason IS NULL THEN
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
            reason := concat_ws(': ', SQLERRM, nullif(detail, ''));
        END;
        IF reason IS NULL THEN
            IF breaker IS NOT NULL THEN
                RAISE LOG 'ehub: the index service answers again';
                PERFORM set_config('ehub.breaker', '', false);
            END IF;
            reason := answer.reason;
            IF reason IS NULL THEN
                IF proposed_under IS NOT NULL THEN
                    -- For ehub.deciding_keys.
                    PERFORM set_config('ehub.proposed_under', proposed_under, true);
                END IF;
                watermark := answer.watermark;
                counts := answer.counts;
                keys := answer.keys;
                plan := answer.plan;
                matching := answer.matching;
            END IF;
            RETURN;
        END IF;
        BEGIN
            PERFORM ehub_dblink.dblink_disconnect('ehub');
        EXCEPTION WHEN OTHERS THEN
            NULL;
        END;
        EXIT WHEN waited > patience;
    END LOOP;

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
