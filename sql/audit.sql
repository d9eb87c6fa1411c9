-- The audit trail: who managed what, when and from where. Written by the functions that do it, in
-- their own transactions; nobody else can.

CREATE OR REPLACE FUNCTION ehub.log_action(
    role regrole, action text, space text DEFAULT NULL, detail jsonb DEFAULT '{}'
) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO ehub.audit (role, login, address, application, space_id, space, action, detail)
    VALUES (
        $1::oid::regrole::text, session_user, inet_client_addr(),
        left(current_setting('application_name'), 100),
        (SELECT s.id FROM ehub.space AS s WHERE s.name = $3), $3, $2, jsonb_strip_nulls($4)
    )
$$;

-- What was done to the spaces that one manages; to their owner also to those that are gone. A space
-- that was made anew begins with an empty one.
CREATE OR REPLACE VIEW ehub.audit_trail WITH (security_barrier) AS
SELECT a.at, a.role, a.login, a.address, a.application, a.space, a.action, a.detail
FROM ehub.audit AS a LEFT JOIN ehub.space AS s ON s.id = a.space_id
LEFT JOIN ehub.version AS v ON v.id = s.current_version_id
LEFT JOIN ehub.attachment AS t ON t.version_id = v.id
LEFT JOIN pg_class AS c ON c.oid = t.relation
WHERE (SELECT ehub.hear_of_revocations()) AND (
    has_table_privilege(to_regclass('spaces.' || quote_ident(s.name)), 'TRUNCATE')
    OR pg_has_role(c.relowner, 'USAGE')
    OR pg_has_role(
        (SELECT n.nspowner FROM pg_namespace AS n WHERE n.nspname = 'ehub'), 'USAGE'
    )
)
ORDER BY a.id DESC;
