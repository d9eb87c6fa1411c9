-- Indexes: which there are, and which one a search goes by.

-- The indexes that a replica may keep for this role: those whose rows it may know all of, by the
-- condition that says which these are (NULL for all of them). Those over limited rows are for the
-- index service. The one over all rows is kept by partitions where there are some.
CREATE OR REPLACE VIEW ehub.indexes WITH (security_barrier) AS
SELECT
    c.space, c.version, c.version_id, c.dims, c.metric, i.id AS index_id, i.m, i.ef_construction,
    i.target_recall, c.current, c.warm, i.rows, i.name,
    CASE WHEN i.rows IS NULL AND i.name IS NULL THEN c.partition_by END AS partition_by,
    coalesce(ehub.condition(VARIADIC i.rows), ehub.filter_condition(i.filter)) AS condition
FROM ehub.catalogue AS c JOIN ehub.index AS i ON i.version_id = c.version_id
WHERE ehub.sees_all(c.version_id);
