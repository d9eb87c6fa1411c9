-- Many rows at once: COPY into a staging table, then one statement into the space.

-- The staging table of this session, and one for how rows were before (ehub.write_staged); the end
-- of each transaction empties them. The ordinal tells
-- which of two rows with the same key came later; without metadata a row keeps what it had.
CREATE OR REPLACE FUNCTION ehub.stage() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF to_regclass('pg_temp.ehub_staging') IS NULL THEN
        CREATE TEMPORARY TABLE ehub_staging (
            ordinal bigint GENERATED ALWAYS AS IDENTITY,
            key text,
            embedding @vector@.vector STORAGE MAIN,
            metadata jsonb
        ) ON COMMIT DELETE ROWS;
        CREATE TEMPORARY TABLE ehub_base (
            key text, embedding @vector@.vector STORAGE MAIN, metadata jsonb
        ) ON COMMIT DELETE ROWS;
    END IF;
END $$;

-- Put the staged rows into a space: new keys are inserted, known ones updated, the last of
-- several rows of a key counts. In the order of keys, which the table's index likes best.
-- Returns the number of keys.
CREATE OR REPLACE FUNCTION ehub.merge_staged(space text) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target text := format('spaces.%I', space);
    kept text := ehub.kept_metadata(ehub.require_space(space), 's.key');
    merged bigint;
    total bigint;
BEGIN
    PERFORM ehub.require_own(space, 'its rows are written there');
    DELETE FROM pg_temp.ehub_staging AS s
    USING (
        SELECT key, max(ordinal) AS latest FROM pg_temp.ehub_staging
        GROUP BY key HAVING count(*) > 1
    ) AS d
    WHERE s.key = d.key AND s.ordinal < d.latest;

    -- Who writes rows of the same averages may wait for this one while this one waits for it (see
    -- ehub.create_follower): one of the two begins again, at another moment than the others.
    FOR attempt IN 1 .. 10 LOOP
        BEGIN
            EXECUTE format(
                'INSERT INTO %s (key, embedding, metadata)'
                ' SELECT key, embedding, metadata FROM pg_temp.ehub_staging WHERE metadata IS NOT NULL'
                ' ORDER BY key'
                ' ON CONFLICT (key) DO UPDATE'
                ' SET embedding = EXCLUDED.embedding, metadata = EXCLUDED.metadata',
                target
            );
            GET DIAGNOSTICS total = ROW_COUNT;
            EXECUTE format(
                'INSERT INTO %s (key, embedding, metadata)'
                ' SELECT s.key, s.embedding, %s FROM pg_temp.ehub_staging AS s'
                ' WHERE s.metadata IS NULL ORDER BY s.key'
                ' ON CONFLICT (key) DO UPDATE SET embedding = EXCLUDED.embedding',
                target, kept
            );
            GET DIAGNOSTICS merged = ROW_COUNT;
            RETURN total + merged;
        EXCEPTION WHEN deadlock_detected THEN
            IF attempt = 10 THEN
                RAISE;
            END IF;
            PERFORM pg_sleep(0.05 * attempt * random());
        END;
    END LOOP;
END $$;
