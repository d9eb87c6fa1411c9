-- Who may call what: everybody what reads and writes spaces under rights of their own, the owner
-- alone the rest. Rights on spaces are rights on their views and data tables.

GRANT USAGE ON SCHEMA ehub, ehub_data, spaces TO PUBLIC;
GRANT SELECT ON ehub.catalogue, ehub.status, ehub.migration, ehub.setting TO PUBLIC;
REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA ehub FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    ehub.candidates,
    ehub.choice,
    ehub.count_rows,
    ehub.deciding_keys,
    ehub.delete,
    ehub.distance_operator,
    ehub.get,
    ehub.index_missing,
    ehub.lag,
    ehub.merge_staged,
    ehub.nearest,
    ehub.nearest_exact,
    ehub.nearest_exact_to,
    ehub.nearest_many,
    ehub.nearest_to,
    ehub.refuse_key,
    ehub.refuse_row,
    ehub.require_exact_is_allowed,
    ehub.require_query,
    ehub.require_space,
    ehub.require_usable,
    ehub.service_missing,
    ehub.set,
    ehub.stage
TO PUBLIC;
