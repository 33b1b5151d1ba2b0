-- Deletes up to 1,000 jobs that were archived longer than `age` seconds ago, from `since` on (NULL: the oldest), which passes
-- over what was deleted before and can't be removed while an old transaction is open. Returns how many, and when the last
-- was archived.
-- Called by: every master, at every archive_interval. Locks: the rows (SKIP LOCKED). Index: jobs_archive_by_age.
WITH old AS MATERIALIZED (
    SELECT a.id, a.archived_at
      FROM roost.jobs_archive a
     WHERE a.archived_at < now() - make_interval(secs => %(age)s::float8)
       AND a.archived_at >= coalesce(%(since)s::timestamptz, '-infinity')
     ORDER BY a.archived_at
     LIMIT 1000
       FOR UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM roost.jobs_archive AS a
     USING old
     WHERE a.id BETWEEN old.id AND old.id
    RETURNING a.archived_at
)
SELECT count(*), max(deleted.archived_at) FROM deleted
