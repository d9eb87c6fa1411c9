-- Partitions: rows that are searched by the value of one field of their metadata.
--
-- A value goes by its text, as metadata ->> field gives it. The index of such a version keeps the
-- values apart; in Postgres an index on the field finds the rows of one.

CREATE OR REPLACE FUNCTION ehub.require_partition_field(space text, partition_by text) RETURNS void
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF octet_length(partition_by) NOT BETWEEN 1 AND 200 THEN
        RAISE EXCEPTION 'space %: partition_by is the name of a field of the metadata, of 1 to 200'
            ' bytes, not %', quote_literal(space), quote_literal(left(partition_by, 60))
            USING ERRCODE = 'EH005';
    END IF;
END $$;

-- What makes a data table one with partitions: each row has the field, and an index finds them by it.
CREATE OR REPLACE FUNCTION ehub.add_partitions(version_id bigint, space text, partition_by text)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format(
        'ALTER TABLE ehub_data.%I ADD CONSTRAINT in_a_partition CHECK ('
        ' jsonb_typeof(metadata -> %L) IN (''string'', ''number'', ''boolean'')'
        ' AND octet_length(metadata ->> %2$L) <= 1000'
        ' OR ehub.refuse_partition(%3$L, %2$L, key, metadata))',
        'v' || version_id, partition_by, space
    );
    EXECUTE format(
        'CREATE INDEX %I ON ehub_data.%I ((metadata ->> %L))',
        'v' || version_id || '_partition_idx', 'v' || version_id, partition_by
    );
END $$;

-- Reached only by a row that is in no partition: it says why.
CREATE OR REPLACE FUNCTION ehub.refuse_partition(
    space text, partition_by text, key text, metadata jsonb
) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'space %, key %: its metadata needs field %, the partition, as a string, number or'
        ' boolean of 1000 bytes at most, not %', quote_literal(space), quote_literal(left(key, 60)),
        to_json(partition_by), coalesce(left((metadata -> partition_by)::text, 60), 'nothing')
        USING ERRCODE = 'EH007';
END $$;

-- Refuse to look for a partition where there are none.
CREATE OR REPLACE FUNCTION ehub.require_partition(target ehub.catalogue, partition text) RETURNS void
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF partition IS NOT NULL AND target.partition_by IS NULL THEN
        RAISE EXCEPTION 'space % has no partitions', quote_literal(target.space)
            USING ERRCODE = 'EH005',
            HINT = 'create_space(..., partition_by => a field of the metadata) makes one that has;'
                ' a filter does without';
    END IF;
END $$;

-- The partitions with their numbers of rows, the largest first.
CREATE OR REPLACE FUNCTION ehub.partitions(space text) RETURNS TABLE (partition text, rows bigint)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_space(space);
BEGIN
    PERFORM ehub.require_partition(target, '');
    RETURN QUERY EXECUTE format(
        'SELECT metadata ->> %L, count(*) FROM ehub_data.%I GROUP BY 1 ORDER BY 2 DESC, 1',
        target.partition_by, 'v' || target.version_id
    );
END $$;

-- Delete all rows of a partition; returns how many there were.
CREATE OR REPLACE FUNCTION ehub.drop_partition(space text, partition text) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target ehub.catalogue := ehub.require_space(space);
    gone bigint;
BEGIN
    PERFORM ehub.require_partition(target, coalesce(partition, ''));
    EXECUTE format('DELETE FROM spaces.%I WHERE metadata ->> %L = $1', space, target.partition_by)
        USING partition;
    GET DIAGNOSTICS gone = ROW_COUNT;
    IF gone = 0 THEN
        RAISE EXCEPTION 'space % has no partition %', quote_literal(target.space),
            coalesce(quote_literal(left(partition, 60)), 'NULL') USING ERRCODE = 'EH024',
            HINT = 'ehub.partitions lists them';
    END IF;
    RETURN gone;
END $$;
