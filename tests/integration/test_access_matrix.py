"""Every function, relation and method, as every kind of role: what is for it works, the rest tells nothing.

What there is comes from the database's catalogue and from the classes. Something that is added later
and has no rule here fails.
"""

import contextlib
import inspect
import uuid
from typing import NamedTuple

import psycopg
import pytest
from conftest import drop_database
from psycopg import sql
from psycopg.conninfo import make_conninfo

import ehub
from ehub.config import Target
from ehub.database import Database
from ehub.migrate import migrate

# Whose output and errors must not hold these: keys, metadata, numbers of vectors, names.
HUSH = ("hush", "classified", "77707", "plan_b", "nightly", "elsewhere")
OTHERS = ("hush", "classified", "77707", "elsewhere")
ELSEWHERE = ("elsewhere",)

# What each kind of role may do; `silent` answers without an error and says nothing.
MAY = {
    "stranger": set(),
    "revoked": set(),
    "revoked meanwhile": set(),
    "pinned": {"version"},
    "limited": {"read", "version"},
    "limited writer": {"read", "write", "version"},
    "reader": {"read", "whole", "version"},
    "member": {"read", "whole", "version"},
    "as another": {"read", "whole", "version"},
    "writer": {"read", "write", "whole", "version"},
    "admin": {"read", "write", "whole", "admin", "version"},
    "maker": {"create"},
    "owner": {"read", "write", "whole", "admin", "create", "admin and create", "owner", "version"},
    "superuser": {
        "read",
        "write",
        "whole",
        "admin",
        "create",
        "admin and create",
        "owner",
        "version",
    },
}
SECRETS = {
    "stranger": HUSH,
    "revoked": HUSH,
    "revoked meanwhile": HUSH,
    "maker": HUSH,
    "pinned": OTHERS,
    "limited": OTHERS,
    "limited writer": OTHERS,
    "owner": (),
    "superuser": (),
}

ANYBODY, SILENT, INTERNAL = "anybody", "silent", "internal"
UUID = "'00000000-0000-0000-0000-000000000001'"
V = "'[1,0]'::vector"
ME = "(SELECT c FROM ehub.catalogue AS c WHERE c.space = 'secret' AND c.current)"
FUNCTIONS = {
    # name: what it takes to call it, and calls
    "average": ("read", "ehub.average('secret', '{mine_1}')"),
    "averages": ("read", "ehub.averages('secret', 'tenant')"),
    "average_steps": (ANYBODY, "ehub.average_steps('by', 'a.b')"),
    "average_value": (ANYBODY, "ehub.average_value('by', 'a.b')"),
    "average_weight": (ANYBODY, "ehub.average_weight('a.b')"),
    "averages_query": (ANYBODY, "ehub.averages_query('SELECT', true)"),
    "create_average": (
        "admin and create",
        "ehub.create_average('another', 'secret', 'tenant')",
    ),
    "refuse_average": (ANYBODY, "ehub.refuse_average('s')", "EH025"),
    "conditions": (ANYBODY, f"ehub.conditions({ME}, '{{\"a\": 1}}', NULL)"),
    "element_implies": (ANYBODY, "ehub.element_implies('{\"=\": 1}', '{\"<\": 2}')"),
    "field_path": (ANYBODY, "ehub.field_path('a.b')"),
    "field_steps": (ANYBODY, "ehub.field_steps('a.b')"),
    "require_keys": ("read", f"ehub.require_keys({ME}, '{{mine_1}}')"),
    "filter_condition": (ANYBODY, "ehub.filter_condition('{\"a\": 1}')"),
    "filter_of_field": (ANYBODY, "ehub.filter_of_field('a', '1')"),
    "filter_of_index": (ANYBODY, "ehub.filter_of_index(1, 'unknown')", "EH022"),
    "filter_parts": (ANYBODY, "ehub.filter_parts('{\"a\": 1}')"),
    "kept_metadata": (ANYBODY, f"ehub.kept_metadata({ME}, 'k')"),
    "filter_path": (ANYBODY, "ehub.filter_path('{\"a\": 1}')"),
    "filter_text": (ANYBODY, "ehub.filter_text('{\"a\": 1}', 1)"),
    "filter_with_index": (ANYBODY, f"ehub.filter_with_index({ME}, '{{\"a\": 1}}', NULL)"),
    "implies": (ANYBODY, 'ehub.implies(\'{"a": 1}\', \'{"a": {"<": 2}}\')'),
    "joined": (ANYBODY, "ehub.joined('{a,b}', ' || ')"),
    "refuse_filter": (ANYBODY, "ehub.refuse_filter('why')", "EH021"),
    "refuse_partition": (ANYBODY, "ehub.refuse_partition('s', 'f', 'k', '{}')", "EH007"),
    "require_partition": (ANYBODY, f"ehub.require_partition({ME}, NULL)"),
    "require_partition_field": (ANYBODY, "ehub.require_partition_field('s', 'f')"),
    "require_scalar": (ANYBODY, "ehub.require_scalar('f', '=', '1')"),
    "candidates_needed": ("read", f"ehub.candidates_needed({ME}, '{{\"a\": 1}}', NULL, 1, 1)"),
    "distance": ("read", "ehub.distance('secret', 'mine_1', 'mine_2')"),
    "distances": ("read", "ehub.distances('secret', '{mine_1,mine_2}')"),
    "estimated_rows": ("read", f"ehub.estimated_rows({ME}, '{{\"a\": 1}}', NULL)"),
    "example_query": ("read", "ehub.example_query('secret', '{mine_1}', '{mine_2}')"),
    "explain_nearest": (
        "read",
        f"ehub.explain_nearest('split', {V}, 5, '{{\"note\": \"x\"}}', '43', 'own')",
    ),
    "indexes_for": ("read", "ehub.indexes_for('split', '{\"tenant\": 42}')"),
    "mean_of_examples": ("read", f"ehub.mean_of_examples({ME}, '{{mine_1}}', NULL)"),
    "nearest_like": ("read", "ehub.nearest_like('secret', '{mine_1}', 50)"),
    "partitions": ("read", "ehub.partitions('split')"),
    "within": ("read", f"ehub.within('secret', {V}, 1e9)"),
    "drop_partition": ("write", "ehub.drop_partition('split', '42')"),
    # Of attached tables: what the catalogue says of a table is everybody's anyway.
    "attach": (ANYBODY, "ehub.attach('spaces.secret', 'embedding')", "EH028"),
    "require_attachable": (ANYBODY, "ehub.require_attachable('pg_class', 'oid')", "EH028"),
    "add_attached": (
        "owner",
        "ehub.add_attached('spaces.secret', 'embedding', 'n', 'l2', 2, 16, 200, 0.9, false)",
        "EH028",
    ),
    "add_attached_triggers": ("owner", "ehub.add_attached_triggers(1, 'ehub_data.v1')", "42883"),
    "add_triggers": ("owner", "ehub.add_triggers('ehub_data.v1', 'x_', 'ehub.log_change(1)')"),
    "switch_triggers": (
        "owner",
        "ehub.switch_triggers('ehub_data.v1', 'ehub_log_', 'DISABLE')",
    ),
    "own_problem": (ANYBODY, "ehub.own_problem(1)"),
    "trigger_kinds": (ANYBODY, "ehub.trigger_kinds()"),
    "count_exact": (ANYBODY, "ehub.count_exact('too few of them')"),
    "exact_answers": (ANYBODY, "ehub.exact_answers()"),
    "exact_because": (ANYBODY, "ehub.exact_because(NULL, 'ready')"),
    "rows_shown": (SILENT, "ehub.rows_shown(1)"),
    "users_of": (ANYBODY, "ehub.users_of('spaces.s')"),
    "own_token": (ANYBODY, "ehub.own_token(1)"),
    "drop_attached_triggers": ("owner", "ehub.drop_attached_triggers(1, 'ehub_data.v1', '1 h')"),
    "attachment_of": ("admin", "ehub.attachment_of('secret')", "EH028"),
    "detach": ("admin", "ehub.detach('secret')", "EH028"),
    "reattach": ("admin", "ehub.reattach('secret')", "EH028"),
    "remove_attached": ("admin", "ehub.remove_attached('secret')", "EH028"),
    "as_list": (ANYBODY, "ehub.as_list('keys', ARRAY[1])"),
    "keys_left_out": (ANYBODY, "ehub.keys_left_out('{a}')"),
    "as_metadata": (ANYBODY, "ehub.as_metadata('{}')"),
    "attached_column": (ANYBODY, "ehub.attached_column('pg_class', 'oid', 1)"),
    "attached_condition": (ANYBODY, "ehub.attached_condition('pg_class', '{\"a\": 1}')"),
    "attached_fields": (ANYBODY, "ehub.attached_fields('pg_class')"),
    "still_is": (ANYBODY, "ehub.still_is('pg_class', 'oid', 26, 'relname', 19)"),
    "attached_key": (ANYBODY, "ehub.attached_key('pg_class')"),
    "attached_problem": (
        ANYBODY,
        "ehub.attached_problem(1, 'pg_class', 'oid', 1, 2, 'pg_monitor')",
    ),
    "attached_rows": (ANYBODY, "ehub.attached_rows('pg_class', 'oid', 1, 2)"),
    "attached_shape": (ANYBODY, "ehub.attached_shape('pg_class')"),
    "attached_token": (ANYBODY, "ehub.attached_token(1, 'pg_class', 'oid', 1)"),
    "bigint_keys": (ANYBODY, "ehub.bigint_keys('{1}')"),
    "uuid_keys": (ANYBODY, "ehub.uuid_keys('{1}')"),
    "column_condition": (ANYBODY, "ehub.column_condition(20, 0, 'c', '{\"=\": 1}')"),
    "field_value": (ANYBODY, "ehub.field_value(20, 'c')"),
    "filter_fields": (ANYBODY, "ehub.filter_fields('{\"a\": 1}')"),
    "has_distances": (ANYBODY, "ehub.has_distances('l2')"),
    "has_filter": (ANYBODY, f"ehub.has_filter({ME}, '{{\"a\": 1}}')"),
    "has_keys": (ANYBODY, f"ehub.has_keys({ME}, '$1')"),
    "hides_rows": (ANYBODY, "ehub.hides_rows('pg_class', 'pg_monitor')"),
    "holder": (ANYBODY, "ehub.holder(0)"),
    "in_turns": (ANYBODY, "ehub.in_turns('s', 'SELECT 1')"),
    "known_rows": (ANYBODY, "ehub.known_rows('pg_class')"),
    "object_of": (ANYBODY, "ehub.object_of('pg_class', 'c%2$s', '{oid}')"),
    "owner": (ANYBODY, "ehub.owner()"),
    "require_name": (ANYBODY, "ehub.require_name('a space', 's', 40)"),
    "require_shape": (ANYBODY, "ehub.require_shape('s', 2, 'l2', 16, 200, 0.9)"),
    "require_own": ("read", "ehub.require_own('secret', '')"),
    "rows_of": ("read", "ehub.rows_of(ehub.require_space('secret'))"),
    "space_of": (ANYBODY, "ehub.space_of('pg_class', 'oid')", "EH001"),
    "tree_of": (ANYBODY, "ehub.tree_of('pg_class')"),
    "unlogged": (ANYBODY, "ehub.unlogged(1, 'pg_class')"),
    "create_index": ("admin", "ehub.create_index('secret', 'new', '{\"tenant\": 42}')"),
    "drop_index": ("admin", "ehub.drop_index('split', 'own')"),
    "address": (ANYBODY, f"ehub.address({ME})"),
    "choice": (ANYBODY, "ehub.choice('ehub.mode', 'auto', 'exact')"),
    "condition": (ANYBODY, "ehub.condition('{\"a\": 1}')"),
    "distance_operator": (ANYBODY, "ehub.distance_operator('l2')"),
    "hear_of_revocations": (ANYBODY, "ehub.hear_of_revocations()"),
    "hold_current": (SILENT, "ehub.hold_current('secret')"),
    "link_problem": (ANYBODY, "ehub.link_problem()"),
    "mark_of": (ANYBODY, "ehub.mark_of(1)"),
    "me": (ANYBODY, "ehub.me()"),
    "identity": (ANYBODY, "ehub.identity()"),
    "is_granted": (ANYBODY, "ehub.is_granted('secret', NULL, 10, 'read')"),
    "is_recognised": (ANYBODY, "ehub.is_recognised()"),
    "recognise": ("owner", "ehub.recognise()"),
    "relation_of_diff": ("read", f"ehub.relation_of_diff({ME}, {ME})"),
    "refuse_row": (ANYBODY, f"ehub.refuse_row('secret', 2, 'l2', 'k', {V}, '{{}}')"),
    "require_exact_is_allowed": (ANYBODY, "ehub.require_exact_is_allowed('auto', 's', '')"),
    "require_query": (ANYBODY, f"ehub.require_query({ME}, NULL, 1)", "EH004"),
    "require_read_committed": (SILENT, "ehub.require_read_committed('s')"),
    "require_usable": (ANYBODY, f"ehub.require_usable('s', 'l2', {V})"),
    "refuse_key": (ANYBODY, "ehub.refuse_key('s', 'k')", "EH008"),
    "refuse_space": (ANYBODY, "ehub.refuse_space('s')", "EH001"),
    "service_missing": (ANYBODY, "ehub.service_missing()"),
    "shared": (ANYBODY, "ehub.shared('{a}', '{b}')"),
    "stage": (ANYBODY, "ehub.stage()"),
    "trim": (ANYBODY, "ehub.trim()"),
    "trimmed_below": (ANYBODY, "ehub.trimmed_below(1)"),
    "whole_setting": (ANYBODY, "ehub.whole_setting('ehub.ef_search', 0)"),
    "acknowledged": (SILENT, f"ehub.acknowledged({UUID}, 1)"),
    "forget_replica": (SILENT, f"ehub.forget_replica({UUID}, 1)"),
    "release_log": (SILENT, f"ehub.release_log({UUID})"),
    "report": (
        SILENT,
        f"ehub.report({UUID}, 1, 'ready', 1, 1, 1, 1, 1, '', '1:1:', '1 h')",
    ),
    "candidates": (SILENT, f"ehub.candidates('secret', ARRAY[{V}], 20)"),
    "changed_since": (SILENT, f"ehub.changed_since({UUID}, {UUID}, 1, '1:1:')"),
    "deciding_keys": (SILENT, "ehub.deciding_keys(1, '1:1:', '{}', 1, 1)"),
    "hold_log": (SILENT, f"ehub.hold_log({UUID}, 1, pg_current_snapshot(), 'x', 1)"),
    "lag": (SILENT, "ehub.lag(1, '1:1:')"),
    "sees_all": (SILENT, "ehub.sees_all(1)"),
    "count_rows": ("read", "ehub.count_rows(1)"),
    "get": ("read", "ehub.get('secret', 'mine_1')"),
    "index_missing": ("read", "ehub.index_missing('secret', pg_current_snapshot())"),
    "nearest": ("read", f"ehub.nearest('secret', {V}, 50)"),
    "nearest_exact": ("read", f"ehub.nearest_exact('secret', {V}, 50)"),
    "nearest_exact_to": ("read", "ehub.nearest_exact_to('secret', 'mine_1', 50)"),
    "nearest_many": ("read", f"ehub.nearest_many('secret', ARRAY[{V}, {V}], 50)"),
    "nearest_of_batch": (
        "read",
        f"ehub.nearest_of_batch(ehub.require_space('secret'), ARRAY[{V}], 50, NULL, NULL, NULL)",
    ),
    "nearest_to": ("read", "ehub.nearest_to('secret', 'mine_1', 50)"),
    "require_space": ("read", "ehub.require_space('secret')"),
    "diff": ("read", "ehub.diff('secret@v1', 'secret@plan_b')"),
    "diff_keys": ("read", "ehub.diff_keys('secret@v1', 'secret@plan_b')"),
    "overlap": ("read", "ehub.overlap('secret@v1', 'secret@plan_b', keys => '{mine_1}')"),
    "overlap_of_queries": (
        "read",
        f"ehub.overlap_of_queries('secret@v1', 'secret@plan_b', ARRAY[{V}])",
    ),
    "acknowledge": (
        "whole",
        f"ehub.acknowledge({UUID}, 1, 'x', pg_current_snapshot(), {UUID}, 1, '1 h')",
    ),
    "changes": ("whole", "ehub.changes(1, '1:1:')"),
    "images": ("whole", "ehub.images(1, 1)"),
    "nearest_at": ("whole", f"ehub.nearest_at('secret', 'nightly', {V}, 50)"),
    "relation_at": ("read", "ehub.relation_at(ehub.require_space('secret'), 'nightly')"),
    "require_checkpoint": (
        "read",
        "ehub.require_checkpoint(ehub.require_space('secret'), 'nightly')",
    ),
    "rows_at": ("whole", "ehub.rows_at('secret', 'nightly')"),
    "delete": ("write", "ehub.delete('secret', 'mine_1')"),
    "merge_staged": ("write", "ehub.merge_staged('secret')"),
    "set": ("write", f"ehub.set('secret', 'mine_1', {V}, '{{\"tenant\": 42}}')"),
    "stop_writers": ("write", "ehub.stop_writers(ehub.require_space('secret'))"),
    "write_staged": ("write", "ehub.write_staged('secret', false, false, 'ours')"),
    "checkpoint": ("admin", "ehub.checkpoint('secret', 'now')"),
    "create_version": ("admin", "ehub.create_version('secret', 'v3')"),
    "delete_space": ("admin", "ehub.delete_space('secret')"),
    "drop_checkpoint": ("admin", "ehub.drop_checkpoint('secret', 'nightly')"),
    "drop_version": ("admin", "ehub.drop_version('secret', 'plan_b')"),
    "freeze": ("admin", "ehub.freeze('secret')"),
    "grant": ("admin", "ehub.grant('secret', 'pg_monitor', 'admin')"),
    "keep_warm": ("admin", "ehub.keep_warm('secret')"),
    "promote": ("admin", "ehub.promote('secret', 'plan_b')"),
    "restore": ("admin", "ehub.restore('secret', 'nightly')"),
    "revoke": ("admin", "ehub.revoke('secret', %(reader)s)"),
    "rollback": ("admin", "ehub.rollback('secret')", "EH011"),
    "create_space": ("create", "ehub.create_space('another', 2)"),
    "grant_create": ("owner", "ehub.grant_create('pg_monitor')"),
    "grant_default": ("owner", "ehub.grant_default('pg_monitor', 'read')"),
    "revoke_create": ("owner", "ehub.revoke_create(%(maker)s)"),
    "revoke_default": ("owner", "ehub.revoke_default(%(maker)s)", "EH019"),
    "drift": ("owner", "ehub.drift()"),
    "mend": ("owner", "ehub.mend()"),
    "service_secret": ("owner", "ehub.service_secret()"),
    "set_service_secret": ("owner", "ehub.set_service_secret()", "EH010"),
    "service_problem": ("owner", "ehub.service_problem()"),
    "lost_attachments": ("owner", "ehub.lost_attachments()"),
    "recover_attachments": ("owner", "ehub.recover_attachments()"),
    "enter_incarnation": ("owner", "ehub.enter_incarnation()"),
    "incarnation": ("owner", "ehub.incarnation()"),
    "install_service": ("owner", "ehub.install_service('', 0)", "EH005"),
    "uninstall_service": ("owner", "ehub.uninstall_service()"),
    "promise_answers": ("owner", "ehub.promise_answers(false, '', 0)"),
    "tend": ("owner", "ehub.tend()"),
    "for_everybody": ("owner", "ehub.for_everybody()"),
    "shown_to_everybody": ("owner", "ehub.shown_to_everybody()"),
} | dict.fromkeys(
    (
        *(
            "add_follower_triggers",
            "add_refusal",
            "forget_log",
            "fit_triggers",
            "has_unlogged_changes",
        ),
        *("counted_changes", "log_in_parts", "note_logged", "ask_by_dblink", "index_for_search"),
        "metric_of_indexes",
        *("tend_triggers", "triggers_due", "wrong_triggers"),
        *("add_followers", "average_key", "averages_statement", "create_follower"),
        *("drop_followers", "follow", "followers", "hold_average", "like_of"),
        *("refuse_direct_write", "require_no_average", "require_no_followers"),
        *("show_followers", "switch_followers", "unfollow"),
        *("add_partitions", "carry_indexes", "choose_index"),
        *("create_attached_log", "fit_attached", "forget_attached", "give_attached_log"),
        *("altered_since_proposed", "table_of", "tend_attached"),
        *("add_default", "add_version", "apply_access", "apply_create", "apply_policies"),
        *(
            "apply_usage",
            "are_many",
            "carry_policies",
            "create_checks",
            "create_data_table",
            "create_due",
        ),
        *(
            "create_given",
            "create_images",
            "create_log_triggers",
            "drop_checks",
            "end_of_grant",
        ),
        *(
            "index_of",
            "is_marked",
            "is_owner",
            "is_warm",
            "keep_images",
            "last_promotion",
            "limits_of",
        ),
        *("lock_space", "log_action", "log_change", "make_current", "manages", "may_touch"),
        *(
            "policies_due",
            "policies_of_grants",
            "policy_fits",
            "read_log",
            "refuse_write",
            "remove_default",
        ),
        *("remove_version", "require_admin", "require_another", "require_owner"),
        *("require_privilege", "require_role", "rights_due", "rights_given"),
        *("ring", "role_of", "row_check", "sees_all_rows", "show_version", "switch"),
        *("tend_indexes",),
    ),
    (INTERNAL,),
)


class People(NamedTuple):
    url: str
    names: dict[str, str]
    # Connections, each in the state that its kind is about.
    connections: dict[str, psycopg.Connection]


@pytest.fixture(scope="module")
def people(server, admin, tmp_path_factory):
    """A database that a plain role owns, a space with secrets, and a connection as each kind."""
    database = f"ehub_matrix_{uuid.uuid4().hex[:8]}"
    names = {kind: f"ehub {kind} {uuid.uuid4().hex[:6]}" for kind in MAY} | {
        "group": f"ehub_group_{uuid.uuid4().hex[:6]}"
    }
    for name in names.values():
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(sql.Identifier(name)))
    admin.execute(
        sql.SQL("CREATE DATABASE {} OWNER {}").format(
            sql.Identifier(database), sql.Identifier(names["owner"])
        )
    )
    url = make_conninfo(server, dbname=database)
    with contextlib.ExitStack() as stack:
        boss = stack.enter_context(psycopg.connect(url, autocommit=True))
        boss.execute("CREATE EXTENSION vector")
        boss.execute(
            sql.SQL("GRANT {} TO {}; GRANT {} TO {}").format(
                *map(
                    sql.Identifier,
                    (names["group"], names["member"], names["reader"], names["as another"]),
                )
            )
        )
        # Rights of a group that come with SET ROLE alone.
        boss.execute(sql.SQL("ALTER ROLE {} NOINHERIT").format(sql.Identifier(names["as another"])))

        def as_(kind):
            return make_conninfo(url, user=names[kind], password="x")

        store = Database(Target(as_("owner"), tmp_path_factory.mktemp("owner")))
        with contextlib.closing(store):
            migrate(store)
        with ehub.connect(as_("owner"), index="none") as hub:
            fill(hub, names)
            split(boss, hub, names)
            connections = {}
            for kind in MAY:
                conninfo = url if kind == "superuser" else as_(kind)
                connections[kind] = stack.enter_context(psycopg.connect(conninfo, autocommit=True))
            for connection in connections.values():
                # One of them keeps a transaction open all the time.
                connection.execute("SET lock_timeout = '100ms'; SET statement_timeout = '700ms'")
            connections["as another"].execute(
                sql.SQL("SET ROLE {}").format(sql.Identifier(names["reader"]))
            )
            meanwhile = connections["revoked meanwhile"]
            meanwhile.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            assert meanwhile.execute("SELECT count(*) FROM spaces.secret").fetchone() == (8,)
            for space in (hub.get_space("secret"), hub.get_space("split")):
                space.revoke(names["revoked"])
                space.revoke(names["revoked meanwhile"])
        yield People(url, names, connections)
    drop_database(admin, database)
    for name in names.values():
        admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def fill(hub, names, name="secret"):
    """A space with secrets, and everybody's grants on it."""
    space = hub.create_space(name, 2)
    space.multiset(
        {f"hush_{i}": [77707, i] for i in range(5)} | {f"mine_{i}": [1, i] for i in range(3)}
    )
    space.multiset([(f"hush_{i}", [77707, i], {"note": "classified"}) for i in range(5)])
    space.multiset([(f"mine_{i}", [1, i], {"tenant": 42}) for i in range(3)])
    space.checkpoint("nightly")
    space.set("hush_1", [77707, 9])
    space.create_version("plan_b", from_version="v1")
    for kind in ("reader", "revoked", "group"):
        space.grant(names[kind], "read")
    space.grant(names["revoked meanwhile"], "admin")
    space.grant(names["writer"], "write")
    space.grant(names["admin"], "admin")
    space.grant(names["limited"], "read", rows={"tenant": 42})
    space.grant(names["limited writer"], "write", rows={"tenant": 42})
    space.grant(names["pinned"], "read", version="plan_b", rows={"tenant": 42})
    if name == "secret":
        hub.grant_create(names["maker"])
        hub.create_space("elsewhere", 2).set("elsewhere", [5, 5])
    return space


def split(boss, hub, names):
    """A space with partitions and sub-indexes, and the grants that the other one has."""
    boss.execute("SELECT ehub.create_space('split', 2, partition_by => 'tenant')")
    boss.execute(
        "INSERT INTO spaces.split SELECT key, embedding,"
        " jsonb_build_object('tenant', coalesce(metadata -> 'tenant', '43')) || metadata"
        " FROM spaces.secret"
    )
    boss.execute("SELECT ehub.create_index('split', 'own', '{\"tenant\": 42}')")
    boss.execute("SELECT ehub.create_index('elsewhere', 'own', '{\"elsewhere\": true}')")
    space = hub.get_space("split")
    for kind in ("reader", "revoked", "group"):
        space.grant(names[kind], "read")
    space.grant(names["revoked meanwhile"], "admin")
    space.grant(names["writer"], "write")
    space.grant(names["admin"], "admin")
    space.grant(names["limited"], "read", rows={"tenant": 42})
    space.grant(names["limited writer"], "write", rows={"tenant": 42})


def attempt(connection, statement, parameters=None):
    """Run a statement and undo it: what it said, and its error."""
    said = []
    connection.add_notice_handler(handler := lambda notice: said.append(notice.message_primary))
    try:
        with connection.transaction(force_rollback=True):
            cursor = connection.execute(statement, parameters)
            said += [str(row) for row in cursor.fetchall()] if cursor.description else []
        return "\n".join(said), None
    except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled):
        # It may, but for somebody's open transaction.
        return "\n".join(said), None
    except psycopg.Error as error:
        diag = error.diag
        said += [diag.message_primary, diag.message_detail, diag.message_hint, diag.context]
        return "\n".join(filter(None, said)), error
    finally:
        connection.remove_notice_handler(handler)


def check_silence(kind, said, what=""):
    for secret in SECRETS.get(kind, ELSEWHERE):
        assert secret not in said, (kind, what, said)


def test_every_function_has_a_rule(people):
    found = people.connections["superuser"].execute(
        "SELECT DISTINCT proname FROM pg_proc WHERE pronamespace = 'ehub'::regnamespace"
    )
    assert {name for (name,) in found} == FUNCTIONS.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(people, name):
    rule, *call = FUNCTIONS[name]
    for kind, connection in people.connections.items():
        allowed = connection.execute(
            "SELECT bool_or(has_function_privilege(oid, 'EXECUTE')) FROM pg_proc"
            " WHERE pronamespace = 'ehub'::regnamespace AND proname = %s",
            [name],
        ).fetchone()[0]
        if rule == INTERNAL:
            assert allowed == ("owner" in MAY[kind]), kind
            continue
        prepare = ""
        if name in ("merge_staged", "write_staged") and kind != "revoked meanwhile":
            prepare = "SELECT ehub.stage();"
        names = {kind: sql.Literal(name) for kind, name in people.names.items()}
        text = call[0]
        for word, name_of in names.items():
            text = text.replace(f"%({word})s", name_of.as_string(connection))
        statement = f"{prepare}SELECT t FROM {text} AS t"
        said, error = attempt(connection, statement)
        expected = call[1] if len(call) > 1 else None
        if name in ("require_read_committed", "attach") and kind == "revoked meanwhile":
            expected = "EH005"
        if rule in (ANYBODY, SILENT) or rule in MAY[kind]:
            assert (error and error.sqlstate) == expected, (kind, error)
        else:
            assert error is not None, (kind, said)
            assert error.sqlstate in ("42501", "22004", "EH001", "EH011"), (kind, said)
        check_silence(kind, said.replace("secret@plan_b", "").replace("'nightly'", ""), name)


def test_relations(people):
    boss = people.connections["superuser"]
    relations = boss.execute(
        "SELECT n.nspname, c.relname, c.relkind::text FROM pg_class AS c"
        " JOIN pg_namespace AS n ON n.oid = c.relnamespace"
        " WHERE n.nspname IN ('ehub', 'ehub_data', 'spaces') AND c.relkind IN ('r', 'v', 'S', 'm')"
    ).fetchall()
    versions = dict(
        boss.execute("SELECT 'v' || version_id, space || '@' || version FROM ehub.catalogue")
    )
    shown = {
        *("attached", "audit_trail", "catalogue", "checkpoints", "grants", "indexes"),
        *("kept_averages", "migration"),
        *("promotions", "setting", "status", "sub_indexes", "versions", "whoami"),
    }
    for schema, relation, relkind in relations:
        about = versions.get(relation, relation)
        for kind, connection in people.connections.items():
            may = MAY[kind]
            if relkind == "S" or (relation[0] == "h" and schema == "ehub_data"):
                reads = writes = "owner" in may
            elif schema == "ehub":
                reads, writes = relation in shown or "owner" in may, "owner" in may
            elif about.startswith("elsewhere"):
                reads = writes = "owner" in may
            elif about == "secret@plan_b":
                reads, writes = "version" in may, "write" in may
            else:
                reads, writes = "read" in may, "write" in may
            name = sql.Identifier(schema, relation)
            said, error = attempt(connection, sql.SQL("SELECT * FROM {}").format(name))
            assert (error is None) == reads, (kind, schema, relation, said)
            check_silence(kind, said.replace(relation, ""), relation)
            if relkind == "S":
                continue
            said, error = attempt(connection, sql.SQL("TRUNCATE {}").format(name))
            assert error is not None or "owner" in may, (kind, relation)
            for statement in ("DELETE FROM {}", "INSERT INTO {} DEFAULT VALUES"):
                said, error = attempt(connection, sql.SQL(statement).format(name))
                # A row without metadata is not within anybody's limits.
                refused = (
                    isinstance(error, psycopg.errors.InsufficientPrivilege)
                    and "row-level security" not in said
                )
                if schema != "ehub":
                    assert refused != writes or "owner" in may, (kind, relation, said)
                elif "owner" not in may:
                    assert error is not None
                check_silence(kind, said.replace(relation, ""), relation)
            said, _ = attempt(connection, sql.SQL("EXPLAIN SELECT * FROM {}").format(name))
            check_silence(kind, said.replace(relation, ""), relation)


def test_status_counts_for_who_asks(people):
    for kind, rows in (("limited", 3), ("reader", 8), ("pinned", 3), ("admin", 8)):
        counts = (
            people.connections[kind]
            .execute(
                "SELECT DISTINCT rows FROM ehub.status UNION SELECT DISTINCT rows FROM ehub.versions"
            )
            .fetchall()
        )
        assert counts == [(rows,)], kind
    for kind in ("stranger", "revoked", "revoked meanwhile", "maker"):
        for view in (
            *("status", "versions", "catalogue", "indexes", "sub_indexes", "checkpoints"),
            "promotions",
        ):
            found = people.connections[kind].execute(f"SELECT * FROM ehub.{view}").fetchall()
            assert found == [], (kind, view)


ASKED = {
    "nearest": f"ehub.nearest('split', {V}, 50, filter => %(filter)s)",
    "nearest_of_partition": f"ehub.nearest('split', {V}, 50, partition => '43')",
    "nearest_of_index": f"ehub.nearest('split', {V}, 50, index => 'own')",
    "nearest_exact": f"ehub.nearest_exact('split', {V}, 50, NULL, %(filter)s)",
    "nearest_to": "ehub.nearest_to('split', 'mine_1', 50, %(filter)s)",
    "nearest_many": f"ehub.nearest_many('split', ARRAY[{V}], 50, %(filter)s)",
    "nearest_like": "ehub.nearest_like('split', '{mine_1}', 50, filter => %(filter)s)",
    "within": f"ehub.within('split', {V}, 1e9, filter => %(filter)s)",
    "within_at_once": f"ehub.within('split', {V}, 1e9, filter => %(filter)s, complete => false)",
    "partitions": "ehub.partitions('split')",
    "sub_indexes": "ehub.sub_indexes",
    "indexes": "ehub.indexes",
    "explain": f"ehub.explain_nearest('split', {V}, 5, %(filter)s)",
}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_found_by_filters_and_partitions_is_for_who_asks(people, name):
    for wanted in ('{"note": "classified"}', '{"tenant": 43}', '{"not": {"tenant": 42}}'):
        statement = f"SELECT * FROM {ASKED[name]}".replace("%(filter)s", f"'{wanted}'")
        for kind, connection in people.connections.items():
            said, error = attempt(connection, statement)
            relation = name in ("sub_indexes", "indexes")
            assert (error is None) == ("read" in MAY[kind] or relation), (kind, error)
            # What was asked for is said again where nothing has it.
            check_silence(kind, said.replace(wanted, ""), name)
            if kind in ("limited", "limited writer") and name != "explain":
                assert "43" not in said, kind


def test_keys_of_others_are_unknown_to_examples_and_distances(people):
    for kind in ("limited", "limited writer"):
        for call in (
            "ehub.distance('secret', 'mine_1', 'hush_1')",
            "ehub.distances('secret', '{mine_1,hush_1}')",
            "ehub.nearest_like('secret', '{hush_1}', 3)",
            "ehub.nearest_like('secret', '{mine_1}', 3, '{hush_1}')",
            "ehub.nearest_to('split', 'hush_1', 3, '{\"tenant\": 42}')",
        ):
            _, error = attempt(people.connections[kind], f"SELECT * FROM {call}")
            _, other = attempt(
                people.connections[kind], f"SELECT * FROM {call.replace('hush_1', 'hush_x')}"
            )
            assert error.sqlstate == other.sqlstate == "EH008", (kind, call)
            assert error.diag.message_primary.replace("hush_1", "hush_x") == (
                other.diag.message_primary
            )


def test_a_limited_writer_drops_its_rows_of_a_partition_alone(people):
    writer = people.connections["limited writer"]
    _, error = attempt(writer, "SELECT ehub.drop_partition('split', '43')")
    _, other = attempt(writer, "SELECT ehub.drop_partition('split', '44')")
    assert error.sqlstate == other.sqlstate == "EH024"
    said, error = attempt(writer, "SELECT ehub.drop_partition('split', '42')")
    assert error is None
    assert said == "(3,)"


def test_a_forged_target_opens_nothing(people):
    boss = people.connections["superuser"]
    (row,) = boss.execute(
        "SELECT c::text FROM ehub.catalogue AS c WHERE c.space = 'elsewhere'"
    ).fetchone()
    target = f"{sql.Literal(row).as_string(boss)}::ehub.catalogue"
    for kind in ("stranger", "limited", "reader", "admin", "maker"):
        for call in (
            f"ehub.estimated_rows({target}, '{{\"a\": 1}}', NULL)",
            f"ehub.candidates_needed({target}, '{{\"a\": 1}}', NULL, 1, 1)",
            f"ehub.mean_of_examples({target}, '{{elsewhere}}', NULL)",
            f"ehub.nearest_of_batch({target}, ARRAY[{V}], 5, NULL, NULL, NULL)",
            f"ehub.filter_with_index({target}, NULL, 'own')",
        ):
            _, error = attempt(people.connections[kind], f"SELECT * FROM {call}")
            assert error is not None, (kind, call)
            assert error.sqlstate in ("42501", "EH001", "EH022"), (kind, error)


METHODS = {
    # method: what it takes, and a call
    "Hub": {
        "attach": None,
        "attached": (SILENT, lambda hub, space: hub.attached("pg_class", "oid")),
        "audit": (SILENT, lambda hub, space: hub.audit()),
        "close": None,
        "conninfo": None,
        "create_average": (
            "admin and create",
            lambda hub, space: hub.create_average("another", space, "tenant"),
        ),
        "create_space": ("create", lambda hub, space: hub.create_space("another", 2)),
        "delete_space": ("admin", lambda hub, space: hub.delete_space(space)),
        "detach": None,
        "doctor": ("owner", lambda hub, space: hub.doctor()),
        "get_space": ("read", lambda hub, space: hub.get_space(space)),
        "grant_create": ("owner", lambda hub, space: hub.grant_create("pg_monitor")),
        "grant_default": ("owner", lambda hub, space: hub.grant_default("pg_monitor", "read")),
        "grants": (SILENT, lambda hub, space: hub.grants()),
        "index": None,
        "kept_averages": (SILENT, lambda hub, space: hub.kept_averages()),
        "load_snapshot": None,
        "resolve": ("read", lambda hub, space: hub.resolve(space)),
        "revoke_create": ("owner", lambda hub, space: hub.revoke_create("pg_monitor")),
        "revoke_default": ("owner", lambda hub, space: hub.revoke_default("pg_monitor")),
        "roles": (SILENT, lambda hub, space: hub.roles()),
        "spaces": (SILENT, lambda hub, space: hub.spaces()),
        "status": (SILENT, lambda hub, space: hub.status()),
        "whoami": (SILENT, lambda hub, space: hub.whoami()),
    },
    "Space": {
        "M": None,
        "attached_to": None,
        "compare_with_pgvector": None,
        "at": ("whole", lambda space: list(space.at("nightly").items())),
        "audit": (SILENT, lambda space: space.audit()),
        "average": ("read", lambda space: space.average(["mine_1"])),
        "averages": ("read", lambda space: space.averages("tenant")),
        "checkpoint": ("admin", lambda space: space.checkpoint("now")),
        "checkpoints": ("read", lambda space: space.checkpoints()),
        "create_index": ("admin", lambda space: space.create_index("new", {"tenant": 42})),
        "create_version": ("admin", lambda space: space.create_version("v3")),
        "current": ("read", lambda space: space.current),
        "delete": ("write", lambda space: space.delete("mine_1")),
        "delete_all": ("write", lambda space: space.delete_all()),
        "diff": ("read", lambda space: space.diff("v1", "plan_b", k=2)),
        "dims": None,
        "distance": ("read", lambda space: space.distance("mine_1", "mine_2")),
        "distances": ("read", lambda space: space.distances(["mine_1", "mine_2"])),
        "download_snapshot": (
            "read",
            lambda space: list(space.download_snapshot().items(metadata=True)),
        ),
        "drop_checkpoint": ("admin", lambda space: space.drop_checkpoint("nightly")),
        "drop_index": (
            "admin",
            lambda space: (space.create_index("newer", {"tenant": 42}), space.drop_index("newer")),
        ),
        # It has no partitions; ehub.partitions and ehub.drop_partition are tried where there are.
        "drop_partition": ("read", lambda space: refused(space.drop_partition, "42")),
        "drop_version": ("admin", lambda space: space.drop_version("plan_b")),
        "ef_construction": None,
        "explain_nearest": (
            "read",
            lambda space: space.explain_nearest(9, vector=[1, 0], filter={"note": "x"}),
        ),
        "freeze": ("admin", lambda space: space.freeze()),
        "frozen": ("read", lambda space: space.frozen),
        "get": ("read", lambda space: space.get("mine_1")),
        "grant": ("admin", lambda space: space.grant("pg_monitor", "read")),
        "grants": (SILENT, lambda space: space.grants()),
        "history": ("read", lambda space: space.history()),
        "indexes": ("read", lambda space: space.indexes()),
        "items": ("read", lambda space: list(space.items(metadata=True))),
        "keep_warm": ("admin", lambda space: space.keep_warm()),
        "keys": ("read", lambda space: list(space.keys())),
        "metadata": ("read", lambda space: space.metadata("mine_1")),
        "metric": None,
        "multi_nearest_neighbors": (
            "read",
            lambda space: space.multi_nearest_neighbors(9, vectors=[[1, 0]], metadata=True),
        ),
        "multidelete": ("write", lambda space: space.multidelete(["mine_1"])),
        "multiget": ("read", lambda space: space.multiget(["mine_1", "mine_2"])),
        "multiset": ("write", lambda space: space.multiset([("mine_1", [1, 1], {"tenant": 42})])),
        "name": None,
        "nearest_neighbors": (
            "read",
            lambda space: (
                space.nearest_neighbors(9, vector=[1, 0], metadata=True),
                space.nearest_neighbors(9, like=["mine_1"], unlike=["mine_2"], metadata=True),
                space.nearest_neighbors(9, key="mine_1", filter={"tenant": {"exists": True}}),
            ),
        ),
        "nearest_neighbors_of_all": ("read", lambda space: list(space.nearest_neighbors_of_all(9))),
        "partition_by": None,
        "partitions": ("read", lambda space: refused(space.partitions)),
        "promote": ("admin", lambda space: space.promote("plan_b")),
        "restore": ("admin", lambda space: space.restore("nightly")),
        "revoke": ("admin", lambda space: space.revoke("pg_read_all_settings")),
        "rollback": (
            "admin",
            lambda space: (space.promote("plan_b"), space.rollback()),
        ),
        "set": ("write", lambda space: space.set("mine_1", [1, 1], {"tenant": 42})),
        "target_recall": None,
        "version": ("read", lambda space: space.version("plan_b")),
        "versions": ("read", lambda space: space.versions()),
        "wait_until_indexed": None,
        "within": ("read", lambda space: space.within(1e9, vector=[1, 0], metadata=True)),
    },
}


def refused(call, *values):
    with pytest.raises(ehub.InvalidValueError, match="no partitions"):
        call(*values)


def test_every_method_has_a_rule():
    for kind in (ehub.Hub, ehub.Space):
        public = {name for name, _ in inspect.getmembers(kind) if not name.startswith("_")}
        assert public == METHODS[kind.__name__].keys(), kind
    # A version has what a space has, and nothing of its own that asks for rights.
    own = {name for name in vars(ehub.Version) if not name.startswith("_")}
    assert own == {"current", "name", "of", "rows", "space"}


@pytest.mark.parametrize(
    "kind",
    [k for k in MAY if k not in ("superuser", "as another", "revoked meanwhile", "pinned")],
)
def test_methods(people, kind):
    conninfo = make_conninfo(people.url, user=people.names[kind], password="x")
    owner = make_conninfo(people.url, user=people.names["owner"], password="x")
    with ehub.connect(owner, index="none") as boss, ehub.connect(conninfo, index="none") as hub:
        furnished = False
        for cls, methods in METHODS.items():
            for name, rule in methods.items():
                if rule is None:
                    continue
                level, call = rule
                if not furnished:
                    furnish(boss, people.names)
                try:
                    said = repr(call(hub, "mine") if cls == "Hub" else call(hub.get_space("mine")))
                except ehub.EhubError as error:
                    said = str(error)
                    may = level in MAY[kind] or (cls == "Hub" and level == SILENT)
                    known = isinstance(error, ehub.SpaceNotFoundError | ehub.AccessDeniedError)
                    assert known and not may, (name, error)  # noqa: PT017 - any may come
                    furnished = True
                else:
                    assert level in MAY[kind] or level == SILENT, (name, said)
                    furnished = level in ("read", "whole", SILENT)
                check_silence(kind, said.replace("'nightly'", ""), name)
        clear(boss)


def furnish(boss, names):
    """A space to do things to, and what there is to revoke."""
    clear(boss)
    fill(boss, names, "mine")
    boss.get_space("mine").grant("pg_read_all_settings", "read")
    boss.get_space("mine").revoke(names["revoked"])
    boss.grant_create("pg_monitor")
    boss.grant_default("pg_monitor", "read")


def clear(boss):
    for gone in ("another", "mine"):
        with contextlib.suppress(ehub.SpaceNotFoundError):
            boss.delete_space(gone)
    for undo in (boss.revoke_create, boss.revoke_default):
        with contextlib.suppress(ehub.GrantNotFoundError):
            undo("pg_monitor")
