-- Throttled tasks: no more starts in any minute, and no more runs at once, than their limits allow, whatever the number of
-- workers.
--
-- throttles        the limits of each task that has any, or ever had: what counts is here, not what some worker's code says
-- throttled        a job that may run but for the limits of its task: the fifth place where a job can be that is not finished.
--                  An enqueue puts it there at once; one that comes to ready otherwise is moved by the claim that meets it
-- claims.task      of a throttled job: how many of a task run is how many claims it has, so there is no number that could leak
-- throttle_starts  how many runs were let go when, of a task with a rate, for as long as that counts
--
-- Whoever gives out runs of a task has its row of throttles locked from before he counts until he commits.

CREATE TABLE roost.throttles (
    task            text        COLLATE "C" PRIMARY KEY CHECK (char_length(task) BETWEEN 1 AND 128),
    rate_per_minute integer     CHECK (rate_per_minute >= 1),
    max_concurrency integer     CHECK (max_concurrency >= 1),
    -- Of a task that has lost its limits the row stays: an enqueue that has yet to commit may have seen them, and put its job
    -- where nobody would look.
    limited         boolean     NOT NULL GENERATED ALWAYS AS (rate_per_minute IS NOT NULL OR max_concurrency IS NOT NULL) STORED,
    limited_since   timestamptz NOT NULL DEFAULT clock_timestamp(),
    counted         boolean     NOT NULL DEFAULT false  -- no claim is left from before it was limited, which doesn't name its task
);

CREATE TABLE roost.throttled (
    task         text        COLLATE "C" NOT NULL,
    queue        text        COLLATE "C" NOT NULL,
    priority     integer     NOT NULL,
    scheduled_at timestamptz NOT NULL,
    job_id       bigint      NOT NULL,
    PRIMARY KEY (task, queue, priority, scheduled_at, job_id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000, autovacuum_vacuum_cost_delay = 0);

CREATE TABLE roost.throttle_starts (
    task   text        COLLATE "C" NOT NULL,
    at     timestamptz NOT NULL,  -- rounded up to a tenth of a second: 611 rows say what a task of any rate did in 61 s
    starts integer     NOT NULL,
    PRIMARY KEY (task, at)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

ALTER TABLE roost.claims ADD COLUMN task text COLLATE "C";
CREATE INDEX claims_of_throttled_tasks ON roost.claims (task) WHERE task IS NOT NULL;

-- How many more runs of the task may start now, and where it is time alone that makes room, in how many seconds it does.
-- The caller has locked the row. window_seconds: for how long a start counts, which is longer than a minute, see claim_throttled.
CREATE FUNCTION roost.throttle_room(throttle roost.throttles, window_seconds float8, OUT room integer, OUT next_in_seconds float8)
LANGUAGE plpgsql AS $$
DECLARE
    -- A claim that began before the limits were there may take jobs as if there were none. It has ended by then.
    pause    interval := '1 second';
    running  bigint;
    unnamed  bigint := 0;
    started  bigint;
    first_at timestamptz;
BEGIN
    room := 0;
    IF throttle.limited_since > now() - pause THEN
        next_in_seconds := extract(epoch FROM throttle.limited_since + pause - now());
        RETURN;
    END IF;
    room := 2147483647;
    IF throttle.max_concurrency IS NOT NULL THEN
        SELECT count(*) INTO running FROM roost.claims c WHERE c.task = throttle.task;
        IF NOT throttle.counted THEN
            SELECT count(*) INTO unnamed
              FROM roost.claims c
              JOIN roost.job_rows j ON j.id BETWEEN c.job_id AND c.job_id
             WHERE c.task IS NULL AND j.task = throttle.task;
            IF unnamed = 0 THEN
                UPDATE roost.throttles t SET counted = true WHERE t.task = throttle.task;
            END IF;
        END IF;
        room := greatest(0, throttle.max_concurrency - running - unnamed);
    END IF;
    IF throttle.rate_per_minute IS NOT NULL THEN
        SELECT coalesce(sum(s.starts), 0), min(s.at) INTO started, first_at
          FROM roost.throttle_starts s
         WHERE s.task = throttle.task AND s.at > now() - make_interval(secs => window_seconds);
        room := least(room, greatest(0, throttle.rate_per_minute - started));
        IF started >= throttle.rate_per_minute THEN
            next_in_seconds := extract(epoch FROM first_at - now()) + window_seconds;
        END IF;
    END IF;
END $$;

-- Claims jobs of throttled tasks, as many as their limits leave room for, but at most `most_throttled`, and none that would not
-- be among the best `most` if those of ready, in the ranges given, were claimed along. Each row but the last is a job with its
-- lease, and whether its task has a rate. The last says whether more could be claimed, and in how many seconds time makes room for
-- more. A worker that was declared dead (its row is gone) gets no row.
--
-- A start happens after the claim: so that no minute holds too many, what is claimed here must start within as many seconds
-- as window_seconds is longer than a minute, counted from before this was called, or not at all.
CREATE FUNCTION roost.claim_throttled(
    worker_id uuid, queues text[], range_queues text[], priorities integer[], scheduled_ats timestamptz[], job_ids bigint[],
    last_priorities integer[], early_seconds float8[], most integer, most_throttled integer, window_seconds float8,
    OUT job roost.job_rows, OUT lease bigint, OUT has_rate boolean, OUT more boolean, OUT next_in_seconds float8
) RETURNS SETOF record
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    open_queues text[];
    waiting     text[];  -- the tasks that have jobs in these queues
    locked      text[];  -- those of them that no other gives out runs of just now
    tasks       text[];  -- of these, those that there is room for
    rooms       integer[];
    rates       boolean[];
    freed_queue text;
BEGIN
    IF NOT EXISTS (SELECT 1 FROM roost.workers w WHERE w.id = claim_throttled.worker_id) THEN
        RETURN;
    END IF;
    more := false;
    FOR freed_queue IN
        WITH free AS MATERIALIZED (
            SELECT w.row_id
              FROM roost.throttles t
             CROSS JOIN LATERAL (SELECT r.ctid AS row_id FROM roost.throttled r WHERE r.task = t.task
                                  LIMIT 1000 FOR UPDATE SKIP LOCKED) AS w
             WHERE NOT t.limited
             LIMIT 1000
        ), taken AS (
            DELETE FROM roost.throttled USING free
             WHERE throttled.ctid = free.row_id
            RETURNING throttled.queue, throttled.priority, throttled.scheduled_at, throttled.job_id
        ), moved AS (
            INSERT INTO roost.ready (queue, priority, scheduled_at, job_id)
            SELECT taken.queue, taken.priority, taken.scheduled_at, taken.job_id FROM taken
            RETURNING queue
        )
        SELECT DISTINCT moved.queue FROM moved
    LOOP
        more := true;
        PERFORM roost.notify_idle(freed_queue);
    END LOOP;

    SELECT array_agg(q.name) INTO open_queues
      FROM (SELECT DISTINCT u.name COLLATE "C" AS name FROM unnest(claim_throttled.queues) AS u(name)) AS q
     WHERE NOT EXISTS (SELECT 1 FROM roost.queues p WHERE p.name = q.name AND p.paused);
    SELECT array_agg(t.task) INTO waiting
      FROM roost.throttles t
     WHERE t.limited
       AND EXISTS (SELECT 1 FROM unnest(open_queues) AS q(name)
                    CROSS JOIN LATERAL (SELECT 1 FROM roost.throttled w
                                         WHERE w.task = t.task AND w.queue = q.name COLLATE "C" LIMIT 1) AS any_job);
    IF waiting IS NULL THEN
        RETURN NEXT;
        RETURN;
    END IF;

    SELECT array_agg(l.task) INTO locked
      FROM (SELECT t.task FROM roost.throttles t WHERE t.task = ANY (waiting) FOR UPDATE SKIP LOCKED) AS l;
    more := more OR locked IS NULL OR cardinality(locked) < cardinality(waiting);

    -- What others did until they gave up the lock is seen by a statement that begins after it was taken.
    SELECT array_agg(t.task), array_agg(least(r.room, most_throttled + 1)), array_agg(t.rate_per_minute IS NOT NULL)
      INTO tasks, rooms, rates
      FROM roost.throttles t
     CROSS JOIN LATERAL roost.throttle_room(t, claim_throttled.window_seconds) AS r
     WHERE t.task = ANY (locked) AND r.room > 0;
    RETURN QUERY
    WITH candidate AS MATERIALIZED (
        SELECT best.row_id, best.priority, best.scheduled_at, best.job_id, a.has_rate
          FROM unnest(tasks, rooms, rates) AS a(task, room, has_rate)
         CROSS JOIN LATERAL (
               SELECT w.row_id, w.priority, w.scheduled_at, w.job_id
                 FROM unnest(open_queues) AS q(name)
                CROSS JOIN LATERAL (
                      SELECT t.ctid AS row_id, t.priority, t.scheduled_at, t.job_id
                        FROM roost.throttled t
                       WHERE t.task = a.task COLLATE "C" AND t.queue = q.name COLLATE "C"
                       ORDER BY t.priority, t.scheduled_at, t.job_id
                       LIMIT a.room
                         FOR UPDATE SKIP LOCKED
                      ) AS w
                ORDER BY w.priority, w.scheduled_at, w.job_id
                LIMIT a.room
               ) AS best
    ), rival AS (
        SELECT r.priority, r.scheduled_at, r.job_id
          FROM unnest(open_queues) AS q(name)
         CROSS JOIN LATERAL unnest(range_queues, priorities, scheduled_ats, job_ids, last_priorities, early_seconds)
                         AS past(queue, priority, scheduled_at, job_id, last_priority, early_seconds)
         CROSS JOIN LATERAL (
               SELECT ready.priority, ready.scheduled_at, ready.job_id
                 FROM roost.ready
                WHERE ready.queue = past.queue COLLATE "C" AND ready.priority <= past.last_priority
                  AND (ready.priority, ready.scheduled_at, ready.job_id)
                      > (past.priority, past.scheduled_at - make_interval(secs => past.early_seconds), past.job_id)
                ORDER BY ready.priority, ready.scheduled_at, ready.job_id
                LIMIT most
               ) AS r
         WHERE past.queue = q.name AND EXISTS (SELECT 1 FROM candidate)
    ), chosen AS MATERIALIZED (
        SELECT best.row_id, best.has_rate
          FROM (SELECT e.row_id, e.has_rate, e.priority, e.scheduled_at, e.job_id
                  FROM (SELECT c.row_id, c.has_rate, c.priority, c.scheduled_at, c.job_id FROM candidate c
                        UNION ALL
                        SELECT NULL, NULL, rival.priority, rival.scheduled_at, rival.job_id FROM rival) AS e
                 ORDER BY e.priority, e.scheduled_at, e.job_id
                 LIMIT most) AS best
         WHERE best.row_id IS NOT NULL
         ORDER BY best.priority, best.scheduled_at, best.job_id
         LIMIT most_throttled
    ), taken AS MATERIALIZED (
        DELETE FROM roost.throttled
         USING chosen
         WHERE throttled.ctid = chosen.row_id
        RETURNING throttled.job_id, throttled.priority, throttled.scheduled_at, chosen.has_rate
    ), run AS MATERIALIZED (
        SELECT j AS job, j.id, j.task, nextval('roost.lease_seq') AS lease, j.attempt + 1 AS attempt, t.has_rate
          FROM (SELECT taken.job_id, taken.has_rate FROM taken
                 ORDER BY taken.priority, taken.scheduled_at, taken.job_id) AS t
          JOIN roost.job_rows j ON j.id BETWEEN t.job_id AND t.job_id AND j.state IN ('available', 'retryable')
    ), claim AS (
        INSERT INTO roost.claims (job_id, lease, worker_id, attempt, task)
        SELECT run.id, run.lease, claim_throttled.worker_id, run.attempt, run.task FROM run
    ), noted AS (
        INSERT INTO roost.throttle_starts AS s (task, at, starts)
        SELECT run.task, to_timestamp(ceil(extract(epoch FROM now()) * 10) / 10), count(*) FROM run
         WHERE run.has_rate
         GROUP BY run.task
        ON CONFLICT (task, at) DO UPDATE SET starts = s.starts + excluded.starts
    )
    SELECT run.job, run.lease, run.has_rate, NULL::boolean, NULL::float8 FROM run;

    DELETE FROM roost.throttle_starts s
     WHERE s.ctid = ANY (ARRAY(SELECT old.ctid FROM roost.throttle_starts old
                                WHERE old.task = ANY (locked)
                                  AND old.at <= now() - make_interval(secs => claim_throttled.window_seconds)
                                LIMIT 1000));
    SELECT claim_throttled.more OR coalesce(bool_or(r.room > 0), false), min(r.next_in_seconds) INTO more, next_in_seconds
      FROM roost.throttles t
     CROSS JOIN LATERAL roost.throttle_room(t, claim_throttled.window_seconds) AS r
     WHERE t.task = ANY (locked)
       AND EXISTS (SELECT 1 FROM unnest(open_queues) AS q(name)
                    CROSS JOIN LATERAL (SELECT 1 FROM roost.throttled w
                                         WHERE w.task = t.task AND w.queue = q.name COLLATE "C" LIMIT 1) AS any_job);
    RETURN NEXT;
END $$;

-- Takes a job out of where it waits. Returns false where it doesn't wait: it runs or has ended.
CREATE FUNCTION roost.unplace(job roost.job_rows) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM roost.ready r
     WHERE r.queue = job.queue AND r.priority = job.priority AND r.scheduled_at = job.scheduled_at AND r.job_id = job.id;
    IF NOT FOUND THEN
        DELETE FROM roost.scheduled s WHERE s.scheduled_at = job.scheduled_at AND s.job_id = job.id;
    END IF;
    IF NOT FOUND THEN
        DELETE FROM roost.throttled t
         WHERE t.task = job.task AND t.queue = job.queue AND t.priority = job.priority
           AND t.scheduled_at = job.scheduled_at AND t.job_id = job.id;
    END IF;
    RETURN FOUND;
END $$;

-- Puts jobs, which must be in none of the narrow tables, where they belong by their scheduled_at.
CREATE FUNCTION roost.make_due(job_ids bigint[]) RETURNS void
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    due_queue text;
BEGIN
    INSERT INTO roost.scheduled (scheduled_at, job_id, priority, queue)
    SELECT j.scheduled_at, j.id, j.priority, j.queue FROM roost.job_rows j
     WHERE j.id = ANY (job_ids) AND j.scheduled_at > now();
    FOR due_queue IN
        WITH job AS MATERIALIZED (
            SELECT j.task, j.queue, j.priority, j.scheduled_at, j.id,
                   EXISTS (SELECT 1 FROM roost.throttles t WHERE t.task = j.task AND t.limited) AS limited
              FROM roost.job_rows j
             WHERE j.id = ANY (job_ids) AND j.scheduled_at <= now()
        ), due AS (
            INSERT INTO roost.ready (queue, priority, scheduled_at, job_id)
            SELECT job.queue, job.priority, job.scheduled_at, job.id FROM job WHERE NOT job.limited
        ), held AS (
            INSERT INTO roost.throttled (task, queue, priority, scheduled_at, job_id)
            SELECT job.task, job.queue, job.priority, job.scheduled_at, job.id FROM job WHERE job.limited
        )
        SELECT DISTINCT job.queue FROM job
    LOOP
        PERFORM roost.notify_idle(due_queue);
    END LOOP;
END $$;

DROP FUNCTION roost.enqueue(text, jsonb, text, integer, integer, timestamptz, text, text[], integer, bigint[], jsonb);

-- Adds one job in the caller's transaction and returns its id. on_duplicate says what to do where an active job has its
-- unique_key: 'raise' an error, 'return' that job's id, or 'replace' its args and scheduled_at if it still waits.
CREATE FUNCTION roost.enqueue(
    task            text,
    args            jsonb       DEFAULT '{}',
    queue           text        DEFAULT 'default',
    priority        integer     DEFAULT 0,
    max_attempts    integer     DEFAULT 20,
    scheduled_at    timestamptz DEFAULT NULL,
    unique_key      text        DEFAULT NULL,
    tags            text[]      DEFAULT NULL,
    timeout_seconds integer     DEFAULT NULL,
    depends_on      bigint[]    DEFAULT NULL,
    metadata        jsonb       DEFAULT NULL,
    on_duplicate    text        DEFAULT 'raise'
) RETURNS bigint
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    due_at timestamptz := coalesce(scheduled_at, now());
    job_id bigint;
    tried  record;
BEGIN
    IF task IS NULL OR char_length(task) NOT BETWEEN 1 AND 128 THEN
        RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue task %L: task must have 1 to 128 characters', left(task, 200));
    ELSIF queue IS NULL OR char_length(queue) NOT BETWEEN 1 AND 128 THEN
        RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue %L: queue must have 1 to 128 characters, not %L', task, left(queue, 200));
    ELSIF args IS NULL OR jsonb_typeof(args) <> 'object' THEN
        RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue %L: args must be a JSON object, not %s', task, coalesce(jsonb_typeof(args), 'NULL'));
    ELSIF octet_length(args::text) > 1048576 THEN
        RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue %L: args take %s bytes, more than 1048576: store the data elsewhere and pass a reference', task, octet_length(args::text));
    ELSIF priority IS NULL THEN
        RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue %L: priority must be an integer, not NULL', task);
    ELSIF max_attempts IS NULL OR max_attempts < 1 THEN
        RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue %L: max_attempts must be at least 1, not %s', task, coalesce(max_attempts::text, 'NULL'));
    ELSIF timeout_seconds < 1 THEN
        RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue %L: timeout_seconds must be at least 1, not %s', task, timeout_seconds);
    ELSIF due_at < '0001-01-02 00:00:00+00' OR due_at >= '9999-12-31 00:00:00+00' THEN  -- what Python reads in any time zone
        RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue %L: scheduled_at must lie in the years 1 to 9999, unlike %s', task, scheduled_at);
    ELSIF array_position(tags, NULL) IS NOT NULL THEN
        RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue %L: tags must not hold NULL', task);
    ELSIF metadata IS NOT NULL AND jsonb_typeof(metadata) <> 'object' THEN
        RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue %L: metadata must be a JSON object, not %s', task, jsonb_typeof(metadata));
    ELSIF octet_length(metadata::text) > 1048576 THEN
        RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue %L: metadata takes %s bytes, more than 1048576', task, octet_length(metadata::text));
    ELSIF unique_key IS NOT NULL OR depends_on IS NOT NULL OR on_duplicate IS DISTINCT FROM 'raise' THEN
        IF char_length(unique_key) NOT BETWEEN 1 AND 512 THEN
            RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue %L: unique_key must have 1 to 512 characters, not %s', task, char_length(unique_key));
        ELSIF on_duplicate IS NULL OR on_duplicate NOT IN ('raise', 'return', 'replace') THEN
            RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue %L: on_duplicate must be raise, return or replace, not %L', task, on_duplicate);
        ELSIF on_duplicate <> 'raise' AND unique_key IS NULL THEN
            RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue %L: on_duplicate is of no use without a unique_key', task);
        ELSIF array_position(depends_on, NULL) IS NOT NULL THEN
            RAISE invalid_parameter_value USING MESSAGE = format('cannot enqueue %L: depends_on must not hold NULL', task);
        END IF;
        tried := roost.try_enqueue(task, args, queue, priority, max_attempts, scheduled_at, unique_key, tags, timeout_seconds,
                                   depends_on, metadata, on_duplicate);
        IF tried.unknown_parents IS NOT NULL THEN
            RAISE foreign_key_violation USING MESSAGE = format('cannot enqueue %L: depends_on names job %s, which does not exist', task, tried.unknown_parents[1]);
        ELSIF tried.duplicate_of IS NOT NULL THEN
            RAISE unique_violation USING MESSAGE = format('cannot enqueue %L: unique_key %L is that of job %s, which is active', task, unique_key, tried.duplicate_of),
                                         DETAIL = tried.duplicate_of::text;
        END IF;
        RETURN tried.job_id;
    END IF;

    INSERT INTO roost.job_rows
           (queue, task, args, priority, max_attempts, scheduled_at, tags, timeout_seconds, metadata)
    VALUES (queue, task, args, priority, max_attempts, due_at, nullif(tags, '{}'), timeout_seconds, nullif(metadata, '{}'))
    RETURNING id INTO job_id;

    IF due_at <= now() THEN
        IF EXISTS (SELECT 1 FROM roost.throttles t WHERE t.task = task AND t.limited) THEN
            INSERT INTO roost.throttled (task, queue, priority, scheduled_at, job_id) VALUES (task, queue, priority, due_at, job_id);
        ELSE
            INSERT INTO roost.ready (queue, priority, scheduled_at, job_id) VALUES (queue, priority, due_at, job_id);
        END IF;
        IF EXISTS (SELECT 1 FROM roost.idle_workers w WHERE w.idle AND queue = ANY (w.queues)) THEN
            PERFORM pg_notify('roost_inserted', queue);
        END IF;
    ELSE
        INSERT INTO roost.scheduled (scheduled_at, job_id, priority, queue) VALUES (due_at, job_id, priority, queue);
    END IF;
    RETURN job_id;
END $$;

-- Adds many jobs in one round trip and returns how many. `kinds` is an array of objects with the fields of
-- roost.enqueue except args and metadata, each distinct one once; job i has the fields kinds[kind_of[i]] (counted
-- from 1), args[i] and metadata[i].
-- The client checks the values; what slips by is refused by the table's constraints.
CREATE OR REPLACE FUNCTION roost.enqueue_many(kinds json, kind_of integer[], args text[], metadata text[] DEFAULT NULL)
RETURNS bigint
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    inserted bigint;
    busy_queue text;
BEGIN
    WITH kind AS MATERIALIZED (
        SELECT k.number, f.queue, f.task, f.priority, f.max_attempts,
               coalesce(f.scheduled_at, now()) AS scheduled_at, f.tags, f.timeout_seconds
          FROM json_array_elements(kinds) WITH ORDINALITY AS k(fields, number),
               json_to_record(k.fields) AS f(queue text, task text, priority integer, max_attempts integer,
                                              scheduled_at timestamptz, tags text[], timeout_seconds integer)
    ), job AS (
        INSERT INTO roost.job_rows
               (queue, task, args, priority, max_attempts, scheduled_at, tags, timeout_seconds, metadata)
        SELECT kind.queue, kind.task, a.args::jsonb, kind.priority, kind.max_attempts, kind.scheduled_at,
               kind.tags, kind.timeout_seconds, a.metadata::jsonb
          FROM unnest(kind_of, args, metadata) WITH ORDINALITY AS a(kind, args, metadata, number)
          JOIN kind ON kind.number = a.kind
         ORDER BY a.number
        RETURNING id, queue, priority, scheduled_at, task
    ), due AS (
        INSERT INTO roost.ready (queue, priority, scheduled_at, job_id)
        SELECT queue, priority, scheduled_at, id FROM job
         WHERE scheduled_at <= now() AND NOT task = ANY (ARRAY(SELECT t.task FROM roost.throttles t WHERE t.limited))
    ), held AS (
        INSERT INTO roost.throttled (task, queue, priority, scheduled_at, job_id)
        SELECT task, queue, priority, scheduled_at, id FROM job
         WHERE scheduled_at <= now() AND task = ANY (ARRAY(SELECT t.task FROM roost.throttles t WHERE t.limited))
    ), later AS (
        INSERT INTO roost.scheduled (scheduled_at, job_id, priority, queue)
        SELECT scheduled_at, id, priority, queue FROM job WHERE scheduled_at > now()
    )
    SELECT count(*) INTO inserted FROM job;

    FOR busy_queue IN SELECT DISTINCT k.fields ->> 'queue' FROM json_array_elements(kinds) AS k(fields) LOOP
        PERFORM roost.notify_idle(busy_queue);
    END LOOP;
    RETURN inserted;
END $$;

-- roost.retry, but that an active job has its key (`duplicate_of`), or that a parent of it is dead, is a result here: then
-- `state` is as it was, and nothing is changed. `dependents` counts those that were revived with it.
-- Locks in the order of cancel and of the worker's statements: the narrow tables first, then job_rows.
CREATE FUNCTION roost.try_retry(
    job_id bigint, with_dependents boolean DEFAULT false,
    OUT state text, OUT duplicate_of bigint, OUT dead_parent bigint, OUT dependents bigint
)
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    job      roost.job_rows%ROWTYPE;
    tried    record;
    parents  bigint[];
    next     integer := 1;
    child_id bigint;
BEGIN
    dependents := 0;
    FOR round IN 1..1000 LOOP  -- as in cancel
        SELECT * INTO job FROM roost.job_rows j WHERE j.id = job_id;
        state := job.state;
        IF NOT FOUND OR state = 'completed' THEN
            RETURN;
        ELSIF state IN ('discarded', 'cancelled') THEN
            IF with_dependents THEN
                PERFORM roost.lock_with_dependents(job_id);
            END IF;
            tried := roost.revive(job_id);
            duplicate_of := tried.duplicate_of;
            dead_parent := tried.dead_parent;
            EXIT WHEN tried.revived;
            CONTINUE WHEN duplicate_of IS NULL AND dead_parent IS NULL;  -- another has just retried it
            RETURN;
        END IF;
        DELETE FROM roost.scheduled s WHERE s.scheduled_at = job.scheduled_at AND s.job_id = job_id;
        IF FOUND THEN
            UPDATE roost.job_rows j SET scheduled_at = now() WHERE j.id = job_id AND j.state = state;
            PERFORM roost.make_due(ARRAY[job_id]);
            EXIT;
        END IF;
        PERFORM 1 FROM roost.blocked b WHERE b.job_id = job_id FOR UPDATE;
        IF FOUND THEN
            UPDATE roost.job_rows j SET scheduled_at = now() WHERE j.id = job_id AND j.state = state AND j.scheduled_at > now();
            EXIT;
        ELSIF EXISTS (SELECT 1 FROM roost.claims c WHERE c.job_id = job_id) THEN
            state := 'executing';
            RETURN;
        END IF;
        EXIT WHEN EXISTS (SELECT 1 FROM roost.ready r
                           WHERE r.queue = job.queue AND r.priority = job.priority
                             AND r.scheduled_at = job.scheduled_at AND r.job_id = job_id)
               OR EXISTS (SELECT 1 FROM roost.throttled t
                           WHERE t.task = job.task AND t.queue = job.queue AND t.priority = job.priority
                             AND t.scheduled_at = job.scheduled_at AND t.job_id = job_id);
        IF round = 1000 THEN
            RAISE EXCEPTION 'cannot retry job %: it is in none of ready, scheduled, throttled, blocked and claims', job_id;
        END IF;
    END LOOP;

    -- Those that were cancelled by a dead parent, not by a cancel of their own.
    parents := CASE WHEN with_dependents THEN ARRAY[job_id] ELSE '{}' END;
    WHILE next <= cardinality(parents) LOOP
        FOR child_id IN
            SELECT d.child_id FROM roost.cancelled_dependents d
              JOIN roost.job_rows j ON j.id = d.child_id AND j.state = 'cancelled' AND NOT j.cancel_requested
             WHERE d.parent_id = parents[next]
             ORDER BY d.child_id
        LOOP
            IF (roost.revive(child_id)).revived THEN
                parents := parents || child_id;
                dependents := dependents + 1;
            END IF;
        END LOOP;
        next := next + 1;
    END LOOP;
END $$;
