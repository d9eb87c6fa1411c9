\echo Use "CREATE EXTENSION ehub_link" to load this file. \quit

-- What only C can do for a search in SQL, in the schema that it serves, where only the owner of ehub makes
-- functions.
DO $$
BEGIN
    IF to_regproc('ehub.candidates') IS NULL THEN
        RAISE EXCEPTION 'there is no ehub in this database that could use ehub_link'
            USING HINT = '`ehub migrate` comes first';
    END IF;
END $$;

-- Where the service is, and the secret that proves it, stand in a foreign server and a user mapping. Where
-- there is no dblink, the server is of this wrapper, which reads and writes nothing.
CREATE FOREIGN DATA WRAPPER ehub_link;

-- Ask the index service for the `k` nearest of each of some vectors, in at most `patience` milliseconds.
--
-- Returns the candidates, one vector's after the other's, how many each has, and the snapshot as of which
-- they are right; or the reason that the service gives why there are none; or as `failure` why it has not
-- answered, or nothing that can be believed. Just NULLs where the link cannot be used as things are
-- (ehub.link_problem). Nothing that a service does is an error.
CREATE FUNCTION link_ask(
    state text,
    index_id bigint,
    k int,
    ef int,
    filter text,
    partition text,
    queries vector[],
    patience int,
    OUT failure text,
    OUT reason text,
    OUT watermark pg_snapshot,
    OUT counts int[],
    OUT keys text[],
    OUT plan text,
    OUT matching boolean
)
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'ehub_link_ask';

-- What ehub.link_remember was told of a space for a role, if nothing has changed since; else NULLs.
CREATE FUNCTION link_recall(
    space text,
    role oid,
    OUT version_id bigint,
    OUT index_id bigint,
    OUT state text,
    OUT attached boolean
)
LANGUAGE c STRICT VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'ehub_link_recall';

-- Remember what was looked up since the last ehub.link_recall, until one of these relations changes.
CREATE FUNCTION link_remember(
    space text,
    role oid,
    version_id bigint,
    index_id bigint,
    state text,
    attached boolean,
    relations oid[]
) RETURNS void
LANGUAGE c STRICT VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'ehub_link_remember';

-- Whoever may call these may ask the service for keys of any index: the owner of ehub alone.
DO $$
DECLARE
    one regprocedure;
BEGIN
    FOR one IN
        SELECT p.oid FROM pg_proc AS p
        WHERE p.pronamespace = 'ehub'::regnamespace AND p.proname IN ('link_ask', 'link_recall', 'link_remember')
    LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', one);
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', one, ehub.owner());
    END LOOP;
    EXECUTE format('GRANT USAGE ON FOREIGN DATA WRAPPER ehub_link TO %s', ehub.owner());
END $$;
