/*
 * The shortest way from a search of ehub to its index service.
 *
 * A backend keeps one connection. A question goes out with the bytes of its vectors, the answer comes
 * back as keys; both have their size before them, and numbers as this machine writes them. The wait for
 * it ends with the answer, with the deadline of the caller, or with a cancelled statement.
 *
 * The service is not trusted. What it sends is read piece by piece into memory that grows with what has
 * really come, never beyond what the question allows; every number is checked before it is used; and
 * whatever is wrong with it is a reason that is returned, not an error. A connection on which a question
 * was not answered to its end is never used again.
 *
 * Both sides prove that they know the secret, without sending it:
 *
 *	database: MAGIC, the float 1.0, 32 random bytes c
 *	service:  32 random bytes s, HMAC-SHA-256(secret, "service" c s)
 *	database: HMAC-SHA-256(secret, "database" c s), then questions
 */
#include "postgres.h"

#include <arpa/inet.h>
#include <math.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "commands/defrem.h"
#include "common/hmac.h"
#include "common/sha2.h"
#include "fmgr.h"
#include "foreign/foreign.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "storage/latch.h"
#if PG_VERSION_NUM >= 180000
#include "storage/waiteventset.h"
#endif
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#if PG_VERSION_NUM < 190000
/* The number of a cache of catalogue rows. */
#define SyscacheId int
#endif

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(ehub_link_ask);
PG_FUNCTION_INFO_V1(ehub_link_recall);
PG_FUNCTION_INFO_V1(ehub_link_remember);
PGDLLEXPORT void _PG_init(void);

#define MAGIC "EHUBLNK1"
#define SERVER "ehub_service"
#define NONCE_BYTES 32
#define PROOF_BYTES PG_SHA256_DIGEST_LENGTH
/* So much comes back for a question at most, whatever it asks for. */
#define MOST_BYTES (256 * 1024 * 1024)
/* The first piece of an answer; most are whole with it. */
#define PIECE_BYTES 8192
#define REASON_BYTES 1000
/* Where rows have to match, the service looks among more that are near: see ehub/replica/filters.py. */
#define KEYS_NEAR 1000
#define KEYS_FOR_EACH 20
#define KEY_BYTES 1024

/* As pgvector keeps it, of one dimension's count and that many numbers. */
typedef struct
{
	int32		vl_len_;
	int16		dim;
	int16		unused;
	float		x[FLEXIBLE_ARRAY_MEMBER];
} Vector;

typedef struct
{
	uint64		nonce;
	int64		index_id;
	int32		n;
	int32		k;
	int32		ef;
	int32		dims;
	int32		state_bytes;
	int32		filter_bytes;	/* -1: none */
	int32		partition_bytes;	/* -1: none */
	int32		unused;
} Question;

typedef struct
{
	uint64		nonce;
	int32		refused;		/* then the rest is the reason */
	int32		matching;
	int32		watermark_bytes;
	int32		plan_bytes;
} Answer;

/* The connection of this backend. `asking` from the first byte of a question to the last of its answer. */
static pgsocket link_socket = PGINVALID_SOCKET;
static WaitEventSet *link_events = NULL;
static int	link_wanted = 0;
static bool link_asking = false;
static bool link_stale = false;
static Oid	link_role = InvalidOid;
static uint64 link_nonce = 0;

/*
 * What a role's searches of a space were told of it, as long as nothing of that has changed: which version
 * it is, which index has its rows, and what that must be as of. It is read from the catalogues, from tables
 * that change along with them, and by rights that are in them; so it holds until Postgres tells this
 * backend that one of the relations that it depends on has changed, or any role or schema.
 */
#define SPACES 16
#define SPACE_BYTES 160
#define STATE_BYTES 160
#define RELATIONS 32

typedef struct
{
	bool		holds;
	bool		attached;
	Oid			role;
	int64		version_id;
	int64		index_id;
	int			relations;
	Oid			relation[RELATIONS];
	char		space[SPACE_BYTES];
	char		state[STATE_BYTES];
} Remembered;

static Remembered remembered[SPACES];
static int	oldest = 0;
/* How often something has changed; and at the last question for what is not remembered. */
static uint64 changes = 0;
static uint64 changes_then = 0;

static void
relation_changed(Datum arg, Oid relation)
{
	changes++;
	for (int i = 0; i < SPACES; i++)
		for (int j = 0; j < remembered[i].relations; j++)
			if (relation == InvalidOid || relation == remembered[i].relation[j])
				remembered[i].holds = false;
}

static void
catalogue_changed(Datum cache, SyscacheId changed, uint32 hash)
{
	relation_changed((Datum) 0, InvalidOid);
	if (changed == FOREIGNSERVEROID || changed == USERMAPPINGOID)
		link_stale = true;
}

void
_PG_init(void)
{
	static const SyscacheId watched[] = {
		AUTHMEMMEMROLE, AUTHOID, FOREIGNSERVEROID, NAMESPACEOID, USERMAPPINGOID
	};

	CacheRegisterRelcacheCallback(relation_changed, (Datum) 0);
	for (int i = 0; i < lengthof(watched); i++)
		CacheRegisterSyscacheCallback(watched[i], catalogue_changed, (Datum) 0);
}

static void
hang_up(void)
{
	if (link_events != NULL)
		FreeWaitEventSet(link_events);
	link_events = NULL;
	if (link_socket != PGINVALID_SOCKET)
	{
		closesocket(link_socket);
		ReleaseExternalFD();
	}
	link_socket = PGINVALID_SOCKET;
	link_asking = false;
}

/* Wait until the socket can be read or written; false when the time is over. */
static bool
await(int wanted, TimestampTz deadline)
{
	if (wanted != link_wanted)
		ModifyWaitEvent(link_events, 2, wanted, NULL);
	link_wanted = wanted;
	for (;;)
	{
		long		left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), deadline);
		WaitEvent	event;

		if (left <= 0)
			return false;
		if (WaitEventSetWait(link_events, left, &event, 1, PG_WAIT_EXTENSION) == 0)
			continue;
		if (event.events & WL_LATCH_SET)
		{
			ResetLatch(MyLatch);
			CHECK_FOR_INTERRUPTS();
		}
		else if (event.events & WL_SOCKET_MASK)
			return true;
	}
}

/* Send so many bytes; NULL, or why not. */
static const char *
send_all(const char *data, size_t size, TimestampTz deadline)
{
	while (size > 0)
	{
		ssize_t		sent = send(link_socket, data, size, MSG_NOSIGNAL);

		if (sent >= 0)
		{
			data += sent;
			size -= sent;
		}
		else if (errno == EAGAIN || errno == EWOULDBLOCK)
		{
			if (!await(WL_SOCKET_WRITEABLE, deadline))
				return "it takes no questions";
		}
		else if (errno != EINTR)
			return psprintf("%m");
	}
	return NULL;
}

/* Receive at least `needed` bytes, at most `room`; sets how many there are. NULL, or why not. */
static const char *
receive(char *data, size_t needed, size_t room, size_t *size, TimestampTz deadline)
{
	*size = 0;
	while (*size < needed)
	{
		ssize_t		got;

		/* It has not come yet, most likely: waiting first saves a call that says so. */
		if (!await(WL_SOCKET_READABLE, deadline))
			return "no answer in time";
		got = recv(link_socket, data + *size, room - *size, 0);
		if (got > 0)
			*size += got;
		else if (got == 0)
			return "it has hung up";
		else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
			return psprintf("%m");
	}
	return NULL;
}

static char *
option(List *options, const char *name)
{
	ListCell   *cell;

	foreach(cell, options)
	{
		DefElem    *def = (DefElem *) lfirst(cell);

		if (strcmp(def->defname, name) == 0)
			return defGetString(def);
	}
	return NULL;
}

/*
 * Where the service is, and the secret that this role shares with it. False where the link is not for that:
 * ehub.link_problem says why.
 */
static bool
read_address(char **host, char **port, char **secret)
{
	ForeignServer *server = GetForeignServerByName(SERVER, true);
	UserMapping *mapping;
	char	   *sslmode;

	if (server == NULL || GetDatabaseEncoding() != PG_UTF8 ||
		!SearchSysCacheExists2(USERMAPPINGUSERSERVER, ObjectIdGetDatum(GetUserId()),
							   ObjectIdGetDatum(server->serverid)))
		return false;
	mapping = GetUserMapping(GetUserId(), server->serverid);
	*host = option(server->options, "host");
	*port = option(server->options, "port");
	*secret = option(mapping->options, "password");
	sslmode = option(server->options, "sslmode");
	return *host != NULL && *port != NULL && *secret != NULL &&
		sslmode != NULL && strcmp(sslmode, "disable") == 0;
}

/* Connect to one address; NULL, or why not. */
static const char *
connect_to(const struct sockaddr *address, socklen_t size, TimestampTz deadline)
{
	int			error = 0;
	socklen_t	error_size = sizeof(error);
	int			on = 1;

	if (!AcquireExternalFD())
		return "this server has too many files open";
	link_socket = socket(address->sa_family, SOCK_STREAM, 0);
	if (link_socket == PGINVALID_SOCKET)
	{
		ReleaseExternalFD();
		return psprintf("%m");
	}
	if (!pg_set_noblock(link_socket) || fcntl(link_socket, F_SETFD, FD_CLOEXEC) < 0)
		return psprintf("%m");
	if (address->sa_family != AF_UNIX &&
		setsockopt(link_socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) < 0)
		return psprintf("%m");
	if (connect(link_socket, address, size) < 0 && errno != EINPROGRESS && errno != EINTR)
		return psprintf("%m");
#if PG_VERSION_NUM >= 170000
	link_events = CreateWaitEventSet(NULL, 3);
#else
	link_events = CreateWaitEventSet(TopMemoryContext, 3);
#endif
	AddWaitEventToSet(link_events, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(link_events, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	link_wanted = WL_SOCKET_WRITEABLE;
	AddWaitEventToSet(link_events, link_wanted, link_socket, NULL, NULL);
	if (!await(WL_SOCKET_WRITEABLE, deadline))
		return "no connection in time";
	if (getsockopt(link_socket, SOL_SOCKET, SO_ERROR, &error, &error_size) < 0)
		return psprintf("%m");
	errno = error;
	return error == 0 ? NULL : psprintf("%m");
}

static const char *
prove(const char *secret, const char *who, const char *nonces, uint8 *proof)
{
	pg_hmac_ctx *hmac = pg_hmac_create(PG_SHA256);
	const char *problem = NULL;

	if (hmac == NULL || pg_hmac_init(hmac, (const uint8 *) secret, strlen(secret)) < 0 ||
		pg_hmac_update(hmac, (const uint8 *) who, strlen(who)) < 0 ||
		pg_hmac_update(hmac, (const uint8 *) nonces, 2 * NONCE_BYTES) < 0 ||
		pg_hmac_final(hmac, proof, PROOF_BYTES) < 0)
		problem = "HMAC-SHA-256 cannot be computed";
	if (hmac != NULL)
		pg_hmac_free(hmac);
	return problem;
}

/* Show that one knows the secret, to a service that does. NULL, or why not. */
static const char *
shake_hands(const char *secret, TimestampTz deadline)
{
	char		hello[sizeof(MAGIC) - 1 + sizeof(float) + NONCE_BYTES] = MAGIC;
	char		answer[NONCE_BYTES + PROOF_BYTES];
	char		nonces[2 * NONCE_BYTES];
	uint8		proof[PROOF_BYTES];
	float		one = 1.0f;
	uint8		differs = 0;
	size_t		size;
	const char *problem;

	if (!pg_strong_random(nonces, NONCE_BYTES))
		return "no random numbers are to be had";
	memcpy(hello + sizeof(MAGIC) - 1, &one, sizeof(one));
	memcpy(hello + sizeof(hello) - NONCE_BYTES, nonces, NONCE_BYTES);
	if ((problem = send_all(hello, sizeof(hello), deadline)) != NULL ||
		(problem = receive(answer, sizeof(answer), sizeof(answer), &size, deadline)) != NULL)
		return problem;
	memcpy(nonces + NONCE_BYTES, answer, NONCE_BYTES);
	if ((problem = prove(secret, "service", nonces, proof)) != NULL)
		return problem;
	for (int i = 0; i < PROOF_BYTES; i++)
		differs |= proof[i] ^ (uint8) answer[NONCE_BYTES + i];
	if (differs)
		return "whoever listens there does not know the secret";
	if ((problem = prove(secret, "database", nonces, proof)) != NULL)
		return problem;
	return send_all((char *) proof, sizeof(proof), deadline);
}

/* Connect to the service; NULL, or why not. */
static const char *
link_up(const char *host, const char *port, const char *secret, TimestampTz deadline)
{
	const char *problem = NULL;

	if (host[0] == '/')
	{
		struct sockaddr_un address = {.sun_family = AF_UNIX};

		if (snprintf(address.sun_path, sizeof(address.sun_path), "%s/.s.PGSQL.%s", host, port) >=
			(int) sizeof(address.sun_path))
			return "the path of its socket is too long";
		problem = connect_to((struct sockaddr *) &address, sizeof(address), deadline);
	}
	else
	{
		struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
		struct addrinfo *found;
		int			error = getaddrinfo(host, port, &hints, &found);

		if (error != 0)
			return gai_strerror(error);
		/* One that does not exist on this machine must not keep the next from being tried. */
		PG_TRY();
		{
			for (struct addrinfo *one = found; one != NULL; one = one->ai_next)
			{
				problem = connect_to(one->ai_addr, one->ai_addrlen, deadline);
				if (problem == NULL || one->ai_next == NULL)
					break;
				hang_up();
			}
		}
		PG_FINALLY();
		{
			freeaddrinfo(found);
		}
		PG_END_TRY();
	}
	return problem == NULL ? shake_hands(secret, deadline) : problem;
}

/* Receive what comes for a question, in memory of its own; NULL, or why not. */
static const char *
receive_answer(uint64 most, char **answer, uint32 *size, TimestampTz deadline)
{
	size_t		room = PIECE_BYTES;
	char	   *data = palloc(room);
	size_t		have;
	const char *problem = receive(data, sizeof(uint32), room, &have, deadline);

	if (problem != NULL)
		return problem;
	memcpy(size, data, sizeof(uint32));
	if (*size < sizeof(Answer) || *size > most)
		return "an answer of a size that cannot be";
	while (have < sizeof(uint32) + *size)
	{
		size_t		more;

		if (have == room)
		{
			room *= 2;
			data = repalloc_huge(data, room);
		}
		problem = receive(data + have, 1, room - have, &more, deadline);
		if (problem != NULL)
			return problem;
		have += more;
	}
	if (have > sizeof(uint32) + *size)
		return "more than an answer";
	*answer = data + sizeof(uint32);
	return NULL;
}

/* Whether a text is what pg_snapshot_in reads without an error: xmin:xmax:running,running,… */
static bool
is_snapshot(const char *text)
{
	uint64		numbers[2] = {0, 0};
	uint64		last = 0;
	int			field = 0;

	for (;;)
	{
		uint64		number = 0;
		int			digits = 0;

		for (; *text >= '0' && *text <= '9'; text++, digits++)
			number = number * 10 + (*text - '0');
		if (digits > 18 || (digits == 0 && !(field == 2 && *text == '\0')))
			return false;
		if (field < 2)
		{
			numbers[field++] = number;
			if (*text++ != ':')
				return false;
			if (field == 2 && (numbers[0] < 3 || numbers[0] > numbers[1]))
				return false;
			continue;
		}
		if (digits > 0)
		{
			if (number < numbers[0] || number >= numbers[1] || number <= last)
				return false;
			last = number;
		}
		if (*text == '\0')
			return true;
		if (digits == 0 || *text++ != ',' || *text == '\0')
			return false;
	}
}

static const char *const unfit = "an answer that does not fit together";

/* Read an answer into the columns of ehub.link_ask; NULL, or what is wrong with it. */
static const char *
read_answer(const char *data, uint32 size, const Question *asked, Datum *values, bool *nulls)
{
	Answer		head;
	const char *end = data + size;
	const char *rest = data + sizeof(Answer);
	uint64		total = 0;
	uint64		bytes;
	Datum	   *datums;
	char	   *watermark;

	memcpy(&head, data, sizeof(head));
	if (head.nonce != asked->nonce)
		return "the answer to another question";
	if (head.refused)
	{
		if (rest == end || end - rest > REASON_BYTES ||
			!pg_verify_mbstr(PG_UTF8, rest, end - rest, true))
			return unfit;
		values[1] = PointerGetDatum(cstring_to_text_with_len(rest, end - rest));
		nulls[1] = false;
		return NULL;
	}
	/* The counts, one for each query; then as many lengths as they count. */
	if ((uint64) (end - rest) < (uint64) asked->n * sizeof(int32))
		return unfit;
	datums = palloc_extended(asked->n * sizeof(Datum), MCXT_ALLOC_HUGE);
	for (int i = 0; i < asked->n; i++, rest += sizeof(int32))
	{
		int32		count;

		memcpy(&count, rest, sizeof(count));
		if (count < 0 || count > KEYS_NEAR + KEYS_FOR_EACH * (int64) asked->k)
			return unfit;
		datums[i] = Int32GetDatum(count);
		total += count;
	}
	if (total > (uint64) (end - rest) / sizeof(int32) ||
		head.watermark_bytes < 0 || head.plan_bytes < 0)
		return unfit;
	values[3] = PointerGetDatum(construct_array(datums, asked->n, INT4OID, 4, true, TYPALIGN_INT));
	datums = palloc_extended(Max(total, 1) * sizeof(Datum), MCXT_ALLOC_HUGE);
	bytes = (uint64) head.watermark_bytes + head.plan_bytes;
	{
		const char *lengths = rest;
		const char *keys = rest + total * sizeof(int32);
		const char *start = keys;

		for (uint64 i = 0; i < total; i++)
		{
			int32		length;

			memcpy(&length, lengths + i * sizeof(int32), sizeof(length));
			if (length < 0 || length > end - keys)
				return unfit;
			datums[i] = PointerGetDatum(cstring_to_text_with_len(keys, length));
			keys += length;
		}
		if (!pg_verify_mbstr(PG_UTF8, start, keys - start, true) || (uint64) (end - keys) != bytes)
			return unfit;
		rest = keys;
	}
	for (uint64 i = 0; i < total; i++)
	{
		/* A character that begins in one key and ends in the next is in neither. */
		text	   *key = DatumGetTextPP(datums[i]);

		if (VARSIZE_ANY_EXHDR(key) > 0 && ((uint8) VARDATA_ANY(key)[0] & 0xC0) == 0x80)
			return unfit;
	}
	watermark = pnstrdup(rest, head.watermark_bytes);
	rest += head.watermark_bytes;
	if (strlen(watermark) != head.watermark_bytes || !is_snapshot(watermark) ||
		!pg_verify_mbstr(PG_UTF8, rest, head.plan_bytes, true))
		return unfit;
	values[2] = DirectFunctionCall1(pg_snapshot_in, CStringGetDatum(watermark));
	values[4] = PointerGetDatum(construct_array(datums, total, TEXTOID, -1, false, TYPALIGN_INT));
	values[5] = PointerGetDatum(cstring_to_text_with_len(rest, head.plan_bytes));
	values[6] = BoolGetDatum(head.matching != 0);
	memset(nulls + 2, false, 5);
	return NULL;
}

static text *
optional(FunctionCallInfo fcinfo, int argument)
{
	return PG_ARGISNULL(argument) ? NULL : PG_GETARG_TEXT_PP(argument);
}

static void
append(StringInfo buffer, text *given, int32 *bytes)
{
	*bytes = -1;
	if (given != NULL)
	{
		*bytes = VARSIZE_ANY_EXHDR(given);
		appendBinaryStringInfo(buffer, VARDATA_ANY(given), *bytes);
	}
}

/* Write a question, its size before it, into a buffer. */
static void
write_question(StringInfo buffer, Question *asked, text *state, text *filter, text *partition,
			   ArrayType *queries)
{
	Datum	   *elements;
	bool	   *nulls;
	uint32		size;

	deconstruct_array(queries, ARR_ELEMTYPE(queries), -1, false, TYPALIGN_INT, &elements, &nulls,
					  &asked->n);
	initStringInfo(buffer);
	appendStringInfoSpaces(buffer, sizeof(size) + sizeof(Question));
	append(buffer, state, &asked->state_bytes);
	append(buffer, filter, &asked->filter_bytes);
	append(buffer, partition, &asked->partition_bytes);
	for (int i = 0; i < asked->n; i++)
	{
		Vector	   *one;

		if (nulls[i])
			ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("a query is NULL")));
		one = (Vector *) PG_DETOAST_DATUM(elements[i]);
		if (i == 0)
			asked->dims = one->dim;
		if (one->dim != asked->dims)
			ereport(ERROR, (errcode(ERRCODE_ARRAY_SUBSCRIPT_ERROR),
							errmsg("the queries have different numbers of dims")));
		appendBinaryStringInfo(buffer, (char *) one->x, sizeof(float) * one->dim);
	}
	size = buffer->len - sizeof(size);
	memcpy(buffer->data, &size, sizeof(size));
	memcpy(buffer->data + sizeof(size), asked, sizeof(Question));
}

/* Ask once, by a connection that may be an old one; NULL, or why there is no answer. */
static const char *
ask(StringInfo question, const Question *asked, TimestampTz deadline, Datum *values, bool *nulls)
{
	uint64		keys = (uint64) asked->n * (KEYS_NEAR + KEYS_FOR_EACH * (uint64) asked->k);
	uint64		most = Min(MOST_BYTES, PIECE_BYTES + keys * KEY_BYTES);
	char	   *answer;
	uint32		size;
	const char *problem;

	link_asking = true;
	if ((problem = send_all(question->data, question->len, deadline)) == NULL &&
		(problem = receive_answer(most, &answer, &size, deadline)) == NULL &&
		(problem = read_answer(answer, size, asked, values, nulls)) == NULL)
		link_asking = false;
	else
		hang_up();
	return problem;
}

static Datum
row(FunctionCallInfo fcinfo, Datum *values, bool *nulls)
{
	TupleDesc	columns;

	if (get_call_result_type(fcinfo, NULL, &columns) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "a function of ehub_link was declared in another way than its SQL file does");
	return HeapTupleGetDatum(heap_form_tuple(columns, values, nulls));
}

Datum
ehub_link_ask(PG_FUNCTION_ARGS)
{
	Question	asked = {0};
	StringInfoData question;
	TimestampTz deadline;
	Datum		values[7] = {0};
	bool		nulls[7] = {true, true, true, true, true, true, true};
	const char *problem = NULL;
	bool		is_old;

	for (int i = 0; i < 8; i++)
		if (PG_ARGISNULL(i) && i != 4 && i != 5)
			PG_RETURN_DATUM(row(fcinfo, values, nulls));

	/* Messages that tell of another address or secret were processed before this is called. */
	if (link_asking || link_stale || link_role != GetUserId())
		hang_up();
	asked.index_id = PG_GETARG_INT64(1);
	asked.k = PG_GETARG_INT32(2);
	asked.ef = PG_GETARG_INT32(3);
	if (link_nonce == 0 && !pg_strong_random(&link_nonce, sizeof(link_nonce)))
		PG_RETURN_DATUM(row(fcinfo, values, nulls));
	asked.nonce = ++link_nonce;
	write_question(&question, &asked, PG_GETARG_TEXT_PP(0), optional(fcinfo, 4), optional(fcinfo, 5),
				   PG_GETARG_ARRAYTYPE_P(6));
	if (asked.n < 1 || asked.k < 1)
		PG_RETURN_DATUM(row(fcinfo, values, nulls));
	deadline = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), PG_GETARG_INT32(7));

	is_old = link_socket != PGINVALID_SOCKET;
	if (is_old)
		problem = ask(&question, &asked, deadline, values, nulls);
	if (!is_old || (problem != NULL && GetCurrentTimestamp() < deadline))
	{
		char	   *host;
		char	   *port;
		char	   *secret;

		link_stale = false;
		link_role = GetUserId();
		if (!read_address(&host, &port, &secret))
			PG_RETURN_DATUM(row(fcinfo, values, nulls));
		/* Until it is up it is nothing to be used by the next search. */
		link_asking = true;
		if ((problem = link_up(host, port, secret, deadline)) == NULL)
			problem = ask(&question, &asked, deadline, values, nulls);
		else
			hang_up();
	}
	if (problem != NULL)
	{
		memset(nulls, true, sizeof(nulls));
		values[0] = PointerGetDatum(cstring_to_text(problem));
		nulls[0] = false;
	}
	PG_RETURN_DATUM(row(fcinfo, values, nulls));
}

Datum
ehub_link_recall(PG_FUNCTION_ARGS)
{
	text	   *space = PG_GETARG_TEXT_PP(0);
	Datum		values[4] = {0};
	bool		nulls[4] = {true, true, true, true};

	for (int i = 0; i < SPACES; i++)
	{
		Remembered *one = &remembered[i];

		if (!one->holds || one->role != PG_GETARG_OID(1) ||
			strlen(one->space) != VARSIZE_ANY_EXHDR(space) ||
			memcmp(one->space, VARDATA_ANY(space), VARSIZE_ANY_EXHDR(space)) != 0)
			continue;
		values[0] = Int64GetDatum(one->version_id);
		values[1] = Int64GetDatum(one->index_id);
		values[2] = PointerGetDatum(cstring_to_text(one->state));
		values[3] = BoolGetDatum(one->attached);
		memset(nulls, false, sizeof(nulls));
		PG_RETURN_DATUM(row(fcinfo, values, nulls));
	}
	changes_then = changes;
	PG_RETURN_DATUM(row(fcinfo, values, nulls));
}

Datum
ehub_link_remember(PG_FUNCTION_ARGS)
{
	char	   *space = text_to_cstring(PG_GETARG_TEXT_PP(0));
	char	   *state = text_to_cstring(PG_GETARG_TEXT_PP(4));
	Remembered *one = &remembered[oldest];
	Datum	   *relations;
	bool	   *nulls;
	int			count;

	deconstruct_array(PG_GETARG_ARRAYTYPE_P(6), OIDOID, sizeof(Oid), true, TYPALIGN_INT,
					  &relations, &nulls, &count);
	if (changes != changes_then || count > RELATIONS ||
		strlen(space) >= SPACE_BYTES || strlen(state) >= STATE_BYTES)
		PG_RETURN_VOID();
	one->relations = 0;
	for (int i = 0; i < count; i++)
		if (!nulls[i])
			one->relation[one->relations++] = DatumGetObjectId(relations[i]);
	one->role = PG_GETARG_OID(1);
	one->version_id = PG_GETARG_INT64(2);
	one->index_id = PG_GETARG_INT64(3);
	one->attached = PG_GETARG_BOOL(5);
	strcpy(one->space, space);
	strcpy(one->state, state);
	one->holds = true;
	oldest = (oldest + 1) % SPACES;
	PG_RETURN_VOID();
}
