-- Takes the results from up to 1,000 jobs of a span that were completed longer than `age` seconds ago. Returns how many.
-- Called by: every master, at every archive_interval. Locks: the job rows (SKIP LOCKED). Index: job_rows' primary key; the
-- update is HOT.
WITH old AS MATERIALIZED (
    SELECT j.id
      FROM roost.job_rows j
     WHERE j.id BETWEEN %(span)s::bigint * 10000 AND %(span)s::bigint * 10000 + 9999
       AND j.state = 'completed' AND j.result IS NOT NULL
       AND j.completed_at < now() - make_interval(secs => %(age)s::float8)
     ORDER BY j.id
     LIMIT 1000
       FOR NO KEY UPDATE SKIP LOCKED
), cleared AS (
    UPDATE roost.job_rows AS j
       SET result = NULL
      FROM old
     WHERE j.id BETWEEN old.id AND old.id AND j.state = 'completed'
    RETURNING 1
)
SELECT count(*) FROM cleared
