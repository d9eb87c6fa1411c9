-- Who may call what: everybody what reads and writes spaces under rights of their own, or looks at
-- the caller's rights first; the owner alone the rest. Rights on spaces are granted by ehub.grant.

-- What everybody may call.
CREATE OR REPLACE FUNCTION ehub.for_everybody() RETURNS name[]
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT ARRAY[
        -- Rows, under the caller's own rights.
        'add_attached_triggers', 'add_triggers', 'address', 'as_list', 'as_metadata',
        'attach', 'attached_column', 'attached_condition', 'attached_fields',
        'attached_key', 'attached_problem', 'attached_rows', 'attached_shape',
        'attached_token', 'average', 'average_steps', 'average_value', 'average_weight',
        'averages', 'averages_query', 'bigint_keys', 'candidates_needed', 'choice',
        'column_condition', 'condition', 'conditions', 'count_rows', 'delete', 'detach',
        'diff', 'diff_keys', 'distance', 'distance_operator', 'distances',
        'drop_attached_triggers', 'drop_partition',
        'element_implies', 'estimated_rows', 'exact_answers', 'exact_because', 'example_query',
        'explain_nearest',
        'field_path', 'field_steps', 'field_value', 'filter_condition', 'filter_fields',
        'filter_of_field', 'filter_of_index', 'filter_parts', 'filter_path', 'filter_text',
        'filter_with_index', 'get', 'has_distances', 'has_filter', 'has_keys', 'hides_rows',
        'hear_of_revocations', 'holder', 'implies', 'in_turns', 'index_missing', 'indexes_for', 'joined',
        'keys_left_out', 'kept_metadata', 'known_rows', 'link_problem',
        'mark_of', 'mean_of_examples', 'merge_staged', 'nearest',
        'nearest_at', 'nearest_exact', 'nearest_exact_to', 'nearest_like', 'nearest_many',
        'nearest_of_batch', 'nearest_to', 'object_of', 'overlap', 'overlap_of_queries',
        'own_problem', 'owner', 'partitions', 'reattach', 'refuse_average', 'refuse_filter', 'refuse_key',
        'refuse_partition', 'refuse_row', 'refuse_space', 'relation_at', 'relation_of_diff',
        'require_attachable', 'require_checkpoint', 'require_exact_is_allowed',
        'require_keys', 'require_name', 'require_own', 'require_partition',
        'require_partition_field', 'require_query', 'require_read_committed',
        'require_scalar', 'require_shape', 'require_space', 'require_usable', 'rows_at', 'rows_shown',
        'rows_of', 'set', 'shared', 'space_of', 'stage', 'still_is', 'stop_writers', 'switch_triggers',
        'tree_of', 'trigger_kinds', 'unlogged', 'users_of', 'uuid_keys', 'whole_setting', 'within', 'write_staged',
        -- With the owner's rights, for callers who see all rows of a version; of who calls.
        'candidates', 'changed_since', 'changes', 'deciding_keys', 'hold_current', 'hold_log',
        'images', 'lag',
        'me', 'sees_all',
        -- For replicas: to such callers, or to whoever knows what it was given before.
        'acknowledge', 'acknowledged', 'forget_replica', 'identity', 'is_granted', 'is_recognised', 'release_log', 'report',
        'trim', 'trimmed_below',
        -- With the owner's rights, for the admins of a space.
        'add_attached', 'attachment_of', 'checkpoint', 'create_average', 'create_index',
        'create_version', 'delete_space', 'drop_checkpoint', 'drop_index', 'drop_version',
        'freeze', 'grant', 'keep_warm', 'promote', 'remove_attached', 'restore', 'revoke',
        'rollback',
        -- For the owner and its members.
        'grant_create', 'grant_default', 'revoke_create', 'revoke_default',
        -- With the owner's rights, and nothing to tell that is not for everybody.
        'count_exact', 'own_token', 'service_missing'
    ]::name[]
$$;

-- What everybody may look at: views that show what is for who looks.
CREATE OR REPLACE FUNCTION ehub.shown_to_everybody() RETURNS name[]
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT ARRAY[
        'attached', 'audit_trail', 'catalogue', 'checkpoints', 'grants', 'indexes', 'kept_averages',
        'migration', 'promotions', 'setting', 'status', 'sub_indexes', 'versions', 'whoami'
    ]::name[]
$$;

-- Make the rights on schema ehub these.
CREATE OR REPLACE FUNCTION ehub.apply_usage() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    one record;
BEGIN
    FOR one IN
        SELECT n.nspname, ehub.holder(a.grantee) AS role
        FROM pg_namespace AS n, aclexplode(n.nspacl) AS a
        WHERE n.nspname IN ('ehub', 'ehub_data', 'spaces') AND a.grantee <> n.nspowner
            AND a.privilege_type = 'CREATE'
    LOOP
        EXECUTE format('REVOKE CREATE ON SCHEMA %I FROM %s CASCADE', one.nspname, one.role);
    END LOOP;
    GRANT USAGE ON SCHEMA ehub, ehub_data, spaces TO PUBLIC;
    FOR one IN
        SELECT c.relname, ehub.holder(a.grantee) AS role
        FROM pg_class AS c, aclexplode(c.relacl) AS a
        WHERE c.relnamespace = 'ehub'::regnamespace AND a.grantee <> c.relowner
        GROUP BY 1, 2
    LOOP
        EXECUTE format('REVOKE ALL ON ehub.%I FROM %s CASCADE', one.relname, one.role);
    END LOOP;
    EXECUTE (
        SELECT 'GRANT SELECT ON ' || string_agg(format('ehub.%I', shown), ', ') || ' TO PUBLIC'
        FROM unnest(ehub.shown_to_everybody()) AS shown
    );
    FOR one IN
        SELECT p.oid::regprocedure AS name, p.proname = ANY (ehub.for_everybody()) AS due
        FROM pg_proc AS p WHERE p.pronamespace = 'ehub'::regnamespace
            AND has_function_privilege(0::oid, p.oid, 'EXECUTE')
                <> (p.proname = ANY (ehub.for_everybody()))
    LOOP
        EXECUTE format(
            CASE WHEN one.due THEN 'GRANT EXECUTE ON FUNCTION %s TO PUBLIC'
                ELSE 'REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC' END,
            one.name
        );
    END LOOP;
END $$;

SELECT ehub.apply_usage();
-- A function that was made anew has lost who may call it.
SELECT ehub.apply_create();

-- What was granted by hand before there was a record is recorded once, as far as it can be.
DO $$
DECLARE
    one bigint;
BEGIN
    IF EXISTS (SELECT FROM ehub.setting AS s WHERE s.name = 'grants_recorded') THEN
        RETURN;
    END IF;
    INSERT INTO ehub.setting VALUES ('grants_recorded', '');
    INSERT INTO ehub.access (space_id, role, privilege, granted_by)
    SELECT s.id, g.holder, CASE WHEN bool_or(g.privilege = 'INSERT') THEN 'write' ELSE 'read' END,
        current_user
    FROM ehub.space AS s CROSS JOIN LATERAL ehub.rights_given(s.id) AS g
    WHERE g.holder <> 0 AND g.relation = to_regclass('ehub_data.v' || s.current_version_id)
    GROUP BY s.id, g.holder HAVING bool_or(g.privilege = 'SELECT')
    ON CONFLICT DO NOTHING;
    FOR one IN SELECT s.id FROM ehub.space AS s LOOP
        PERFORM ehub.apply_access(one);
    END LOOP;
END $$;
