-- Makes a worker's cron entries those in force, and keeps what operators have set (paused_at). Returns the database's time,
-- and of each entry the last slot that fired or the time since when it is known, whichever is later: what comes after fires.
-- An entry that is new, was not enabled, or fires at other times than before is known since now.
-- Called by: every master after its start and each reload. Locks: the entries' rows, in order of name. Safe to repeat.
-- Index: primary keys.
WITH given AS MATERIALIZED (
    SELECT g.name, g.expression, g.timezone, g.task, g.args, g.queue, g.priority, g.max_attempts, g.tags,
           g.timeout_seconds, g.enabled, g.catch_up, g.source
      FROM json_to_recordset(%(entries)s::json) AS g(
               name text, expression text, timezone text, task text, args text, queue text, priority integer,
               max_attempts integer, tags text[], timeout_seconds integer, enabled boolean, catch_up text, source text)
     ORDER BY g.name
), known AS (
    INSERT INTO roost.cron_entries AS e
           (name, since, seen_at, expression, timezone, task, args, queue, priority, max_attempts, tags, timeout_seconds,
            enabled, catch_up, source)
    SELECT given.name, now(), now(), given.expression, given.timezone, given.task, given.args::jsonb, given.queue,
           given.priority, given.max_attempts, nullif(given.tags, '{}'), given.timeout_seconds, given.enabled,
           given.catch_up, given.source
      FROM given
    ON CONFLICT (name) DO UPDATE
       SET since = CASE WHEN (e.expression, e.timezone, e.catch_up) = (excluded.expression, excluded.timezone, excluded.catch_up)
                         AND e.enabled THEN e.since ELSE now() END,
           seen_at = now(), expression = excluded.expression, timezone = excluded.timezone, task = excluded.task,
           args = excluded.args, queue = excluded.queue, priority = excluded.priority,
           max_attempts = excluded.max_attempts, tags = excluded.tags, timeout_seconds = excluded.timeout_seconds,
           enabled = excluded.enabled, catch_up = excluded.catch_up, source = excluded.source
    RETURNING e.name, e.since
)
SELECT now(), known.name,
       greatest(known.since, (SELECT max(r.slot) FROM roost.cron_runs r WHERE r.name = known.name AND r.slot <= now()))
  FROM known
