-- Fires slots: each becomes a job, unless it has fired. Returns the database's time, and name, slot and job of those that
-- became one (no row of these: one row with nulls).
-- By the database's clock a slot is not early, not too late where it is not to be caught up, not one of before the entry was
-- known, and not earlier than one that has fired; one of a clock that was ahead for a while doesn't count for that.
-- Called by: every master, when slots are due by what it knows of the database's clock; safe to repeat after a lost answer.
-- Locks: a row of cron_runs a slot, in order of name; waits for another master that is firing the same. Index: primary keys.
WITH due AS MATERIALIZED (
    SELECT d.name, d.slot, d.task, d.args, d.queue, d.priority, d.max_attempts, d.tags, d.timeout_seconds
      FROM json_to_recordset(%(due)s::json) AS d(
               name text, slot timestamptz, catch_up text, task text, args text, queue text, priority integer,
               max_attempts integer, tags text[], timeout_seconds integer)
      JOIN roost.cron_entries e ON e.name = d.name
     WHERE e.paused_at IS NULL
       AND d.slot > e.since
       AND d.slot <= now()
       AND (d.catch_up = 'latest' OR d.slot > now() - make_interval(secs => %(late_seconds)s::float8))
       AND NOT EXISTS (SELECT 1 FROM roost.cron_runs r WHERE r.name = d.name AND r.slot >= d.slot AND r.slot <= now())
     ORDER BY d.name
), fired AS MATERIALIZED (
    SELECT due.name, due.slot,
           roost.fire_cron(due.name, due.slot, due.task, due.args::jsonb, due.queue, due.priority, due.max_attempts,
                           due.tags, due.timeout_seconds) AS job_id
      FROM due
)
SELECT now(), fired.name, fired.slot, fired.job_id
  FROM (VALUES (1)) AS once
  LEFT JOIN fired ON fired.job_id IS NOT NULL
