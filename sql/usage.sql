-- Who may call what: everybody what reads and writes spaces under rights of their own, the owner
-- alone the rest. Rights on spaces are rights on their views and data tables.

GRANT USAGE ON SCHEMA ehub, ehub_data, spaces TO PUBLIC;
GRANT SELECT ON
    ehub.catalogue,
    ehub.checkpoints,
    ehub.migration,
    ehub.promotions,
    ehub.setting,
    ehub.status,
    ehub.versions
TO PUBLIC;
REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA ehub FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    ehub.address,
    ehub.candidates,
    ehub.changed_since,
    ehub.choice,
    ehub.count_rows,
    ehub.deciding_keys,
    ehub.delete,
    ehub.diff,
    ehub.diff_keys,
    ehub.distance_operator,
    ehub.get,
    ehub.hold_log,
    ehub.images,
    ehub.index_missing,
    ehub.lag,
    ehub.merge_staged,
    ehub.nearest,
    ehub.nearest_at,
    ehub.nearest_exact,
    ehub.nearest_exact_to,
    ehub.nearest_many,
    ehub.nearest_to,
    ehub.overlap,
    ehub.overlap_of_queries,
    ehub.refuse_key,
    ehub.refuse_row,
    ehub.relation_at,
    ehub.relation_of_diff,
    ehub.release_log,
    ehub.require_checkpoint,
    ehub.require_exact_is_allowed,
    ehub.require_query,
    ehub.require_space,
    ehub.require_usable,
    ehub.rows_at,
    ehub.service_missing,
    ehub.set,
    ehub.shared,
    ehub.stage,
    ehub.stop_writers,
    ehub.write_staged
TO PUBLIC;
