-- How an operator finds jobs among millions of finished ones, starts many again, and has a worker end.
--
-- No index here names a column that the completion of a job changes: that stays a HOT update. A job that fails or is called
-- off pays for its entries in the small ones.

CREATE INDEX job_rows_discarded ON roost.job_rows (id) WHERE discarded_at IS NOT NULL;
CREATE INDEX job_rows_discarded_of_queue ON roost.job_rows (queue, id) WHERE discarded_at IS NOT NULL;
CREATE INDEX job_rows_discarded_of_task ON roost.job_rows (task, id) WHERE discarded_at IS NOT NULL;
CREATE INDEX job_rows_cancelled ON roost.job_rows (id) WHERE cancelled_at IS NOT NULL;
CREATE INDEX job_rows_with_errors ON roost.job_rows (id) WHERE errors IS NOT NULL;

-- Which parts of the table may hold jobs of a queue or task that is rare, or of a time. Next to nothing for an enqueue: a part
-- is summed up when it is full. The id stands here in a way in which the primary key has it not: who asks for some ids and a
-- time (roost.strays) is led here, and not along the primary key, past all that lie on the wrong side of that time.
CREATE INDEX job_rows_parts ON roost.job_rows USING brin (
    queue text_bloom_ops (n_distinct_per_range = 64), task text_bloom_ops (n_distinct_per_range = 128), (id + 0), inserted_at
) WITH (pages_per_range = 64, autosummarize = on);

CREATE INDEX jobs_archive_failed ON roost.jobs_archive (state, id) WHERE state <> 'completed';
CREATE INDEX jobs_archive_parts ON roost.jobs_archive USING brin (
    queue text_bloom_ops (n_distinct_per_range = 64), task text_bloom_ops (n_distinct_per_range = 128), inserted_at
) WITH (pages_per_range = 64, autosummarize = on);

-- Where jobs enqueued before a time end and later ones begin, by their ids; NULL where there are none. Ids rise with time, but
-- for those of transactions that were open then: they may lie on the other side. So it says where to look, not what is true.
CREATE FUNCTION roost.id_of_time(at timestamptz) RETURNS bigint
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_variable
DECLARE
    low    numeric;  -- two bigints may be further apart than one can hold
    high   numeric;
    middle bigint;
    probe  record;
BEGIN
    SELECT min(j.id) INTO low FROM roost.job_rows j;
    SELECT max(j.id) INTO high FROM roost.job_rows j;
    WHILE low <= high LOOP
        middle := floor((low + high) / 2);
        SELECT j.id, j.inserted_at INTO probe FROM roost.job_rows j WHERE j.id >= middle ORDER BY j.id LIMIT 1;
        IF probe.inserted_at < at THEN
            low := probe.id::numeric + 1;
        ELSE
            high := middle::numeric - 1;
        END IF;
    END LOOP;
    RETURN least(low, 9223372036854775807);
END $$;

-- The jobs that were enqueued before `at` and have an id from `border` on, or, not `before`, since `at` and have one below it:
-- few, where the border is the id of that time. Planned by itself, for the values given: as part of a larger statement its
-- estimated cost would have some servers compile that, for 80 ms.
CREATE FUNCTION roost.strays(at timestamptz, border bigint, before boolean) RETURNS TABLE (id bigint)
LANGUAGE plpgsql STABLE ROWS 10
SET jit = off
SET plan_cache_mode = force_custom_plan AS $$
#variable_conflict use_column
BEGIN
    IF before THEN
        RETURN QUERY SELECT j.id FROM roost.job_rows j WHERE j.id + 0 >= border AND j.inserted_at < at;
    ELSE
        RETURN QUERY SELECT j.id FROM roost.job_rows j WHERE j.id + 0 < border AND j.inserted_at >= at;
    END IF;
END $$;

-- Lets those of these jobs that are discarded start again at attempt 0, their errors kept. Passes over, and counts, those
-- whose unique_key an active job has (of several with the same key all but the first), that depend on one which is dead, and
-- `held`: what another transaction has locked or is about to decide, or has changed already. Waits for none of these.
CREATE FUNCTION roost.requeue(job_ids bigint[], OUT requeued bigint, OUT duplicates bigint, OUT dead_parents bigint, OUT held bigint)
LANGUAGE plpgsql
SET lock_timeout = '100ms' AS $$
#variable_conflict use_variable
DECLARE
    free    bigint[];
    tangled bigint[];  -- in an order that is the same for all, so that two of these can't wait for each other
    tried   record;
    next_id bigint;
BEGIN
    SELECT array_agg(d.id) FILTER (WHERE d.unique_key IS NULL AND d.depends_on IS NULL),
           array_agg(d.id ORDER BY d.unique_key COLLATE "C", d.id)
               FILTER (WHERE d.unique_key IS NOT NULL OR d.depends_on IS NOT NULL)
      INTO free, tangled
      FROM (SELECT j.id, j.unique_key, j.depends_on FROM roost.job_rows j
             WHERE j.id = ANY (job_ids) AND j.state = 'discarded'
             ORDER BY j.id
               FOR NO KEY UPDATE SKIP LOCKED) AS d;
    requeued := coalesce(cardinality(free), 0);
    duplicates := 0;
    dead_parents := 0;
    held := cardinality(job_ids) - requeued - coalesce(cardinality(tangled), 0);
    IF requeued > 0 THEN
        UPDATE roost.job_rows j
           SET state = 'available', attempt = 0, crashes = 0, scheduled_at = now(), cancel_requested = false, discarded_at = NULL
         WHERE j.id = ANY (free) AND j.state = 'discarded';
        PERFORM roost.make_due(free);
    END IF;
    FOREACH next_id IN ARRAY coalesce(tangled, '{}') LOOP
        BEGIN
            tried := roost.revive(next_id);
            requeued := requeued + tried.revived::integer;
            duplicates := duplicates + (tried.duplicate_of IS NOT NULL)::integer;
            dead_parents := dead_parents + (tried.dead_parent IS NOT NULL)::integer;
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            held := held + 1;
        END;
    END LOOP;
END $$;

ALTER TABLE roost.workers ADD COLUMN drain_requested boolean NOT NULL DEFAULT false;  -- to end when its jobs have
