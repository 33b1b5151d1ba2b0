-- Takes the results from up to 1,000 archived jobs that were completed longer than `age` seconds ago. Returns how many.
-- Called by: every master, at every archive_interval. Locks: the rows (SKIP LOCKED). Index: jobs_archive_results.
WITH old AS MATERIALIZED (
    SELECT a.id
      FROM roost.jobs_archive a
     WHERE a.result IS NOT NULL AND a.completed_at < now() - make_interval(secs => %(age)s::float8)
     ORDER BY a.completed_at
     LIMIT 1000
       FOR NO KEY UPDATE SKIP LOCKED
), cleared AS (
    UPDATE roost.jobs_archive AS a
       SET result = NULL
      FROM old
     WHERE a.id BETWEEN old.id AND old.id
    RETURNING 1
)
SELECT count(*) FROM cleared
