-- Where finished jobs go, and how they are found.
--
-- jobs_archive  jobs that ended longer ago than archive_after_seconds, moved from job_rows: as roost.jobs shows them
-- spans         what is known of each 10,000 ids in a row: where in job_rows to look for jobs that have been finished
--               for long, because no index may name a column that the end of a job changes

CREATE TABLE roost.jobs_archive (
    id               bigint      PRIMARY KEY,
    scheduled_at     timestamptz NOT NULL,
    inserted_at      timestamptz NOT NULL,
    attempted_at     timestamptz,
    completed_at     timestamptz,
    cancelled_at     timestamptz,
    discarded_at     timestamptz,
    archived_at      timestamptz NOT NULL DEFAULT now(),
    priority         integer     NOT NULL,
    attempt          integer     NOT NULL,
    max_attempts     integer     NOT NULL,
    crashes          integer     NOT NULL,
    timeout_seconds  integer,
    cancel_requested boolean     NOT NULL,
    state            text        COLLATE "C" NOT NULL CHECK (state IN ('completed', 'discarded', 'cancelled')),
    queue            text        COLLATE "C" NOT NULL,
    task             text        COLLATE "C" NOT NULL,
    args             jsonb       NOT NULL,
    unique_key       text,
    tags             text[]      NOT NULL,
    depends_on       bigint[]    NOT NULL,
    metadata         jsonb       NOT NULL,
    errors           jsonb       NOT NULL,
    result           jsonb
);

CREATE INDEX jobs_archive_by_age ON roost.jobs_archive (archived_at);
CREATE INDEX jobs_archive_results ON roost.jobs_archive (completed_at) WHERE result IS NOT NULL;

CREATE TABLE roost.spans (
    number           bigint      PRIMARY KEY,  -- of the ids from number * 10000 on
    looked_at        timestamptz,              -- the rest is as it was then; NULL: never
    oldest_end_at    timestamptz,              -- of the finished jobs in job_rows; NULL: there are none
    oldest_result_at timestamptz,              -- of those with a result
    may_change       boolean     NOT NULL DEFAULT true  -- there are jobs, or may be, that end or are retried later
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000);

-- The state in which a job was archived, as of this moment; NULL when it is not in the archive.
CREATE FUNCTION roost.archived_state(job_id bigint) RETURNS text
LANGUAGE sql VOLATILE AS $$
    SELECT a.state FROM roost.jobs_archive a WHERE a.id = job_id
$$;

-- The state of each of these jobs that there is ('available' also for one that runs), kept from ending until the end of
-- the caller's transaction. In two statements: what is archived while the first waits, the second sees.
CREATE FUNCTION roost.lock_parents(job_ids bigint[]) RETURNS TABLE (id bigint, state text)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY SELECT j.id, j.state FROM roost.job_rows j WHERE j.id = ANY (job_ids) ORDER BY j.id FOR SHARE;
    RETURN QUERY SELECT a.id, a.state FROM roost.jobs_archive a WHERE a.id = ANY (job_ids);
END $$;
