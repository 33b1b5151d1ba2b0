-- Unique jobs, jobs that depend on others, and what is to happen when a job ends.
--
-- unique_keys   which job has a key: from its enqueue (or retry) until it is terminal
-- blocked       a job that waits for others, as ready, scheduled and claims hold those that don't: a job that is not
--               finished is in exactly one of the four
-- dependencies  for which: an edge stands until its parent's end has been told to the child
-- cancelled_dependents  the edges along which a parent's end cancelled a child; a retry with dependents goes back along them
-- ended_parents a parent that has ended while there were edges from it; whoever has told them all takes it away
--
-- An enqueue that depends on a job locks its row FOR SHARE until the end of its transaction. So the job's end is either
-- seen by the enqueue or waits for it and sees its edges, and enqueues don't wait for each other. Nothing else of a worker
-- waits: what it starts is decided in the narrow tables, and an outcome that meets such a lock is put aside.
--
-- What these functions call that must know of throttles, too (enqueue, make_due, unplace, try_retry), is in 0005, and of the
-- archive (lock_parents) in 0006.

CREATE TABLE roost.unique_keys (
    unique_key text COLLATE "C" PRIMARY KEY CHECK (char_length(unique_key) BETWEEN 1 AND 512),
    job_id     bigint NOT NULL
);

CREATE TABLE roost.blocked (
    job_id       bigint  PRIMARY KEY,
    parents_left integer NOT NULL,
    queue        text    COLLATE "C" NOT NULL
);

CREATE TABLE roost.dependencies (
    parent_id bigint NOT NULL,
    child_id  bigint NOT NULL,
    PRIMARY KEY (parent_id, child_id)
);

CREATE TABLE roost.cancelled_dependents (
    parent_id bigint NOT NULL,
    child_id  bigint NOT NULL,
    PRIMARY KEY (parent_id, child_id)
);

CREATE TABLE roost.ended_parents (
    job_id bigint PRIMARY KEY
);

-- Called for every enqueue with depends_on, before it locks anything. What a sequence has counted is seen by all at once, so
-- a completion knows without reading a table whether any job has ever depended on another: else it need not look for edges.
CREATE SEQUENCE roost.dependents_seq;

ALTER TABLE roost.job_rows ADD COLUMN awaited boolean NOT NULL DEFAULT false;  -- its end is to be notified

-- What follows when jobs have become terminal: their keys are free, those who wait for them are notified, and their
-- dependents will be told. Returns the jobs of which that last is to be done (roost.follow_parents), NULL for none.
CREATE FUNCTION roost.after_end(job_ids bigint[], with_key bigint[], awaited bigint[]) RETURNS bigint[]
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    parents bigint[];
BEGIN
    IF with_key IS NOT NULL THEN
        DELETE FROM roost.unique_keys u
         USING unnest(with_key) AS k(job_id), roost.job_rows j
         WHERE j.id BETWEEN k.job_id AND k.job_id AND u.unique_key BETWEEN j.unique_key AND j.unique_key
           AND u.job_id = k.job_id;
    END IF;
    IF awaited IS NOT NULL THEN
        PERFORM pg_notify('roost_ended', a.job_id::text) FROM unnest(awaited) AS a(job_id);
    END IF;
    IF (SELECT s.is_called FROM roost.dependents_seq s) THEN
        WITH noted AS (
            INSERT INTO roost.ended_parents AS e (job_id)
            SELECT ended.job_id FROM unnest(job_ids) AS ended(job_id)
             WHERE EXISTS (SELECT 1 FROM roost.dependencies d WHERE d.parent_id BETWEEN ended.job_id AND ended.job_id)
                -- A snapshot of before the edges were written doesn't show them.
                OR current_setting('transaction_isolation') IN ('repeatable read', 'serializable')
             ORDER BY ended.job_id
            ON CONFLICT (job_id) DO NOTHING
            RETURNING e.job_id
        )
        SELECT array_agg(noted.job_id) INTO parents FROM noted;
    END IF;
    RETURN parents;
END $$;

CREATE FUNCTION roost.after_end(job_ids bigint[]) RETURNS bigint[]
LANGUAGE sql AS $$
    SELECT roost.after_end(job_ids,
                           array_agg(j.id) FILTER (WHERE j.unique_key IS NOT NULL),
                           array_agg(j.id) FILTER (WHERE j.awaited))
      FROM roost.job_rows j
     WHERE j.id = ANY (job_ids)
$$;

-- Tells up to `most` dependents that a parent of theirs has ended: of a completed one they wait no longer, of any other
-- they are cancelled, which their own dependents will be told in turn. `these`: of these parents, otherwise of any.
-- Passes over what another transaction holds; `held` says how many dependents it did, `told` how many it did not. `more` are
-- those that were cancelled and have dependents.
CREATE FUNCTION roost.follow_parents(these bigint[] DEFAULT NULL, most integer DEFAULT 1000,
                                     OUT told integer, OUT held bigint[], OUT more bigint[])
LANGUAGE plpgsql
-- A worker's sessions read by key only, and so do these statements where they read a table, for which each says BETWEEN (as
-- those of the worker do) and none has it read in the table's order. But here sets of a thousand meet.
SET enable_hashjoin = on
SET plan_cache_mode = force_custom_plan AS $$
#variable_conflict use_variable
DECLARE
    ended      bigint[];
    completed  bigint[];
    dead       bigint[];
    edges      bigint[];  -- their parents, and at the same places their children and where they stand
    children   bigint[];
    row_ids    tid[];
    free       bigint[];
    released   bigint[];
    cancelled  bigint[];
BEGIN
    told := 0;
    -- With their rows, so that none is retried, or ends again, while its dependents are told that it has ended.
    SELECT array_agg(e.job_id) INTO ended
      FROM (SELECT n.job_id FROM roost.ended_parents n
              JOIN roost.job_rows j ON j.id BETWEEN n.job_id AND n.job_id
             WHERE these IS NULL OR n.job_id = ANY (these)
             ORDER BY n.job_id LIMIT most
               FOR UPDATE OF n SKIP LOCKED
               FOR SHARE OF j SKIP LOCKED) AS e;
    IF ended IS NULL THEN
        RETURN;
    END IF;
    -- One that has been retried has not ended after all.
    DELETE FROM roost.ended_parents n
     USING roost.job_rows j
     WHERE n.job_id = ANY (ended) AND j.id BETWEEN n.job_id AND n.job_id AND j.state IN ('available', 'retryable');
    SELECT array_agg(j.id) FILTER (WHERE j.state = 'completed'),
           array_agg(j.id) FILTER (WHERE j.state IN ('discarded', 'cancelled'))
      INTO completed, dead
      FROM roost.job_rows j WHERE j.id = ANY (ended);
    ended := completed || dead;

    -- Edges to children that nobody holds, first (many that are held may not keep these from being told), and to those that no
    -- longer wait. Of one that is to be cancelled the job's row counts, too, which an enqueue that depends on it may have locked.
    SELECT array_agg(d.parent_id), array_agg(d.child_id), array_agg(d.row_id),
           coalesce(array_agg(DISTINCT d.child_id) FILTER (WHERE d.is_free), '{}')
      INTO edges, children, row_ids, free
      FROM (SELECT d.parent_id, d.child_id, d.row_id, true AS is_free
              FROM unnest(completed) AS e(job_id)
             CROSS JOIN LATERAL (SELECT x.parent_id, x.child_id, x.ctid AS row_id
                                   FROM roost.dependencies x
                                   JOIN roost.blocked b ON b.job_id BETWEEN x.child_id AND x.child_id
                                  WHERE x.parent_id = e.job_id ORDER BY x.child_id LIMIT most
                                    FOR UPDATE OF x, b SKIP LOCKED) AS d
            UNION ALL
            SELECT d.parent_id, d.child_id, d.row_id, true
              FROM unnest(dead) AS e(job_id)
             CROSS JOIN LATERAL (SELECT x.parent_id, x.child_id, x.ctid AS row_id
                                   FROM roost.dependencies x
                                   JOIN roost.blocked b ON b.job_id BETWEEN x.child_id AND x.child_id
                                   JOIN roost.job_rows j ON j.id BETWEEN x.child_id AND x.child_id
                                  WHERE x.parent_id = e.job_id ORDER BY x.child_id LIMIT most
                                    FOR UPDATE OF x, b SKIP LOCKED FOR NO KEY UPDATE OF j SKIP LOCKED) AS d
            UNION ALL
            SELECT d.parent_id, d.child_id, d.row_id, false
              FROM unnest(ended) AS e(job_id)
             CROSS JOIN LATERAL (SELECT x.parent_id, x.child_id, x.ctid AS row_id
                                   FROM roost.dependencies x
                                  WHERE x.parent_id = e.job_id
                                    AND NOT EXISTS (SELECT 1 FROM roost.blocked b WHERE b.job_id BETWEEN x.child_id AND x.child_id)
                                  ORDER BY x.child_id LIMIT most
                                    FOR UPDATE OF x SKIP LOCKED) AS d
             LIMIT most) AS d;
    IF children IS NOT NULL THEN
        WITH edge AS MATERIALIZED (
            SELECT e.row_id, e.parent_id, e.child_id, e.parent_id = ANY (coalesce(completed, '{}')) AS completed,
                   e.child_id IN (SELECT unnest(free)) AS free
              FROM unnest(row_ids, edges, children) AS e(row_id, parent_id, child_id)
        ), gone AS (  -- told, or no longer waiting for anything
            DELETE FROM roost.dependencies d
             USING edge
             WHERE d.ctid = edge.row_id
               AND (edge.free
                    OR NOT EXISTS (SELECT 1 FROM roost.blocked b WHERE b.job_id BETWEEN edge.child_id AND edge.child_id))
            RETURNING edge.parent_id, edge.child_id, edge.completed, edge.free
        ), kept AS (
            INSERT INTO roost.cancelled_dependents (parent_id, child_id)
            SELECT gone.parent_id, gone.child_id FROM gone WHERE NOT gone.completed
            ON CONFLICT DO NOTHING
        ), less AS (
            UPDATE roost.blocked b SET parents_left = b.parents_left - fewer.parents
              FROM (SELECT gone.child_id, count(*) AS parents FROM gone
                     WHERE gone.free GROUP BY gone.child_id HAVING bool_and(gone.completed)) AS fewer
             WHERE b.job_id BETWEEN fewer.child_id AND fewer.child_id
            RETURNING b.job_id, b.parents_left
        )
        SELECT (SELECT count(*) FROM gone),
               (SELECT array_agg(less.job_id) FROM less WHERE less.parents_left <= 0),
               (SELECT array_agg(DISTINCT gone.child_id) FROM gone WHERE gone.free AND NOT gone.completed)
          INTO told, released, cancelled;
    END IF;
    IF told < most THEN
        SELECT array_agg(e.job_id) INTO held
          FROM unnest(ended) AS e(job_id)
         WHERE EXISTS (SELECT 1 FROM roost.dependencies d WHERE d.parent_id BETWEEN e.job_id AND e.job_id);
    END IF;
    IF released IS NOT NULL THEN
        DELETE FROM roost.blocked b USING unnest(released) AS r(id) WHERE b.job_id BETWEEN r.id AND r.id;
        PERFORM roost.make_due(released);
    END IF;
    IF cancelled IS NOT NULL THEN
        DELETE FROM roost.blocked b USING unnest(cancelled) AS c(id) WHERE b.job_id BETWEEN c.id AND c.id;
        UPDATE roost.job_rows j
           SET state = 'cancelled', cancelled_at = now(),
               errors = roost.dependency_errors(j.errors, j.attempt, why.parent_id, why.state)
          FROM (SELECT DISTINCT ON (e.child_id) e.child_id, e.parent_id, p.state
                  FROM unnest(edges, children) AS e(parent_id, child_id)
                  JOIN roost.job_rows p ON p.id BETWEEN e.parent_id AND e.parent_id AND p.state IN ('discarded', 'cancelled')
                 WHERE e.child_id IN (SELECT unnest(cancelled))
                 ORDER BY e.child_id, e.parent_id) AS why
         WHERE j.id BETWEEN why.child_id AND why.child_id AND j.state IN ('available', 'retryable');
        more := roost.after_end(cancelled);
    END IF;
    DELETE FROM roost.ended_parents n
     WHERE n.job_id = ANY (ended)
       AND NOT EXISTS (SELECT 1 FROM roost.dependencies d WHERE d.parent_id BETWEEN n.job_id AND n.job_id);
END $$;

-- The errors of a job that is cancelled for a parent's sake.
CREATE FUNCTION roost.dependency_errors(errors jsonb, attempt integer, parent_id bigint, state text) RETURNS jsonb
LANGUAGE sql STABLE AS $$
    SELECT roost.append_error(
               errors, attempt,
               jsonb_build_object('error', format('DependencyFailed: job %s, on which this one depends, was %s', parent_id, state),
                                  'trace', ''),
               20)
$$;

-- Has a job that is in none of the narrow tables wait for those of its parents that have not completed. Returns how many
-- these are; or, with nothing changed, a parent that was discarded or cancelled, and its state.
CREATE FUNCTION roost.block(job_id bigint, queue text, parents bigint[],
                            OUT living integer, OUT dead_parent bigint, OUT dead_state text)
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    waits_for bigint[];
BEGIN
    SELECT array_agg(p.id) FILTER (WHERE p.state IN ('available', 'retryable')),
           min(p.id) FILTER (WHERE p.state IN ('discarded', 'cancelled'))
      INTO waits_for, dead_parent
      FROM roost.lock_parents(parents) AS p;
    living := coalesce(cardinality(waits_for), 0);
    IF dead_parent IS NOT NULL THEN
        SELECT p.state INTO dead_state FROM roost.lock_parents(ARRAY[dead_parent]) AS p;
        RETURN;
    END IF;
    -- What is left of an earlier life of the job; were an edge told it that it doesn't count, it would run too early.
    DELETE FROM roost.dependencies d
     USING unnest(parents) AS p(id)
     WHERE d.parent_id = p.id AND d.child_id = job_id;
    DELETE FROM roost.cancelled_dependents d
     USING unnest(parents) AS p(id)
     WHERE d.parent_id = p.id AND d.child_id = job_id;
    IF living > 0 THEN
        INSERT INTO roost.dependencies (parent_id, child_id) SELECT p.id, job_id FROM unnest(waits_for) AS p(id);
        INSERT INTO roost.blocked (job_id, parents_left, queue) VALUES (job_id, living, queue);
    END IF;
END $$;

-- Gives `job_id` the key. Returns NULL, or the active job that has it. Waits for another transaction that is about to
-- give or free it.
CREATE FUNCTION roost.take_key(key text, job_id bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    holder bigint;
BEGIN
    FOR round IN 1..1000 LOOP
        INSERT INTO roost.unique_keys AS u (unique_key, job_id) VALUES (key, job_id) ON CONFLICT (unique_key) DO NOTHING;
        IF FOUND THEN
            RETURN NULL;
        END IF;
        SELECT u.job_id INTO holder FROM roost.unique_keys u WHERE u.unique_key = key;
        CONTINUE WHEN NOT FOUND;  -- freed meanwhile
        IF EXISTS (SELECT 1 FROM roost.job_rows j WHERE j.id = holder AND j.state IN ('available', 'retryable')) THEN
            RETURN holder;
        END IF;
        -- Ended by a worker from before this table was there, which did not know that it had to free the key; and not retried
        -- since that look.
        DELETE FROM roost.unique_keys u
         WHERE u.unique_key = key AND u.job_id = holder
           AND NOT EXISTS (SELECT 1 FROM roost.job_rows j WHERE j.id = holder AND j.state IN ('available', 'retryable'));
    END LOOP;
    RAISE EXCEPTION 'cannot take unique_key %: it is freed and taken without end', quote_literal(key);
END $$;

-- Gives a waiting job other arguments and another time. Returns NULL where there is no such job any more or it has ended,
-- false where it runs.
CREATE FUNCTION roost.replace_waiting(job_id bigint, args jsonb, due_at timestamptz) RETURNS boolean
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    job roost.job_rows%ROWTYPE;
BEGIN
    FOR round IN 1..1000 LOOP  -- as in cancel
        SELECT * INTO job FROM roost.job_rows j WHERE j.id = job_id;
        IF NOT FOUND OR job.state NOT IN ('available', 'retryable') THEN
            RETURN NULL;
        ELSIF roost.unplace(job) THEN
            UPDATE roost.job_rows j SET args = args, scheduled_at = due_at WHERE j.id = job_id AND j.state = job.state;
            PERFORM roost.make_due(ARRAY[job_id]);
            RETURN true;
        END IF;
        PERFORM 1 FROM roost.blocked b WHERE b.job_id = job_id FOR UPDATE;
        IF FOUND THEN
            UPDATE roost.job_rows j SET args = args, scheduled_at = due_at WHERE j.id = job_id AND j.state = job.state;
            RETURN true;
        ELSIF EXISTS (SELECT 1 FROM roost.claims c WHERE c.job_id = job_id) THEN
            RETURN false;
        END IF;
    END LOOP;
    RAISE EXCEPTION 'cannot replace job %: it is in none of ready, scheduled, blocked and claims', job_id;
END $$;

-- roost.enqueue for a job with a unique_key or depends_on, its arguments checked. What would be an error there is a result
-- here, so that a client can raise it and leave the caller's transaction as it was: `duplicate_of`, the job that has the
-- key, or `unknown_parents`, with nothing changed.
CREATE FUNCTION roost.try_enqueue(
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
    on_duplicate    text        DEFAULT 'raise',
    OUT job_id          bigint,
    OUT duplicate_of    bigint,
    OUT unknown_parents bigint[]
)
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    due_at   timestamptz := coalesce(scheduled_at, now());
    new_id   bigint;
    parents  bigint[];
    blocking record;
    replaced boolean;
BEGIN
    IF cardinality(depends_on) > 0 THEN
        PERFORM nextval('roost.dependents_seq');
        SELECT array_agg(DISTINCT d.id) INTO parents FROM unnest(depends_on) AS d(id);
        SELECT array_agg(d.id) INTO unknown_parents
          FROM unnest(parents) AS d(id)
          LEFT JOIN roost.lock_parents(parents) AS p ON p.id = d.id
         WHERE p.id IS NULL;
        IF unknown_parents IS NOT NULL THEN
            RETURN;
        END IF;
    END IF;

    new_id := nextval('roost.job_rows_id_seq');
    WHILE unique_key IS NOT NULL LOOP
        duplicate_of := roost.take_key(unique_key, new_id);
        EXIT WHEN duplicate_of IS NULL;
        IF on_duplicate = 'replace' THEN
            replaced := roost.replace_waiting(duplicate_of, args, due_at);
            CONTINUE WHEN replaced IS NULL;
        END IF;
        IF on_duplicate = 'return' OR replaced THEN
            job_id := duplicate_of;
            duplicate_of := NULL;
        END IF;
        RETURN;
    END LOOP;

    INSERT INTO roost.job_rows
           (id, queue, task, args, priority, max_attempts, scheduled_at, unique_key, tags, timeout_seconds, depends_on, metadata)
    VALUES (new_id, queue, task, args, priority, max_attempts, due_at, unique_key, nullif(tags, '{}'), timeout_seconds, parents,
            nullif(metadata, '{}'));
    job_id := new_id;
    IF parents IS NOT NULL THEN
        blocking := roost.block(new_id, queue, parents);
        IF blocking.dead_parent IS NOT NULL THEN
            UPDATE roost.job_rows j
               SET state = 'cancelled', cancelled_at = now(),
                   errors = roost.dependency_errors(NULL, 0, blocking.dead_parent, blocking.dead_state)
             WHERE j.id = new_id;
            INSERT INTO roost.cancelled_dependents (parent_id, child_id)
            SELECT p.id, new_id FROM roost.lock_parents(parents) AS p WHERE p.state IN ('discarded', 'cancelled');
            PERFORM roost.after_end(ARRAY[new_id]);
            RETURN;
        ELSIF blocking.living > 0 THEN
            RETURN;
        END IF;
    END IF;
    PERFORM roost.make_due(ARRAY[new_id]);
END $$;

-- roost.enqueue_many for jobs of which any has a unique_key or depends on another. Beside what that takes: unique_keys[i]
-- of job i; job child_numbers[k] depends on job parent_numbers[k] of this call, and job of_numbers[k] on job parent_ids[k].
-- A job whose key an active job has, or an earlier one of this call, is left out; what depends on it depends on that job.
-- Returns how many were added and left out, or, with nothing changed, the parent_ids that there are not.
CREATE FUNCTION roost.try_enqueue_many(
    kinds json, kind_of integer[], args text[], metadata text[], unique_keys text[],
    child_numbers integer[], parent_numbers integer[], of_numbers integer[], parent_ids bigint[],
    OUT added bigint, OUT duplicates bigint, OUT unknown_parents bigint[]
)
LANGUAGE plpgsql
SET plan_cache_mode = auto AS $$  -- what it sets in its body holds until it ends
#variable_conflict use_column
DECLARE
    ids           bigint[];  -- by number
    actual        bigint[];  -- the same, but where a job is left out that which has its key
    keyed         record;
    last_key      text;
    holder        bigint;
    edge_children bigint[];
    edge_parents  bigint[];
    completed     bigint[];
    dead          bigint[];
    cancelled     bigint[];
    due           bigint[];
BEGIN
    IF cardinality(child_numbers) + cardinality(of_numbers) > 0 THEN
        PERFORM nextval('roost.dependents_seq');
    END IF;
    SELECT array_agg(DISTINCT d.id) INTO unknown_parents
      FROM unnest(parent_ids) AS d(id)
      LEFT JOIN roost.lock_parents(parent_ids) AS p ON p.id = d.id
     WHERE p.id IS NULL;
    IF unknown_parents IS NOT NULL THEN
        RETURN;
    END IF;
    SELECT array_agg(s.id ORDER BY s.id) INTO ids
      FROM (SELECT nextval('roost.job_rows_id_seq') AS id FROM generate_series(1, cardinality(kind_of))) AS s;

    actual := ids;
    FOR keyed IN  -- in an order that is the same for all, so that two of these can't wait for each other
        SELECT k.key, k.number FROM unnest(unique_keys) WITH ORDINALITY AS k(key, number)
         WHERE k.key IS NOT NULL
         ORDER BY k.key COLLATE "C", k.number
    LOOP
        IF keyed.key IS DISTINCT FROM last_key THEN
            holder := coalesce(roost.take_key(keyed.key, ids[keyed.number]), ids[keyed.number]);
            last_key := keyed.key;
        END IF;
        actual[keyed.number] := holder;
    END LOOP;

    SELECT array_agg(e.child), array_agg(e.parent) INTO edge_children, edge_parents
      FROM (SELECT ids[c.child] AS child, actual[c.parent] AS parent FROM unnest(child_numbers, parent_numbers) AS c(child, parent)
             WHERE actual[c.child] = ids[c.child]
            UNION
            SELECT ids[c.child], c.parent FROM unnest(of_numbers, parent_ids) AS c(child, parent)
             WHERE actual[c.child] = ids[c.child]) AS e;
    -- Of parents that are not of this call: those that are have no row yet, and live.
    SELECT array_agg(p.id) FILTER (WHERE p.state = 'completed'),
           array_agg(p.id) FILTER (WHERE p.state IN ('discarded', 'cancelled'))
      INTO completed, dead
      FROM roost.lock_parents(ARRAY(SELECT DISTINCT unnest(edge_parents))) AS p;

    -- A plan made for any number of jobs takes them for ten, and joins them row by row.
    SET LOCAL plan_cache_mode = force_custom_plan;
    WITH kind AS MATERIALIZED (
        SELECT k.number, f.queue, f.task, f.priority, f.max_attempts,
               coalesce(f.scheduled_at, now()) AS scheduled_at, f.tags, f.timeout_seconds
          FROM json_array_elements(kinds) WITH ORDINALITY AS k(fields, number),
               json_to_record(k.fields) AS f(queue text, task text, priority integer, max_attempts integer,
                                              scheduled_at timestamptz, tags text[], timeout_seconds integer)
    ), edge AS MATERIALIZED (
        SELECT e.child_id, e.parent_id,
               e.parent_id IN (SELECT unnest(completed)) AS is_completed, e.parent_id IN (SELECT unnest(dead)) AS is_dead
          FROM unnest(edge_children, edge_parents) AS e(child_id, parent_id)
    ), dependent AS MATERIALIZED (
        SELECT edge.child_id, array_agg(edge.parent_id ORDER BY edge.parent_id) AS parents,
               count(*) FILTER (WHERE NOT edge.is_completed) AS parents_left,
               min(edge.parent_id) FILTER (WHERE edge.is_dead) AS dead_parent
          FROM edge GROUP BY edge.child_id
    ), job AS (
        INSERT INTO roost.job_rows
               (id, queue, task, args, priority, max_attempts, scheduled_at, unique_key, tags, timeout_seconds, metadata,
                depends_on, state, cancelled_at, errors)
        SELECT j.id, kind.queue, kind.task, j.args::jsonb, kind.priority, kind.max_attempts, kind.scheduled_at, j.unique_key,
               kind.tags, kind.timeout_seconds, j.metadata::jsonb, dependent.parents,
               CASE WHEN dependent.dead_parent IS NULL THEN 'available' ELSE 'cancelled' END,
               CASE WHEN dependent.dead_parent IS NOT NULL THEN now() END,
               CASE WHEN dependent.dead_parent IS NOT NULL THEN roost.dependency_errors(NULL, 0, dependent.dead_parent, (
                   SELECT p.state FROM roost.lock_parents(ARRAY[dependent.dead_parent]) AS p)) END
          FROM unnest(ids, actual, kind_of, args, metadata, unique_keys) WITH ORDINALITY
               AS j(id, actual, kind, args, metadata, unique_key, number)
          JOIN kind ON kind.number = j.kind
          LEFT JOIN dependent ON dependent.child_id = j.id
         WHERE j.actual = j.id
         ORDER BY j.number
        RETURNING id, queue
    ), waiting AS (
        INSERT INTO roost.blocked (job_id, parents_left, queue)
        SELECT job.id, dependent.parents_left, job.queue
          FROM job JOIN dependent ON dependent.child_id = job.id
         WHERE dependent.parents_left > 0 AND dependent.dead_parent IS NULL
    ), kept AS (
        INSERT INTO roost.dependencies (parent_id, child_id)
        SELECT edge.parent_id, edge.child_id
          FROM edge JOIN dependent ON dependent.child_id = edge.child_id
         WHERE NOT edge.is_completed AND dependent.dead_parent IS NULL
    ), doomed AS (
        INSERT INTO roost.cancelled_dependents (parent_id, child_id)
        SELECT edge.parent_id, edge.child_id FROM edge WHERE edge.is_dead
    )
    SELECT count(*), cardinality(ids) - count(*),
           array_agg(job.id) FILTER (WHERE dependent.dead_parent IS NOT NULL),
           array_agg(job.id) FILTER (WHERE coalesce(dependent.parents_left, 0) = 0)
      INTO added, duplicates, cancelled, due
      FROM job LEFT JOIN dependent ON dependent.child_id = job.id;
    PERFORM roost.after_end(cancelled);
    PERFORM roost.make_due(due);
END $$;

-- Cancels a waiting job at once and asks for the cancel of a running one. Returns the job's state after it
-- ('executing': asked for; a finished job keeps its state), NULL when there is no such job.
CREATE OR REPLACE FUNCTION roost.cancel(job_id bigint) RETURNS text
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    job roost.job_rows%ROWTYPE;
    waited boolean;
BEGIN
    -- A job may move between the tables while we look (claimed, released, promoted): each round looks with a new
    -- snapshot, and a worker moves one job a bounded number of times a second.
    FOR round IN 1..1000 LOOP
        SELECT * INTO job FROM roost.job_rows j WHERE j.id = job_id;
        IF NOT FOUND OR job.state IN ('completed', 'discarded', 'cancelled') THEN
            RETURN job.state;
        END IF;
        waited := roost.unplace(job);
        IF NOT waited THEN
            DELETE FROM roost.blocked b WHERE b.job_id = job_id;
            waited := FOUND;
        END IF;
        IF waited THEN
            UPDATE roost.job_rows j SET state = 'cancelled', cancelled_at = now(), cancel_requested = true
             WHERE j.id = job_id AND j.state IN ('available', 'retryable');
            PERFORM roost.after_end(ARRAY[job_id]);
            RETURN 'cancelled';
        END IF;
        UPDATE roost.claims c SET cancel_requested = true WHERE c.job_id = job_id;
        IF FOUND THEN
            PERFORM pg_notify('roost_cancel_requested', job_id::text);
            RETURN 'executing';
        END IF;
    END LOOP;
    RAISE EXCEPTION 'cannot cancel job %: it is in none of ready, scheduled, blocked and claims', job_id;
END $$;

-- Starts a discarded or cancelled job again at attempt 0, its errors kept: due now, or when its parents have completed.
-- Returns whether it did; else, with nothing changed, the active job that has its key, or a parent that is dead.
CREATE FUNCTION roost.revive(job_id bigint, OUT revived boolean, OUT duplicate_of bigint, OUT dead_parent bigint)
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    job roost.job_rows%ROWTYPE;
BEGIN
    revived := false;
    -- Parents first, which have the smaller ids: see lock_with_dependents.
    SELECT min(p.id) INTO dead_parent
      FROM roost.job_rows j, roost.lock_parents(j.depends_on) AS p
     WHERE j.id = job_id AND p.state IN ('discarded', 'cancelled');
    IF dead_parent IS NULL THEN  -- one that the job was cancelled for, and that has been deleted from the archive since
        SELECT min(d.parent_id) INTO dead_parent
          FROM roost.job_rows j
         CROSS JOIN LATERAL unnest(j.depends_on) AS p(id)
          JOIN roost.cancelled_dependents d ON d.parent_id = p.id AND d.child_id = job_id
         WHERE j.id = job_id
           AND NOT EXISTS (SELECT 1 FROM roost.job_rows alive WHERE alive.id = d.parent_id)
           AND NOT EXISTS (SELECT 1 FROM roost.jobs_archive a WHERE a.id = d.parent_id);
    END IF;
    SELECT * INTO job FROM roost.job_rows j WHERE j.id = job_id AND j.state IN ('discarded', 'cancelled') FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        dead_parent := NULL;
        RETURN;
    ELSIF dead_parent IS NOT NULL THEN
        RETURN;
    ELSIF job.unique_key IS NOT NULL THEN
        duplicate_of := roost.take_key(job.unique_key, job_id);
        IF duplicate_of IS NOT NULL THEN
            RETURN;
        END IF;
    END IF;
    UPDATE roost.job_rows j
       SET state = 'available', attempt = 0, crashes = 0, scheduled_at = now(), cancel_requested = false,
           cancelled_at = NULL, discarded_at = NULL
     WHERE j.id = job_id;
    IF job.depends_on IS NULL OR (roost.block(job_id, job.queue, job.depends_on)).living = 0 THEN
        PERFORM roost.make_due(ARRAY[job_id]);
    END IF;
    revived := true;
END $$;

-- Locks a job, those that its end has cancelled, all the way down, and the other parents of these, as their revival will. All in
-- the order of their ids, in which parents come before their children: taken as they are met, the locks of two jobs that are
-- retried at once, and have dependents in common, would wait for each other.
CREATE FUNCTION roost.lock_with_dependents(job_id bigint) RETURNS void
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    each record;
BEGIN
    FOR each IN
        WITH RECURSIVE revived AS (
            SELECT job_id AS id
            UNION
            SELECT d.child_id
              FROM revived
              JOIN roost.cancelled_dependents d ON d.parent_id = revived.id
              JOIN roost.job_rows j ON j.id = d.child_id AND j.state = 'cancelled' AND NOT j.cancel_requested
        )
        SELECT l.id, bool_or(l.is_revived) AS is_revived
          FROM (SELECT revived.id, true AS is_revived FROM revived
                UNION ALL
                SELECT unnest(j.depends_on), false FROM revived JOIN roost.job_rows j ON j.id = revived.id) AS l
         GROUP BY l.id
         ORDER BY l.id
    LOOP
        IF each.is_revived THEN
            PERFORM 1 FROM roost.job_rows j WHERE j.id = each.id FOR NO KEY UPDATE;
        ELSE
            PERFORM 1 FROM roost.job_rows j WHERE j.id = each.id FOR SHARE;
        END IF;
    END LOOP;
END $$;

DROP FUNCTION roost.retry(bigint);

-- Makes a discarded, cancelled or waiting job due now, or as soon as its parents have completed; a finished one starts again
-- at attempt 0, its errors kept. With dependents, so do those that were cancelled for its sake, all the way down, but for
-- those that have another parent which is dead, or whose key another job has. Returns the state it had, NULL when there is
-- no such job; a job in any other state is left as it is.
CREATE FUNCTION roost.retry(job_id bigint, with_dependents boolean DEFAULT false) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    tried record;
BEGIN
    tried := roost.try_retry(job_id, with_dependents);
    IF tried.duplicate_of IS NOT NULL THEN
        RAISE unique_violation USING MESSAGE = format('cannot retry job %s: its unique_key is that of job %s, which is active', job_id, tried.duplicate_of),
                                     DETAIL = tried.duplicate_of::text;
    ELSIF tried.dead_parent IS NOT NULL THEN
        RAISE object_not_in_prerequisite_state USING MESSAGE = format('cannot retry job %s: job %s, on which it depends, was discarded or cancelled; %s', job_id, tried.dead_parent,
            CASE WHEN EXISTS (SELECT 1 FROM roost.job_rows j WHERE j.id = tried.dead_parent) THEN 'retry that one, with its dependents'
                 ELSE 'that one is archived, or deleted: enqueue both anew' END);
    END IF;
    RETURN tried.state;
END $$;
